"""Kernels written by hand as `@triton.jit` functions, which printed entries call with a printed epilogue."""
