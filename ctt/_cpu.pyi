"""C++ kernels of csrc/cpu; addresses are `Tensor.data_ptr()`, 0 for none, strides in elements."""

Matrix = tuple[int, int, int, int]  # address, dtype code, row stride, column stride
Block = tuple[int, int, int, int, int]  # address of rows, of labels, b, D, threads
Queues = tuple[int, int, int, int, int]  # address of begins, of sizes, banks, C, m

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
def gather_unit_f32(block: Block, source: Matrix, unit: int, inverse_norm: int) -> None: ...
def gather_unit_f64(block: Block, source: Matrix, unit: int, inverse_norm: int) -> None: ...
def info_nce_rows_f32(
    block: Block, queues: Queues, temperature: float, score: int, loss: int, factor: int
) -> None: ...
def info_nce_rows_f64(
    block: Block, queues: Queues, temperature: float, score: int, loss: int, factor: int
) -> None: ...
def pair_info_nce_rows_f32(
    block: Block,
    queues: Queues,
    temperature: float,
    unit: int,
    score: int,
    positive: int,
    loss: int,
    factor: int,
) -> None: ...
def pair_info_nce_rows_f64(
    block: Block,
    queues: Queues,
    temperature: float,
    unit: int,
    score: int,
    positive: int,
    loss: int,
    factor: int,
) -> None: ...
def scatter_gradient_f32(
    block: Block,
    unit: int,
    inverse_norm: int,
    factor: int,
    class_weight: int,
    slope: int,
    grad: Matrix,
) -> None: ...
def scatter_gradient_f64(
    block: Block,
    unit: int,
    inverse_norm: int,
    factor: int,
    class_weight: int,
    slope: int,
    grad: Matrix,
) -> None: ...
