"""What numba compiles: the insides of the kernels, as machine code that needs neither numba nor Python when it runs.

Only the compiler (compiler.py) imports these modules, in a process of its own (kernels/preparing.py). So a process that
finds its machine code on disk never loads numba or LLVM, which take 100 MB.
"""
