"""Ways to compute the contrast losses, and their comparison. Used by the two benchmarks of them."""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.harness import Row, Run, Setting
from ctt.ops import available_backends
from tests.ops.common import Contrast, Loss, assert_accurate, contrast, evaluate

TAU = 0.1
Shape = tuple[int, int, int, int]  # N, C, V, D

PAPER: dict[str, Shape] = {
    "cityscapes-v2": (8580, 19, 128, 256),
    "voc-v2": (33620, 21, 128, 256),
    "voc-v3plus": (131220, 21, 128, 256),
}
SERIES: dict[str, Shape] = {
    **{f"series-n-{n}": (n, 19, 128, 256) for n in (1024, 4096, 16384)},
    **{f"series-v-{v}": (4096, 19, v, 256) for v in (32, 128, 512)},
    **{f"series-c-{c}": (4096, c, 32, 256) for c in (2, 19, 21, 150)},
}
# supervised pixels so few that pytorch-metric-learning, which keeps a number for each two pairs of
# a pixel and a key, takes them too
FEW: dict[str, Shape] = {f"few-c-{c}": (32, c, 16, 256) for c in (19, 21, 150)}
# shows in seconds that every way runs and is right; its times mean nothing
TINY: dict[str, Shape] = {"tiny": (200, 4, 8, 16)}
SIZES = TINY | PAPER | SERIES | FEW
GROUPS = {
    "default": ["cityscapes-v2"],
    "paper": list(PAPER),
    "series": [*SERIES, *FEW],
}

CHECKED = 2000  # pixels of the comparison with float64, whose scores would not fit for all of them
# Bytes that plain PyTorch needs for a score: about six (N, C * V) tensors of float32 at its peak.
DENSE_BYTES = 24
PUBLISHED_EPS = 1e-12  # what published programs add against the logarithm of 0


def norms_cosine(v: Tensor, keys: Tensor) -> Tensor:
    """Return (n, M): one matrix product, divided by the products of the norms."""
    return v @ keys.T / torch.outer(v.norm(dim=1), keys.norm(dim=1))


def pairwise_cosine(v: Tensor, keys: Tensor) -> Tensor:
    """Return (n, M): each from the two vectors of its pair."""
    return torch.cosine_similarity(v.unsqueeze(1), keys.unsqueeze(0), dim=2)


def published_loop(
    q: Tensor, case: Contrast, reduction: str, cosine: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Compute equation (6) as published programs do: a loop over the classes, the class's own keys
    before all others in one tensor, and autograd for the rest.

    With `norms_cosine` it does the operations of the program of the paper's authors. With
    `pairwise_cosine` it has the cosines as ReCo, U2PL and their heirs compute them, of samples of
    pixels and keys.
    """
    losses = []
    num_classes, capacity, _ = case.keys.shape
    for c in range(num_classes):
        v = q[case.label == c]
        if len(v) == 0:
            continue
        keys = torch.cat([case.keys[c], _others(case.keys, c)]).to(q.dtype)
        weight = torch.exp(cosine(v, keys) / case.temperature)
        positive, negative = weight[:, :capacity], weight[:, capacity:].sum(dim=1, keepdim=True)
        share = positive / (positive + negative + PUBLISHED_EPS)
        losses.append(-torch.log(share + PUBLISHED_EPS).mean())
    return torch.stack(losses).mean()


def class_loop(q: Tensor, case: Contrast, reduction: str) -> Tensor:
    """Run the same loop at its best: with unit keys the cosines are products and nothing else."""
    losses = []
    for c in case.label.unique().tolist():
        if not 0 <= c < case.keys.shape[0]:
            continue
        v = F.normalize(q[case.label == c], dim=1)
        keys = case.keys.to(v.dtype)
        positive = torch.exp(v @ keys[c].T / case.temperature)
        negative = torch.exp(v @ _others(keys, c).T / case.temperature).sum(dim=1, keepdim=True)
        losses.append(-torch.log(positive / (positive + negative)).mean())
    return torch.stack(losses).mean()


def published_pair_loop(q: Tensor, case: Contrast, reduction: str) -> Tensor:
    """Compute equation (8) with the operations of the program of the paper's authors."""
    assert case.positive is not None
    losses = []
    bank = torch.cat([k for k, _ in case.banks], dim=1)
    for c in range(len(bank)):
        v, peer = q[case.label == c], case.positive[case.label == c]
        if len(v) == 0:
            continue
        others = _others(bank, c).to(q.dtype)
        negative = torch.exp(norms_cosine(v, others) / case.temperature).sum(dim=1)
        cosine = (v * peer).sum(dim=1) / (v.norm(dim=1) * peer.norm(dim=1))
        positive = torch.exp(cosine / case.temperature)
        share = positive / (positive + negative + PUBLISHED_EPS)
        losses.append(-torch.log(share + PUBLISHED_EPS).mean())
    return torch.stack(losses).mean()


def pair_class_loop(q: Tensor, case: Contrast, reduction: str) -> Tensor:
    """Return the same loop at its best."""
    assert case.positive is not None
    losses = []
    for c in case.label.unique().tolist():
        if not 0 <= c < case.keys.shape[0]:
            continue
        chosen = case.label == c
        v, peer = F.normalize(q[chosen], dim=1), F.normalize(case.positive[chosen], dim=1)
        others = torch.cat([_others(k, c) for k, _ in case.banks]).to(v.dtype)
        positive = torch.exp((v * peer).sum(dim=1) / case.temperature)
        negative = torch.exp(v @ others.T / case.temperature).sum(dim=1)
        losses.append(-torch.log(positive / (positive + negative)).mean())
    return torch.stack(losses).mean()


def _others(keys: Tensor, c: int) -> Tensor:
    return torch.cat([keys[:c], keys[c + 1 :]]).flatten(0, 1)


def metric_learning() -> Loss | None:
    """Return pytorch-metric-learning's cross-batch memory, filled with the keys, of its InfoNCE: a
    mean over pairs of query and positive.

    With full queues each pixel has V of them, so that it is reduction "mean". The queries are not
    put into the memory.
    """
    try:
        from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss
    except ImportError:
        return None

    def run(q: Tensor, case: Contrast, reduction: str) -> Tensor:
        num_classes, capacity, dim = case.keys.shape
        places = num_classes * capacity
        owner = torch.arange(num_classes, device=q.device).repeat_interleave(capacity)
        loss = CrossBatchMemory(NTXentLoss(temperature=TAU), dim, memory_size=places)
        loss.embedding_memory = case.keys.flatten(0, 1).to(q.dtype)
        loss.label_memory, loss.has_been_filled = owner, True
        none = torch.zeros(len(q), dtype=torch.bool, device=q.device)
        value: Tensor = loss(q, case.label, enqueue_mask=none)
        return value

    return run


def compiled(dense: Loss) -> Loss:
    torch._dynamo.reset()
    run: Loss = torch.compile(dense, fullgraph=True, dynamic=False)
    return run


def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Contrast:
    pixels, classes, capacity, dim = shape
    case = contrast(pixels, classes, capacity, dim, dtype, device.type, seed=seed)
    second = contrast(1, classes, capacity, dim, dtype, device.type, seed=seed + 1)
    return replace(case, temperature=TAU, second=(second.keys, None))


Maker = Callable[[Shape, torch.dtype, torch.device, int], Contrast]


def two_products(case: Contrast, banks: int) -> Run:
    """Return the limit: scores and weighted keys of all pixels, 2 * (2 N M D) floating-point
    operations, M = C * V keys of `banks` banks, in the dtype of the queries and with nothing
    between them."""
    keys = torch.cat([k for k, _ in case.banks[:banks]], dim=1).flatten(0, 1)
    keys, query = keys.to(case.query.dtype), case.query
    size = min(len(query), max(1, (64 << 20) // (len(keys) * 4)))  # blocks, to bound its memory
    score = query.new_empty(size, len(keys))
    out = torch.empty_like(query)

    def run() -> None:
        for start in range(0, len(query), size):
            q = query[start : start + size]
            torch.mm(q, keys.T, out=score[: len(q)])
            torch.mm(score[: len(q)], keys, out=out[start : start + size])

    return run


def first(case: Contrast, pixels: int) -> Contrast:
    assert case.positive is not None
    return replace(
        case,
        query=case.query[:pixels],
        label=case.label[:pixels],
        positive=case.positive[:pixels],
    )


def check(
    name: str, loss: Loss, case: Contrast, truth: Loss, plain: Loss, reduction: str = "class"
) -> None:
    """Raise where a way computes something else than equation (6) or (8), gradient included."""
    part = first(case, CHECKED)
    true = evaluate(truth, part.widened(), reduction)
    rough = evaluate(plain, part, reduction)
    for got, want, near in zip(evaluate(loss, part, reduction), true, rough, strict=True):
        try:
            assert_accurate(got, want, near, 10)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def compare(
    operation: str,
    size: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    ours: Callable[[str], Loss],
    truth: Loss,
    dense: Loss,
    peers: dict[str, Loss],
    banks: int,
    may_compile: bool,
    seconds: float,
    record: Callable[[list[Row]], None],
    make: Maker = make,
) -> Run:
    """Check, time and record every way; return a call of the one that "auto" takes. What follows a
    comma in `operation` tells what it is used for."""
    backends = available_backends(device)[operation.partition(",")[0]]
    case = make(shape, dtype, device)
    ways = {name: ours(name) for name in backends}
    if dtype == torch.float32 and device.type == "cuda":
        ways.pop("triton", None)  # exact float32 is the chunked backend's
    ways |= peers
    if may_compile:
        ways["torch.compile"] = compiled(dense)
    if not _fits(shape, banks, device):
        ways = {n: w for n, w in ways.items() if n in backends}
        del ways["reference"]
    for name in list(ways):
        reduction = "mean" if name == "pytorch-metric-learning" else "class"
        try:
            check(name, ways[name], case, truth, dense, reduction)
        except AssertionError:
            raise
        except Exception as error:  # what is not ours may fail to compile or to fit
            if name in backends:
                raise
            warnings.warn(f"{name} was left out: {error}", stacklevel=2)
            del ways[name]

    setting = Setting(operation, size, _text(shape), str(dtype).removeprefix("torch."), device)
    calls = {n: partial(evaluate, w, case) for n, w in ways.items()}
    _measure(setting, calls, two_products(case, banks), seconds, record)
    if device.type == "cuda":
        _measure_cold(setting, ways, partial(make, shape, dtype, device), banks, seconds, record)
    return partial(evaluate, ours("auto"), case)


def _measure(
    setting: Setting,
    calls: dict[str, Run],
    limit: Run,
    seconds: float,
    record: Callable[[list[Row]], None],
) -> None:
    memory = {n: harness.extra_memory(c, setting.device) for n, c in calls.items()}
    every = {**calls, "two matrix products": limit}
    times = harness.time_in_turns(every, setting.device, seconds)
    record(harness.rows(setting, times, memory, times["two matrix products"]))


def _measure_cold(
    setting: Setting,
    ways: dict[str, Loss],
    make: Callable[[int], Contrast],
    banks: int,
    seconds: float,
    record: Callable[[list[Row]], None],
) -> None:
    copies = harness.copies_beyond_cache(make(0).query.nbytes, setting.device)
    cases = [make(seed) for seed in range(copies)]
    limit = "two matrix products"
    runs: dict[str, list[Run]] = {
        n: [partial(evaluate, w, c) for c in cases] for n, w in ways.items()
    }
    runs[limit] = [two_products(c, banks) for c in cases]
    graphs = {n: harness.replayed(r, setting.device) for n, r in runs.items()}
    ready = {n: g for n, g in graphs.items() if g is not None}
    if not ready:
        return
    times = harness.time_in_turns(ready, setting.device, seconds)
    each = harness.divided(times, copies)
    record(harness.rows(setting.graph(), each, {}, each.get(limit)))


def _text(shape: Shape) -> str:
    return " ".join(f"{letter}={n}" for letter, n in zip("NCVD", shape, strict=True))


def _fits(shape: Shape, banks: int, device: torch.device) -> bool:
    """Return whether plain PyTorch can hold the scores of all pixels in half of the free memory."""
    need = shape[0] * shape[1] * shape[2] * banks * DENSE_BYTES
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return need < torch.cuda.mem_get_info(device)[0] / 2
    try:
        return need < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (ValueError, OSError):
        return True


def dtypes(device: torch.device) -> list[torch.dtype]:
    return [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
