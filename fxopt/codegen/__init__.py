"""Printers of the loop IR (Triton for GPUs, C++ for CPUs) and the compilation of what they print."""
