"""The compiled arithmetic of the decoder: plain functions over NumPy arrays.

Owns: the public names. Does not know: models, layers, files. registry.py says what a kernel is. Each is defined and
recorded in one file, whose `__all__` names it, and is called as `kernels.NAME` from elsewhere. What numba compiles of
it is in the file of the same name in compiled/. Machine code comes with the package or from the user's cache (kept.py),
or is made at the first call, in another process (preparing.py): this one needs neither numba nor LLVM.

All arrays are C-contiguous (anything else is a ValueError); floats are float32. float16 arrays are passed as their
uint16 view. Results do not depend on the number of threads, nor on how many rows are computed in one call.
"""

from edge_gemma.kernels import functions, preparing
from edge_gemma.kernels.attend.blocks import *
from edge_gemma.kernels.attend.full import *
from edge_gemma.kernels.attend.store import *
from edge_gemma.kernels.functions import *
from edge_gemma.kernels.gates import *
from edge_gemma.kernels.kept import *
from edge_gemma.kernels.matrix.floats import *
from edge_gemma.kernels.matrix.packed import *
from edge_gemma.kernels.norms import *
from edge_gemma.kernels.quantize import *
from edge_gemma.kernels.rows import *
from edge_gemma.kernels.select import *
from edge_gemma.kernels.thread_count import *
from edge_gemma.kernels.variants import *

functions.compile_with = preparing.compiled
