"""teacher <- decay * teacher + (1 - decay) * student for a whole table of tensors in one launch."""

import triton
import triton.language as tl

BLOCK = 4096  # values of a chunk, so that 256 threads move 16 values each


@triton.jit(do_not_specialize=["num_chunks", "decay", "complement"])
def ema_kernel(
    table_ptr,  # (3, chunks) int64: address in the teacher, address in the student, values
    num_chunks,
    decay,
    complement,  # 1 - decay, rounded once and not from the rounded decay
    decay_ptr,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    DECAY_ON_DEVICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the moving average of all tensors of a table.

    ALIGNED: all addresses are multiples of 16 bytes, which the host has checked.

    A pointer out of a table carries no such knowledge, and the loads would be 4 bytes wide; marking
    the block of pointers gives 16.
    """
    chunk = tl.program_id(0)
    teacher = tl.load(table_ptr + chunk).to(tl.pointer_type(TEACHER))
    student = tl.load(table_ptr + num_chunks + chunk).to(tl.pointer_type(STUDENT))
    size = tl.load(table_ptr + 2 * num_chunks + chunk)
    if DECAY_ON_DEVICE:
        value = tl.load(decay_ptr)
        decay = value.to(tl.float32)
        complement = (1.0 - value).to(tl.float32)
    offset = tl.arange(0, BLOCK)
    teacher = teacher + offset
    student = student + offset
    if ALIGNED:
        teacher = tl.max_contiguous(tl.multiple_of(teacher, 16), BLOCK)
        student = tl.max_contiguous(tl.multiple_of(student, 16), BLOCK)
    if size >= BLOCK:
        old = tl.load(teacher).to(tl.float32)
        new = decay * old + complement * tl.load(student).to(tl.float32)
        tl.store(teacher, new.to(TEACHER))
    else:
        inside = offset < size
        old = tl.load(teacher, mask=inside).to(tl.float32)
        new = decay * old + complement * tl.load(student, mask=inside).to(tl.float32)
        tl.store(teacher, new.to(TEACHER), mask=inside)
