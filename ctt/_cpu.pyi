"""C++ kernels of csrc/cpu; addresses are `Tensor.data_ptr()`, 0 for none, strides in elements."""

from collections.abc import Sequence

from torch import Tensor

Matrix = tuple[int, int, int, int]  # address, dtype code, row stride, column stride
Queues = tuple[int, int, int, int, int]  # address of begins, of sizes, banks, C, m

class Layout:
    """Where equally many tensors of both sequences lie in memory, and in what form."""

    def __init__(
        self, exchange: object, teacher: Sequence[Tensor], student: Sequence[Tensor]
    ) -> None: ...
    def matches(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> bool: ...

sources: str  # checksum, see ctt/ops/_sources.py

def instruction_set() -> str: ...
def ema_update(
    teacher: list[int],
    student: list[int],
    size: list[int],
    teacher_dtype: list[int],
    student_dtype: list[int],
    decay: float,
    threads: int,
) -> None: ...
def class_topk(
    confidence: int,
    dtype: int,
    label: int,
    valid: int,
    n: int,
    k: int,
    num_classes: int,
    index: int,
    count: int,
    threads: int,
) -> None: ...
def queue_push(
    features: Matrix,
    n: int,
    index: int,
    k: int,
    keys: int,
    dtype: int,
    num_classes: int,
    capacity: int,
    dim: int,
    count: int,
    cursor: int,
    threads: int,
) -> None: ...
def select_pixels(
    label: int,
    mask: int,
    n: int,
    held: int,
    banks: int,
    num_classes: int,
    need_own: bool,
    index: int,
    pixels: int,
) -> int: ...
def contrast_f32(
    query: Matrix,
    positive: Matrix,
    grad: Matrix,
    index: int,
    n: int,
    label: int,
    class_weight: int,
    dim: int,
    queues: Queues,
    keys: int,
    loss: int,
    temperature: float,
    threads: int,
    slope: int = 0,
) -> None: ...
def contrast_f64(
    query: Matrix,
    positive: Matrix,
    grad: Matrix,
    index: int,
    n: int,
    label: int,
    class_weight: int,
    dim: int,
    queues: Queues,
    keys: int,
    loss: int,
    temperature: float,
    threads: int,
    slope: int = 0,
) -> None: ...
