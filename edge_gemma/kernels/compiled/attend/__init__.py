"""What numba compiles of the attention."""
