"""What numba compiles of the products of matrices."""
