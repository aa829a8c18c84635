"""Triton kernels of the operations, one file an operation; installed as `ctt_kernels`.

They know nothing of the package that launches them: pointers, sizes and strides go in. Tile sizes
come from `tiles.py`. All run under TRITON_INTERPRET=1 on CPU tensors (float32, float16; the
interpreter is silently wrong in bfloat16).
"""
