"""The one place that imports onnxruntime: `from edge_gemma.ort import onnxruntime`. It reports nothing to its maker.

Does not know: any graph.

Its wheels for Linux report from 1.29 on: at import they keep an id of this device and a database of events in the
user's cache, and soon look up the address to send them to. ORT_DISABLE_TELEMETRY, set before the import by
edge_gemma/__init__.py, prevents all of it. The call below prevents only events of sessions, of a program that imported
onnxruntime before edge_gemma (both measured with 1.32).
"""

import onnxruntime

onnxruntime.disable_telemetry_events()
