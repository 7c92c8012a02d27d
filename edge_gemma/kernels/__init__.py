"""The compiled arithmetic of the decoder: plain functions over NumPy arrays.

Owns: the public names. Does not know: models, layers, files. registry.py says what a kernel is. Each is defined,
compiled and recorded in one file, whose `__all__` names it, and is called as `kernels.NAME` from elsewhere. Kernels are
compiled by numba at their first call, or loaded from the user's cache (compiler.py); importing this package compiles
nothing.

All arrays are C-contiguous (anything else is a ValueError); floats are float32. float16 arrays are passed as their
uint16 view. Results do not depend on the number of threads, nor on how many rows are computed in one call.
"""

from edge_gemma.kernels import compiler, preparing
from edge_gemma.kernels.attend.blocks import *
from edge_gemma.kernels.attend.full import *
from edge_gemma.kernels.attend.store import *
from edge_gemma.kernels.compiler import *
from edge_gemma.kernels.gates import *
from edge_gemma.kernels.matrix.floats import *
from edge_gemma.kernels.matrix.packed import *
from edge_gemma.kernels.norms import *
from edge_gemma.kernels.quantize import *
from edge_gemma.kernels.rows import *
from edge_gemma.kernels.select import *
from edge_gemma.kernels.variants import *

compiler.before_compiling = preparing.prepare
