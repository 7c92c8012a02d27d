"""The one place that imports onnxruntime and opens graphs with it, with its telemetry off.

Does not know: any graph.

From 1.29 on, onnxruntime's wheels for Linux report to their maker. At import they store an id of this device and a
database of events in the user's cache, and soon after they look up the address to send them to. ORT_DISABLE_TELEMETRY
prevents all of it; edge_gemma/__init__.py sets it before the import. If a program imported onnxruntime before
edge_gemma, the call below prevents the events of sessions only (both measured with 1.32).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_gemma.errors import ModelFolderError
from edge_gemma.host.extras import imported

onnxruntime = imported("onnxruntime", "a graph", "", ModelFolderError)
onnxruntime.disable_telemetry_events()


def open_graph(path: Path, threads: int, settings: Mapping[str, str] | None = None) -> Any:
    """Open a graph as an onnxruntime.InferenceSession on the CPU.

    threads: how many share one operation. settings: of the session, by onnxruntime's names. Raises ModelFolderError,
    one line, where onnxruntime refuses the graph; lack of memory can be the reason.
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
