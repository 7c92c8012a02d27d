"""The one place that imports onnxruntime and opens graphs with it, with its telemetry off.

Owns: the import, the options of a session. Does not know: any graph.

From 1.29 on, onnxruntime's wheels for Linux report to their maker. At import they store an id of this device and a
database of events in the user's cache. Soon after, they look up the address to send them to. ORT_DISABLE_TELEMETRY
prevents all of this; edge_gemma/__init__.py sets it before the import. If a program has imported onnxruntime before
edge_gemma, the call below only prevents the events of sessions (both measured with 1.32).
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

    threads: how many share one operation. settings: session options by onnxruntime's names. Raises ModelFolderError,
    one line, if onnxruntime refuses the graph, for example for lack of memory.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only; these are raised too
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        reason, version = " ".join(str(error).split())[:300] or type(error).__name__, onnxruntime.__version__
        raise ModelFolderError(f"{path} cannot be loaded by onnxruntime {version}: {reason}") from None
