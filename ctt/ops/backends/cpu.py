"""C++ kernels (csrc/cpu) for tensors in main memory.

Matrix products stay with torch.mm on blocks of pixels, which is faster than on all pixels at once;
everything around them is one C++ call a step. All kernels use torch.get_num_threads() threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctt.ops import reference

try:
    from ctt import _cpu
except ImportError as error:
    _MISSING: str | None = (
        f"ctt._cpu cannot be imported ({error}); install again with a C++17 compiler and "
        f"CTT_CPU=1, which makes the build say what it lacks"
    )
else:
    _MISSING = None

# The codes of csrc/cpu/common.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# Scores held at once: a block stays in the caches, yet is tall enough for the matrix products.
_BLOCK_SCORES = 1 << 20
_BLOCK_ROWS = (64, 512)


def why_not(operation: str, device: torch.device) -> str | None:
    if device.type != "cpu":
        works = "cuda, triton or torch" if device.type == "cuda" else "torch"
        return f"it serves tensors in main memory only; on {device.type} take {works}"
    return _MISSING


def ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float | Tensor
) -> None:
    if not _flat(teacher, student):
        pairs = list(zip(teacher, student, strict=True))
        rest = [pair for pair in pairs if not _flat(pair[:1], pair[1:])]
        reference.ema_update_([t for t, _ in rest], [s for _, s in rest], decay)
        pairs = [pair for pair in pairs if _flat(pair[:1], pair[1:])]
        teacher, student = [t for t, _ in pairs], [s for _, s in pairs]
    _cpu.ema_update(
        [t.data_ptr() for t in teacher],
        [s.data_ptr() for s in student],
        [t.numel() for t in teacher],
        [_DTYPES[t.dtype] for t in teacher],
        [_DTYPES[s.dtype] for s in student],
        float(decay),
        torch.get_num_threads(),
    )
    _written(teacher)


def class_topk(
    confidence: Tensor, label: Tensor, k: int, num_classes: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    confidence, label = confidence.contiguous(), label.contiguous()
    valid = None if valid is None else valid.contiguous()
    index = label.new_empty(num_classes, k)
    count = label.new_empty(num_classes)
    _cpu.class_topk(
        confidence.data_ptr(),
        _DTYPES[confidence.dtype],
        label.data_ptr(),
        0 if valid is None else valid.data_ptr(),
        label.shape[0],
        k,
        num_classes,
        index.data_ptr(),
        count.data_ptr(),
        min(torch.get_num_threads(), num_classes),
    )
    return index, count


def queue_push_(
    keys: Tensor, count: Tensor, cursor: Tensor, features: Tensor, index: Tensor
) -> None:
    state = (keys, count, cursor)
    flat = tuple(x.contiguous() for x in state)
    num_classes, capacity, dim = keys.shape
    index = index.contiguous()
    _cpu.queue_push(
        _matrix(features),
        features.shape[0],
        index.data_ptr(),
        index.shape[1],
        flat[0].data_ptr(),
        _DTYPES[keys.dtype],
        num_classes,
        capacity,
        dim,
        flat[1].data_ptr(),
        flat[2].data_ptr(),
        torch.get_num_threads(),
    )
    for original, copy in zip(state, flat, strict=True):
        if copy is not original:
            original.copy_(copy)
    _written(state)


def info_nce(
    query: Tensor,
    label: Tensor,
    keys: Tensor,
    count: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    contrast = _Contrast(query, label, [keys], [count], mask, reduction, need_own=True)
    return contrast.run(None, temperature, need_grad)


def pair_info_nce(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor | None],
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    contrast = _Contrast(query, label, keys, counts, mask, reduction, need_own=False)
    return contrast.run(positive, temperature, need_grad)


class _Contrast:
    """One call of a contrast loss: the pixels that count, the keys held, and the sweep."""

    def __init__(
        self,
        query: Tensor,
        label: Tensor,
        keys: list[Tensor],
        counts: list[Tensor | None],
        mask: Tensor | None,
        reduction: str,
        need_own: bool,
    ) -> None:
        self.query, self.label, self.reduction = query, label.contiguous(), reduction
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.threads = torch.get_num_threads()
        self.num_classes = keys[0].shape[0]
        self.held = torch.stack([_held(k, n) for k, n in zip(keys, counts, strict=True)])  # (b, C)
        flat = self.held.flatten()
        self.begin = flat.cumsum(0) - flat  # (b * C,) where each queue starts among the keys held
        self.keys = torch.cat(
            [_keys_held(k, n, self.dtype) for k, n in zip(keys, self.held, strict=True)]
        )  # (M, D)

        mask = None if mask is None else mask.contiguous()
        index = torch.empty_like(self.label)
        self.pixels = self.label.new_empty(self.num_classes)  # that count, by class
        chosen = _cpu.select_pixels(
            self.label.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            self.label.shape[0],
            self.held.data_ptr(),
            len(keys),
            self.num_classes,
            need_own,
            index.data_ptr(),
            self.pixels.data_ptr(),
        )
        self.index = index[:chosen]  # (n,)

    def run(
        self, positive: Tensor | None, temperature: float, need_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        n, m = self.index.shape[0], self.keys.shape[0]
        loss = self.keys.new_empty(n)
        grad = torch.zeros_like(self.query) if need_grad else None
        weight = self._class_weight()
        low, high = _BLOCK_ROWS
        rows = min(max(_BLOCK_SCORES // max(m, 1), low), high)
        with torch.autocast("cpu", enabled=False):
            buffers = _Buffers(min(rows, n), self.keys, paired=positive is not None)
            for start in range(0, n, rows):
                block = buffers.first(min(rows, n - start))
                self._forward(block, start, positive, temperature, loss)
                if grad is not None:
                    self._backward(block, start, positive is not None, weight, grad)
        return self._reduce(loss, weight), grad

    def _forward(
        self,
        block: "_Buffers",
        start: int,
        positive: Tensor | None,
        temperature: float,
        loss: Tensor,
    ) -> None:
        double = self.dtype == torch.float64
        gather = _cpu.gather_unit_f64 if double else _cpu.gather_unit_f32
        place = self._place(block, start)
        queues = (
            self.begin.data_ptr(),
            self.held.data_ptr(),
            self.held.shape[0],
            self.num_classes,
            self.keys.shape[0],
        )
        scores, factors = block.score.data_ptr(), block.factor.data_ptr()
        losses = loss[start:].data_ptr()
        gather(place, _matrix(self.query), block.unit.data_ptr(), block.inverse_norm.data_ptr())
        torch.mm(block.unit, self.keys.T, out=block.score)
        if positive is None:
            hc = _cpu.info_nce_rows_f64 if double else _cpu.info_nce_rows_f32
            hc(place, queues, temperature, scores, losses, factors)
        else:
            slopes, units = block.slope.data_ptr(), block.unit.data_ptr()
            gather(place, _matrix(positive), slopes, block.spare.data_ptr())
            lc = _cpu.pair_info_nce_rows_f64 if double else _cpu.pair_info_nce_rows_f32
            lc(place, queues, temperature, units, scores, slopes, losses, factors)

    def _backward(
        self, block: "_Buffers", start: int, paired: bool, weight: Tensor, grad: Tensor
    ) -> None:
        if paired:
            block.slope.addmm_(block.score, self.keys)
        else:
            torch.mm(block.score, self.keys, out=block.slope)
        double = self.dtype == torch.float64
        scatter = _cpu.scatter_gradient_f64 if double else _cpu.scatter_gradient_f32
        scatter(
            self._place(block, start),
            block.unit.data_ptr(),
            block.inverse_norm.data_ptr(),
            block.factor.data_ptr(),
            weight.data_ptr(),
            block.slope.data_ptr(),
            _matrix(grad),
        )

    def _place(self, block: "_Buffers", start: int) -> tuple[int, int, int, int, int]:
        rows, dim = block.unit.shape
        return (
            self.index[start:].data_ptr(),
            self.label.data_ptr(),
            rows,
            dim,
            self.threads,
        )

    def _class_weight(self) -> Tensor:
        """(C,) float64: what the loss of one pixel of each class counts in the result."""
        if self.reduction == "none":
            return torch.ones(self.num_classes, dtype=torch.float64)
        if self.reduction == "mean":
            share = 1 / max(self.index.shape[0], 1)
            return torch.full((self.num_classes,), share, dtype=torch.float64)
        return 1 / (self.pixels.clamp(min=1) * (self.pixels > 0).sum().clamp(min=1)).double()

    def _reduce(self, loss: Tensor, weight: Tensor) -> Tensor:
        if self.reduction == "none":
            return loss.new_zeros(self.label.shape[0]).index_copy_(0, self.index, loss)
        return (loss.double() * weight[self.label[self.index]]).sum().to(loss.dtype)


class _Buffers:
    """Work space for a block of b pixels against keys (M, D)."""

    def __init__(self, rows: int, keys: Tensor, paired: bool) -> None:
        m, dim = keys.shape
        self.score = keys.new_empty(rows, m)
        self.unit = keys.new_empty(rows, dim)
        self.slope = keys.new_empty(rows, dim)
        self.inverse_norm, self.factor, self.spare = keys.new_empty(3, rows)

    def first(self, rows: int) -> "_Buffers":
        """The same for a shorter block."""
        if rows == self.score.shape[0]:
            return self
        block = object.__new__(_Buffers)
        for name, buffer in vars(self).items():
            setattr(block, name, buffer[:rows])
        return block


def _flat(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> bool:
    """Whether each pair can be walked through as two arrays in the same order."""
    contiguous = all(t.is_contiguous() for t in teacher) and all(s.is_contiguous() for s in student)
    return contiguous or all(
        t.stride() == s.stride()
        and (t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=_NHWC)))
        for t, s in zip(teacher, student, strict=True)
    )


_NHWC = torch.channels_last


def _held(keys: Tensor, count: Tensor | None) -> Tensor:
    """(C,) keys held by each queue."""
    num_classes, capacity, _ = keys.shape
    if count is None:
        return torch.full((num_classes,), capacity)
    return count.clamp(0, capacity)


def _keys_held(keys: Tensor, held: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, D): the keys of all queues, class by class, without the places that hold none."""
    num_classes, capacity, dim = keys.shape
    if int(held.sum()) == num_classes * capacity:
        return keys.reshape(num_classes * capacity, dim).to(dtype)
    return keys[torch.arange(capacity) < held[:, None]].to(dtype)


def _matrix(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), _DTYPES[x.dtype], x.stride(0), x.stride(1)


def _written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd of writes past it, so that a graph that saved the old values complains."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
