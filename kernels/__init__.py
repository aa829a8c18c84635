"""Triton kernels of the operations, one file an operation; installed as `ctt_kernels`."""
