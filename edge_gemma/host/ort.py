"""The one place that imports onnxruntime, and opens graphs with it. It reports nothing to its maker.

Does not know: any graph.

Its wheels for Linux report from 1.29 on: at import they keep an id of this device and a database of events in the
user's cache, and soon look up the address to send them to. ORT_DISABLE_TELEMETRY, set before the import by
edge_gemma/__init__.py, prevents all of it. The call below prevents only events of sessions, of a program that imported
onnxruntime before edge_gemma (both measured with 1.32).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_gemma.errors import ModelFolderError
from edge_gemma.host.extras import imported

onnxruntime = imported("onnxruntime", "a graph", "", ModelFolderError)
onnxruntime.disable_telemetry_events()


def open_graph(path: Path, threads: int, settings: Mapping[str, str] | None = None) -> Any:
    """An onnxruntime.InferenceSession on the CPU.

    threads: that share one operation; settings: of the session, by onnxruntime's names. Raises ModelFolderError, one
    line, where onnxruntime refuses the graph, which not enough memory may be the reason of.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors, which are raised
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        reason, version = " ".join(str(error).split())[:300] or type(error).__name__, onnxruntime.__version__
        raise ModelFolderError(f"{path} cannot be loaded by onnxruntime {version}: {reason}") from None
