"""The kernels as they are defined, slow and plain: what compiled code is compared with."""

from types import SimpleNamespace

import edge_gemma.kernels  # noqa: F401  (registers every kernel)
from edge_gemma.kernels.registry import registered

definitions = SimpleNamespace(**{name: kernel.definition for name, kernel in registered.items()})
