"""`ema_update_`: every backend against the formula in float64."""

import importlib
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctt.ops import available_backends, ema_update_, reference
from tests.ops.common import DTYPES, assert_accurate, examples, runs, skip_unfit

ema = importlib.import_module("ctt.ops.ema")
RUNS = pytest.mark.parametrize(("backend", "device"), runs("ema_update_"))
SHAPES = [(), (0,), (1,), (123,), (19, 3), (64, 7, 3, 3), (8580,), (2, 0, 3)]


def tensors(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], device: str, seed: int
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=g).to(device, dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes)
    ]


def check(
    backend: str, teacher: list[Tensor], student: list[Tensor], decay: float | Tensor
) -> None:
    plain, truth = [t.clone() for t in teacher], [t.double() for t in teacher]
    before = [s.clone() for s in student]
    ema_update_(teacher, student, decay, backend=backend)
    reference.ema_update_(plain, student, decay)
    reference.ema_update_(truth, [s.double() for s in student], decay)
    for t, p, want in zip(teacher, plain, truth, strict=True):
        assert_accurate(t, want, p, 2)
    for s, was in zip(student, before, strict=True):
        assert torch.equal(s, was)


@RUNS
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 0.9999, 1.0, 1, 0])
def test_equals_the_formula(backend: str, device: str, decay: float) -> None:
    teacher = tensors(SHAPES, [torch.float32], device, 0)
    check(backend, teacher, tensors(SHAPES, [torch.float32], device, 1), decay)


@RUNS
@pytest.mark.parametrize("teacher", DTYPES, ids=str)
@pytest.mark.parametrize("student", DTYPES, ids=str)
def test_dtypes(backend: str, device: str, teacher: torch.dtype, student: torch.dtype) -> None:
    skip_unfit(backend, device, student)
    skip_unfit(backend, device, teacher)
    pair = tensors(SHAPES, [teacher], device, 0), tensors(SHAPES, [student], device, 1)
    check(backend, *pair, 0.99)


@RUNS
def test_dtypes_in_one_call(backend: str, device: str) -> None:
    kinds = [torch.float32, torch.float64, torch.float16]
    teacher = tensors(SHAPES * 2, kinds, device, 0)
    check(backend, teacher, tensors(SHAPES * 2, kinds[:2], device, 1), 0.99)


@RUNS
@settings(max_examples=examples(15))
@given(data=st.data())
def test_any_lists(backend: str, device: str, data: st.DataObject) -> None:
    side = st.integers(0, 40)
    shapes = data.draw(st.lists(st.lists(side, max_size=3).map(tuple), max_size=6), "shapes")
    kinds = st.lists(st.sampled_from((torch.float32, torch.float64)), min_size=1, max_size=3)
    teacher = tensors(shapes, data.draw(kinds, "teacher"), device, 0)
    student = tensors(shapes, data.draw(kinds, "student"), device, 1)
    check(backend, teacher, student, data.draw(st.floats(0, 1), "decay"))


@RUNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decay_as_a_tensor(backend: str, device: str, dtype: torch.dtype) -> None:
    """It is read at the time of the call and not earlier."""
    decay = torch.zeros((), dtype=dtype, device=device)
    teacher = tensors(SHAPES, [torch.float32], device, 0)
    student = tensors(SHAPES, [torch.float32], device, 1)
    for value in (0.99, 0.5, 1.0, 0.0):
        decay.fill_(value)
        check(backend, teacher, student, decay)


@RUNS
def test_strided_and_unaligned_memory(backend: str, device: str) -> None:
    def odd(seed: int) -> list[Tensor]:
        plain = tensors([(40, 6, 3, 3), (33, 20), (101,)], [torch.float32], device, seed)
        return [plain[0].to(memory_format=torch.channels_last), plain[1].T, plain[2][1:]]

    def even(seed: int) -> list[Tensor]:
        return [x.clone(memory_format=torch.contiguous_format) for x in odd(seed)]

    check(backend, odd(0), odd(1), 0.9)
    check(backend, even(0), odd(1), 0.9)
    check(backend, odd(0), even(1), 0.9)


@RUNS
def test_memory_around_is_left_alone(backend: str, device: str) -> None:
    whole = torch.randn(200, device=device)
    before = whole.clone()
    check(
        backend,
        [whole[3:50], whole[77:150]],
        [torch.ones(47).to(device), torch.ones(73).to(device)],
        0.5,
    )
    for part in (slice(0, 3), slice(50, 77), slice(150, 200)):
        assert torch.equal(whole[part], before[part])


@RUNS
def test_parameters_and_repeated_calls(backend: str, device: str) -> None:
    """Parameters that take gradient, the same lists again, and then storage that has moved."""
    student = torch.nn.Linear(19, 7).to(device)
    teacher = torch.nn.Linear(19, 7).to(device)
    lists = list(teacher.parameters()), list(student.parameters())
    versions = [t._version for t in lists[0]]
    for _ in range(3):
        truth = [t.detach().double() for t in lists[0]]
        reference.ema_update_(truth, [s.detach().double() for s in lists[1]], 0.9)
        ema_update_(*lists, 0.9, backend=backend)
        for t, want in zip(lists[0], truth, strict=True):
            torch.testing.assert_close(t.detach().double(), want, rtol=1e-6, atol=1e-6)
    assert all(t.grad_fn is None and t.requires_grad for t in lists[0])
    assert [t._version for t in lists[0]] > versions
    for t in lists[0]:
        t.data = torch.randn_like(t)
    student.weight.data = torch.randn_like(student.weight)
    truth = [t.detach().double() for t in lists[0]]
    reference.ema_update_(truth, [s.detach().double() for s in lists[1]], 0.9)
    ema_update_(*lists, 0.9, backend=backend)
    for t, want in zip(lists[0], truth, strict=True):
        torch.testing.assert_close(t.detach().double(), want, rtol=1e-6, atol=1e-6)


@RUNS
def test_nothing_to_average(backend: str, device: str) -> None:
    ema_update_([], [], 0.9, backend=backend)
    empty = torch.empty(0, device=device)
    ema_update_([empty], [empty.clone()], 0.9, backend=backend)


def linear(bias: bool) -> torch.nn.Module:
    return torch.nn.Linear(2, 2, bias=bias)


def test_errors_name_the_argument() -> None:
    good = [torch.zeros(3)]
    ema_update_(good, [torch.ones(3)], 0.9)
    bad = [
        (TypeError, "element 0", (good, [torch.ones(3).long()], 0.9)),
        (TypeError, "element 0", ([torch.ones(3).long()], good, 0.9)),
        (TypeError, "element 0", ([None], good, 0.9)),
        (ValueError, "teacher and student", (good, [], 0.9)),
        (ValueError, "element 0", (good, [torch.ones(4)], 0.9)),
        (ValueError, "element 1", (good * 2, [torch.ones(3), torch.ones(3, device="meta")], 0.9)),
        (ValueError, "decay", (good, good, 1.1)),
        (ValueError, "decay", (good, good, -0.1)),
        (ValueError, "decay", (good, good, float("nan"))),
        (ValueError, "decay", (good, good, torch.ones(1))),
        (ValueError, "decay", (good, good, torch.ones((), dtype=torch.int64))),
        (TypeError, "decay", (good, good, "0.9")),
        (TypeError, "teacher must be an iterable", (good[0], good[0], 0.9)),
        (TypeError, "student must be an iterable", (good, torch.nn.Linear(1, 1), 0.9)),
        (ValueError, "the teacher has 'bias'", (*map(linear, (True, False)), 0.9)),
        (ValueError, "the student has 'bias'", (*map(linear, (False, True)), 0.9)),
        (TypeError, "element 0", ([good[0].to(torch.complex64)] * 2, good * 2, 0.9)),
        (ValueError, "resolve_neg", (good, [torch._neg_view(torch.ones(3))], 0.9)),
    ]
    for error, name, arguments in bad:
        with pytest.raises(error, match=rf"^ema_update_: .*{name}"):
            ema_update_(*arguments)
    with pytest.raises(ValueError, match="backend must be one of"):
        ema_update_(good, [torch.ones(3)], 0.9, backend="fastest")


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_a_layout_that_changes_between_calls_is_seen(backend: str) -> None:
    """The object, its address and its bytes stay the same when `data` is transposed in place."""
    if backend not in available_backends()["ema_update_"]:
        pytest.skip(f"{backend} cannot run here")
    teacher = torch.nn.Parameter(torch.zeros(3, 3))
    student = torch.nn.Parameter(torch.arange(9.0).view(3, 3))
    ema_update_([teacher], [student], 0.0, backend=backend)
    student.data = student.data.t()
    ema_update_([teacher], [student], 0.0, backend=backend)
    assert torch.equal(teacher, student)
    teacher, student = torch.zeros(2, 3), torch.ones(2, 3)
    ema_update_([teacher], [student], 0.0, backend=backend)
    student.data = student.data.view(3, 2)
    with pytest.raises(ValueError, match="must have one shape"):
        ema_update_([teacher], [student], 0.0, backend=backend)


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))


def expected(teacher: torch.nn.Module, student: torch.nn.Module) -> dict[str, Tensor]:
    """Averages with a decay of 0.9; the student's where a value is no floating-point number."""
    ours = {name: t.clone() for name, t in teacher.state_dict().items()}
    for name, s in student.state_dict().items():
        if s.is_floating_point():
            reference.ema_update_([ours[name]], [s], 0.9)
        else:
            ours[name] = s.clone()
    return ours


@pytest.mark.parametrize(
    "form",
    [
        lambda net: net,
        lambda net: net.state_dict(),
        lambda net: net.state_dict().values(),
        lambda net: (x for x in net.state_dict().values()),
    ],
    ids=["module", "state dict", "its values", "generator"],
)
def test_whole_networks_in_every_form(form: Any) -> None:
    teacher, student = network(), network()
    student(torch.randn(2, 3, 5, 5))
    want = expected(teacher, student)
    for _ in range(2):
        ema_update_(form(teacher), form(student), 0.9)
        for name, value in teacher.state_dict().items():
            torch.testing.assert_close(value, want[name])
        want = expected(teacher, student)


def test_traced_with_integer_buffers() -> None:
    torch._dynamo.reset()
    teacher, student = network(), network()
    student(torch.randn(2, 3, 5, 5))
    want = expected(teacher, student)
    ours, theirs = (list(x.state_dict().values()) for x in (teacher, student))
    update = torch.compile(ema_update_, fullgraph=True, backend="aot_eager")
    update(ours, theirs, 0.9)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, want[name])


def test_compiled_updates_refuse_what_eager_ones_refuse() -> None:
    torch._dynamo.reset()
    update = torch.compile(ema_update_, backend="aot_eager")
    whole, three, one = torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.ones(1)
    with pytest.raises(TypeError, match="element 0 must be floating point"):
        update([whole], [three], 0.5)
    with pytest.raises(ValueError, match="element 0 must have one shape"):
        update([whole], [one.long()], 0.5)
    assert whole.tolist() == [0, 0, 0]


def test_as_the_averaging_function_of_swa_utils() -> None:
    student = network()
    model = torch.optim.swa_utils.AveragedModel(
        student, multi_avg_fn=lambda t, s, n: ema_update_(t, s, 0.9), use_buffers=True
    )
    for step in range(3):
        student(torch.randn(2, 3, 5, 5))
        want = expected(model.module, student) if step else student.state_dict()
        model.update_parameters(student)
        for name, value in model.module.state_dict().items():
            torch.testing.assert_close(value, want[name])


@pytest.mark.parametrize("kind", [numpy.float32, numpy.float64, numpy.array, Fraction])
def test_decay_of_other_kinds_of_scalar(kind: Any) -> None:
    teacher = torch.zeros(3)
    ema_update_([teacher], [torch.ones(3)], kind(0.5))
    assert (teacher == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_teachers_that_cannot_move_are_told_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ema, "_warned", set())
    teacher = torch.ones(9, dtype=dtype)
    student = teacher * 1.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema_update_([teacher.float()], [student], 0.999)
        ema_update_([teacher.clone()], [student], 0.5)
        ema_update_([teacher], [student], 1.0)
    with pytest.warns(UserWarning, match="keep teachers in float32"):
        ema_update_([teacher], [student], 0.999)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            ema_update_([teacher], [student], 0.999)
    assert (teacher == 1).all()


@pytest.mark.parametrize("backend", available_backends("cpu")["ema_update_"])
def test_tied_weights_are_averaged_once(backend: str) -> None:
    teacher, student = (torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in "ab")) for _ in "ts")
    for network in (teacher, student):
        network[1].weight = network[0].weight
    want = torch.lerp(teacher[0].weight, student[0].weight, 0.5).detach()
    first, second = (list(network.state_dict().values()) for network in (teacher, student))
    ema_update_(first, second, 0.5, backend=backend)
    torch.testing.assert_close(teacher[0].weight.detach(), want)
    with pytest.raises(ValueError, match="elements 0 and 2 are one teacher"):
        ema_update_(first, [x.clone() for x in second], 0.5, backend=backend)


def test_an_iterator_that_is_used_up_is_told() -> None:
    """Every update but the first would do nothing."""
    teacher, student = (torch.nn.Linear(2, 2).parameters() for _ in "ts")
    ema_update_(teacher, student, 0.5)
    with pytest.raises(ValueError, match="teacher is an iterator without tensors"):
        ema_update_(teacher, student, 0.5)
    ema_update_([], [], 0.5)


def test_inside_a_transform_it_is_refused() -> None:
    def loss(x: Tensor) -> Tensor:
        ema_update_([x.clone()], [x], 0.5)
        return x.sum()

    with pytest.raises(RuntimeError, match=r"ema_update_ cannot run inside torch\.func\.grad"):
        torch.func.grad(loss)(torch.ones(3))
