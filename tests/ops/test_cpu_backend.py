"""What is special to the C++ kernels; the shared grid checks what all backends have in common."""

import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctt.ops import class_topk, ema_update_, info_nce, pair_info_nce, queue_push_, reference
from ctt.ops._registry import OPERATIONS
from ctt.ops.backends import cpu

pytestmark = pytest.mark.skipif(
    cpu.why_not("info_nce", torch.device("cpu")) is not None,
    reason=str(cpu.why_not("info_nce", torch.device("cpu"))),
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Error allowed at the least, relative to the largest value: some roundings of the arithmetic.
ROUNDING = {
    torch.float32: 1e-6,
    torch.float64: 1e-14,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def with_gradient(operation, query: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    leaf = query.detach().requires_grad_()
    loss = operation(leaf, *args, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


def error(value: Tensor, truth: Tensor) -> float:
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max().clamp(min=1e-30)
    return float((value.double() - truth).abs().max() / scale)


def check_contrast(name: str, query: Tensor, label: Tensor, keys, count, positive=None, **options):
    """Loss at most twice, gradient at most three times as wrong as the plain formula's."""

    def arguments(x: Tensor):
        if name == "info_nce":
            return (label, keys.to(x.dtype), count)
        return (
            positive.to(x.dtype),
            label,
            [(k.to(x.dtype), n) for k, n in zip(keys, count, strict=True)],
        )

    ours = {"info_nce": info_nce, "pair_info_nce": pair_info_nce}[name]
    plain = getattr(reference, name)
    loss, grad = with_gradient(ours, query, *arguments(query), backend="cpu", **options)
    assert grad.shape == query.shape
    assert grad.dtype == query.dtype
    wide = query.double()
    # keys and positive rounded as the backend sees them
    rounded = tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in arguments(query)
    )
    if name == "pair_info_nce":
        rounded = (*rounded[:2], [(k.double(), n) for k, n in rounded[2]])
    truth = with_gradient(plain, wide, *rounded, **options)
    naive = with_gradient(plain, query, *arguments(query), **options)
    loss_rounding = ROUNDING[torch.float64 if query.dtype == torch.float64 else torch.float32]
    assert error(loss, truth[0]) <= 2 * error(naive[0], truth[0]) + loss_rounding
    assert error(grad, truth[1]) <= 3 * error(naive[1], truth[1]) + ROUNDING[query.dtype]
    return grad


def problem(n: int, c: int, v: int, d: int, dtype: torch.dtype, seed: int = 0):
    torch.manual_seed(seed)
    query, label = torch.randn(n, d).to(dtype), torch.randint(-1, c + 1, (n,))
    return query, label, unit(c, v, d).to(dtype), torch.randint(0, v + 1, (c,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["class", "mean", "none"])
@pytest.mark.parametrize(
    ("n", "c", "v", "d"),
    [(1, 2, 1, 1), (47, 19, 7, 19), (49, 3, 33, 64), (123, 150, 2, 31), (200, 21, 40, 256)],
)
def test_contrast(n, c, v, d, reduction, dtype):
    query, label, keys, count = problem(n, c, v, d, dtype)
    mask = torch.rand(n) < 0.8
    options = {"temperature": 0.1, "mask": mask, "reduction": reduction}
    for held in (None, count):
        grad = check_contrast("info_nce", query, label, keys, held, **options)
        out = ~mask | (label < 0) | (label >= c)
        assert (grad[out] == 0).all()
    banks, counts = [keys, unit(c, v + 3, d)], [count, torch.randint(0, v + 4, (c,))]
    positive = torch.randn(n, d)
    check_contrast("pair_info_nce", query, label, banks, counts, positive, **options)


@pytest.mark.parametrize("temperature", [1e-4, 0.01, 0.07, 10.0, 1e4])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_extreme_temperature_and_keys_that_are_not_normalised(temperature, scale):
    query, label, keys, _ = problem(200, 5, 16, 32, torch.float32)
    full = torch.full((5,), 16)
    options = {"temperature": temperature, "reduction": "none"}
    check_contrast("info_nce", query, label, scale * keys, full, **options)
    check_contrast(
        "pair_info_nce", query, label, [scale * keys], [full], torch.randn(200, 32), **options
    )


@pytest.mark.parametrize("magnitude", [1e-13, 1e-12, 1e-9, 1e15, 1e30])
def test_length_of_the_query(magnitude):
    query, label, keys, count = problem(64, 4, 8, 16, torch.float32)
    grad = with_gradient(
        info_nce, magnitude * query, label, keys, count, temperature=0.5, backend="cpu"
    )[1]
    truth = with_gradient(
        reference.info_nce, (magnitude * query).double(), label, keys, count, temperature=0.5
    )[1]
    torch.testing.assert_close(
        grad.double(), truth, rtol=1e-4, atol=1e-6 * float(truth.abs().max())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_anywhere_in_memory(dtype):
    n, d, c = 130, 48, 7
    _, label, keys, count = problem(n, c, 9, d, dtype)
    feature_map = torch.randn(1, d, 10, 13).to(dtype)  # (1, D, h, w)
    wide = torch.randn(n, 2 * d).to(dtype)
    for query in (
        feature_map.permute(0, 2, 3, 1).reshape(n, d),
        wide[:, ::2],
        wide[:, d:],
        wide.flip(0)[:, :d],
        wide[:1, :d].expand(n, d),
    ):
        options = {"temperature": 0.2, "mask": torch.rand(n) < 0.5}
        check_contrast("info_nce", query, label, keys, count, **options)
        check_contrast("pair_info_nce", query, label, [keys], [count], wide[:, 1::2], **options)
        check_contrast("info_nce", query, label, keys.mT.contiguous().mT, count, **options)


def test_what_does_not_count_does_not_leak():
    query, label, keys, count = problem(300, 6, 10, 32, torch.float32)
    mask = torch.rand(300) < 0.5
    clean = with_gradient(info_nce, query, label, keys, count, temperature=0.1, mask=mask)
    query[~mask | (label < 0)] = math.nan
    query[label == 6] = math.inf
    for c, held in enumerate(count.tolist()):
        keys[c, held:] = math.nan
    dirty = with_gradient(
        info_nce, query, label, keys, count, temperature=0.1, mask=mask, backend="cpu"
    )
    torch.testing.assert_close(dirty, clean, rtol=1e-5, atol=1e-8)


def test_a_nan_that_counts_is_not_hidden():
    query, label, keys, _ = problem(60, 3, 4, 8, torch.float32)
    keys[0, 0] = math.nan
    assert info_nce(query, label, keys, temperature=0.1, backend="cpu").isnan()


def test_nothing_counts():
    query, label, keys, count = problem(60, 3, 4, 8, torch.float32)
    for chosen, held in ((torch.full((60,), 255), count), (label, torch.tensor([0, 3, 0]))):
        loss, grad = with_gradient(
            info_nce, query, chosen, keys, held, temperature=0.1, backend="cpu"
        )
        assert loss == 0
        assert (grad == 0).all()


def test_threads_change_nothing_but_rounding(threads):
    query, label, keys, count = problem(2000, 19, 16, 64, torch.float32)
    check_contrast("info_nce", query, label, keys, count, temperature=0.1)
    confidence = torch.rand(2000)
    torch.testing.assert_close(
        class_topk(confidence, label, 9, 19, backend="cpu"),
        reference.class_topk(confidence, label, 9, 19),
    )


@pytest.mark.parametrize("name", ["info_nce", "pair_info_nce"])
def test_contrast_with_keys_beyond_the_cache(name, threads):
    """Then pixels come in larger groups, by how many there are for each thread."""
    query, label, keys, _ = problem(1000, 4, 300, 456, torch.float32)
    count = torch.full((4,), 300)
    args = (keys, count) if name == "info_nce" else ([keys], [count], torch.randn(1000, 456))
    for pixels in (1000, 97):
        part = [x[:pixels] for x in (query, label)]
        more = args if name == "info_nce" else (*args[:2], args[2][:pixels])
        check_contrast(name, *part, *more, temperature=0.1)


def test_large():
    query, label, keys, count = problem(33_620, 21, 3, 16, torch.float32)
    check_contrast("info_nce", query, label, keys, count, temperature=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_topk(dtype, threads):
    for seed in range(20):
        torch.manual_seed(seed)
        n, c, k = (int(torch.randint(1, top, ())) for top in (3000, 30, 90))
        confidence = (torch.randn(n) * 8).round().div(8).to(dtype)
        for special in (math.nan, -0.0, math.inf, -math.inf):
            confidence[torch.rand(n) < 0.05] = special
        label, valid = torch.randint(-2, c + 2, (n,)), torch.rand(n) < 0.8
        for chosen in (None, valid):
            torch.testing.assert_close(
                class_topk(confidence, label, k, c, valid=chosen, backend="cpu"),
                reference.class_topk(confidence, label, k, c, chosen),
            )


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_class_topk_keeps_the_best_when_its_buffers_overflow(order):
    n = 5000
    confidence = {
        "rising": torch.linspace(0, 1, n),
        "falling": torch.linspace(1, 0, n),
        "equal": torch.ones(n),
    }[order]
    label = torch.arange(n) % 2
    torch.testing.assert_close(
        class_topk(confidence, label, 10, 2, backend="cpu"),
        reference.class_topk(confidence, label, 10, 2),
    )


def test_class_topk_strided_and_k_beyond_the_pixels():
    confidence, label = torch.rand(40, 3)[:, 1], torch.randint(0, 3, (40, 2))[:, 0]
    torch.testing.assert_close(
        class_topk(confidence, label, 1000, 3, backend="cpu"),
        reference.class_topk(confidence, label, 1000, 3),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_dtype", DTYPES, ids=str)
def test_queue_push(dtype, key_dtype):
    for seed in range(10):
        torch.manual_seed(seed)
        n, c, v, d, k = (int(torch.randint(1, top, ())) for top in (50, 9, 12, 70, 30))
        features = torch.randn(n, d).to(dtype) if seed % 2 else torch.randn(d, n).to(dtype).T
        features[0] = 0
        keys = torch.randn(c, v, d).to(key_dtype)
        if seed % 3 == 0:
            keys = keys.mT.contiguous().mT
        state = (keys, torch.randint(0, v + 1, (c,)), torch.randint(0, v, (c,)))
        expected = tuple(x.clone() for x in state)
        index = torch.randint(-3, n + 3, (c, k))
        queue_push_(*state, features, index, backend="cpu")
        reference.queue_push_(*expected, features, index)
        torch.testing.assert_close(state, expected)


@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_ema(teacher_dtype, student_dtype):
    torch.manual_seed(0)
    shapes = [(), (1,), (3, 5), (0,), (70_001,)]
    teacher = [torch.randn(s).to(teacher_dtype) for s in shapes]
    teacher += [
        torch.randn(4, 5, 6, 7).to(teacher_dtype, memory_format=torch.channels_last),
        torch.randn(9, 8).to(teacher_dtype).T,
        torch.randn(9, 8).to(teacher_dtype)[:, ::2],
    ]
    student = [torch.randn_like(t).to(student_dtype) for t in teacher]
    student[-2] = student[-2].contiguous()
    expected = [t.clone() for t in teacher]
    for decay in (0.0, 0.99, torch.tensor(0.5), 1.0):
        ema_update_(teacher, student, decay, backend="cpu")
        reference.ema_update_(expected, student, float(decay))
        torch.testing.assert_close(teacher, expected)


def test_every_half_and_bfloat16_survives_a_copy():
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
        every = bits.view(dtype)
        widened = torch.zeros(1 << 16)
        ema_update_([widened], [every], 0.0, backend="cpu")
        finite = every.isfinite()  # 0 * inf is NaN
        assert torch.equal(widened[finite], every[finite].float())
        back = torch.zeros(1 << 16, dtype=dtype)
        ema_update_([back], [widened], 0.0, backend="cpu")
        assert torch.equal(back[finite], every[finite])


def test_rounding_to_half_is_to_nearest_even():
    torch.manual_seed(0)
    values = torch.randn(100_000) * torch.logspace(-9, 6, 100_000)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = torch.zeros(100_000, dtype=dtype)
        ema_update_([rounded], [values], 0.0, backend="cpu")
        assert torch.equal(rounded, values.to(dtype))


def test_autograd_notices_the_writes():
    teacher = torch.randn(5)
    weight = torch.randn(5, requires_grad=True)
    product = (weight * teacher).sum()
    ema_update_([teacher], [torch.randn(5)], 0.5, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensors():
    with torch.inference_mode():
        teacher = torch.zeros(5)
        ema_update_([teacher], [torch.ones(5)], 0.5, backend="cpu")
        assert torch.equal(teacher, torch.full((5,), 0.5))


def test_forked_worker_does_not_hang():
    query, label, keys, count = problem(300, 5, 8, 32, torch.float32)
    here = float(info_nce(query, label, keys, count, temperature=0.1, backend="cpu"))
    loader = torch.utils.data.DataLoader(
        _InWorker(), num_workers=1, multiprocessing_context=multiprocessing.get_context("fork")
    )
    assert float(next(iter(loader))) == pytest.approx(here, rel=1e-5)


class _InWorker(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> float:
        query, label, keys, count = problem(300, 5, 8, 32, torch.float32)
        return float(info_nce(query, label, keys, count, temperature=0.1, backend="cpu"))


def test_why_not_on_another_device():
    for operation in OPERATIONS:
        reason = cpu.why_not(operation, torch.device("cuda"))
        assert reason is not None
        assert "torch" in reason


SETS = ("base", "x86-64-v3", "x86-64-v4")
LOSS = """
import torch
from ctt import _cpu
from ctt.ops import info_nce
from tests.ops.common import contrast

case = contrast(200, 5, 9, 37)
query = case.query.requires_grad_()
loss = info_nce(query, case.label, case.keys, temperature=0.1, backend="cpu")
(grad,) = torch.autograd.grad(loss, query)
print(_cpu.instruction_set(), loss.item(), grad.square().sum().item())
"""


def test_a_lower_instruction_set_can_be_asked_for() -> None:
    instruction_set = getattr(cpu._cpu, "instruction_set", None)
    assert instruction_set is not None, "build the C++ kernels again"

    def run(asked: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LOSS]
        environment = os.environ | {"CTT_CPU_ISA": asked}
        root = Path(__file__).parents[2]
        return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)

    highest, *expected = run("").stdout.split()
    for name in (*SETS, "avx"):
        done = run(name)
        if name not in SETS or SETS.index(name) > SETS.index(highest):
            assert "CTT_CPU_ISA must be one of base, x86-64-v3 and x86-64-v4" in done.stderr
            continue
        used, *values = done.stdout.split()
        assert used == name
        for value, best in zip(values, expected, strict=True):
            assert float(value) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("name", SETS)
def test_the_contrast_holds_in_every_instruction_set(name: str) -> None:
    """Machines without AVX-512 run other code, with tiles of other sizes."""
    used = cpu._cpu.instruction_set()
    if SETS.index(name) > SETS.index(used):
        pytest.skip(f"this machine has no {name}")
    if name == used:
        pytest.skip(f"the other tests of this file use {name}")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "contrast and not instruction_set"]
    done = subprocess.run(
        [*command, __file__],
        env=os.environ | {"CTT_CPU_ISA": name},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


TWO_COPIES = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
import torch
from ctt import _cpu

loader = ExtensionFileLoader("elsewhere._cpu", sys.argv[1])
other = module_from_spec(spec_from_loader("elsewhere._cpu", loader))
loader.exec_module(other)
assert other.Layout is not _cpu.Layout
exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
for module in (_cpu, other) if exchange is not None else ():
    tensors = [torch.zeros(3)]
    assert module.Layout(exchange, tensors, tensors).matches(tensors, tensors)
"""


def test_two_copies_in_one_process(tmp_path: Path) -> None:
    """As where one version of the package is installed and another one is loaded from a folder."""
    copy = shutil.copy(cpu._cpu.__file__, tmp_path)
    command = [sys.executable, "-c", TWO_COPIES, copy]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
