"""What is kept for lists of tensors from one update of the teachers to the next."""

import gc

import pytest
import torch
from torch import Tensor

from ctt.ops import _plans, available_backends, ema_update_
from ctt.ops._plans import PythonLayout, plan_of

BACKENDS = available_backends("cpu")["ema_update_"]


@pytest.fixture(autouse=True, params=["as built", "in Python"])
def forget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layouts as this build reads them, and as one without a compiler does."""
    if request.param == "in Python":
        monkeypatch.setattr(_plans, "CppLayout", None)
    _plans._plans.clear()


def test_layouts_are_read_by_cpp_where_it_is_built() -> None:
    fast = _plans.CppLayout is not None and hasattr(Tensor, "__dlpack_c_exchange_api__")
    assert isinstance(plan_of(*([x] for x in pair(5))).layout, PythonLayout) is not fast


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


def test_the_same_tensors_in_other_lists_have_one_plan() -> None:
    teacher, student = pair(5)
    plan = plan_of([teacher], [student])
    assert plan_of((teacher,), (student,)) is plan
    assert plan_of([teacher], [torch.zeros(5)]) is not plan
    assert plan_of([teacher, teacher], [student, student]) is not plan


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_ends_with_its_tensors(backend: str) -> None:
    storage, zero = pair(12)
    for shape, dtype in (((12,), torch.float32), ((3, 2), torch.float32), ((6,), torch.float64)):
        size = torch.Size(shape).numel()
        teacher, student = (x.view(dtype)[:size].view(shape) for x in (storage, zero))
        teacher.fill_(1)
        for _ in range(2):
            ema_update_([teacher], [student], 0.5, backend=backend)
        assert (teacher == 0.25).all()
        assert len(_plans._plans) == 1
        del teacher, student
        gc.collect()
        assert not _plans._plans


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["elsewhere", "at the same address"])
def test_a_plan_follows_the_data(backend: str, place: str) -> None:
    storage = torch.ones(64)
    teacher, student = torch.nn.Parameter(storage[:40]), torch.nn.Parameter(torch.zeros(40))
    ema_update_([teacher], [student], 0.5, backend=backend)
    teacher.data = torch.ones(7) if place == "elsewhere" else storage[:7].fill_(1)
    student.data = student.data[:7]
    ema_update_([teacher], [student], 0.5, backend=backend)
    assert (teacher == 0.5).all()
    assert (storage[7:40] == 0.5).all()
    assert (storage[40:] == 1).all()


def test_each_part_of_a_layout_is_compared() -> None:
    teacher, student = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    memory = student.data
    plan = plan_of([teacher], [student])
    other_type = memory.view(torch.bfloat16)[:, :4]
    forms = [memory.t(), memory.clone(), other_type, memory[:, :2], memory[None]]
    for form in forms:
        student.data = form
        assert not plan.layout.matches([teacher], [student])
        student.data = memory
        assert plan.layout.matches([teacher], [student])
    assert not plan.layout.matches([teacher], [torch.ones(4, 4)])
    assert not plan.layout.matches([teacher, teacher], [student, student])


def test_plans_are_few() -> None:
    pairs = [pair(3) for _ in range(_plans.PLANS + 5)]
    for teacher, student in pairs:
        plan_of([teacher], [student])
    assert len(_plans._plans) == _plans.PLANS


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_views_of_one_memory_are_updated_in_turn(backend: str) -> None:
    teacher, student = pair(200_000)
    views = [[x, x.view(2, -1)] for x in (teacher, student)]
    ema_update_(*views, 0.5, backend=backend)
    assert (teacher == 0.25).all()
    ema_update_([teacher, teacher], [student, student], 0.5, backend=backend)
    assert (teacher == 0.125).all()  # one tensor under two names


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_the_write(backend: str) -> None:
    teacher, student = pair(5)
    with torch.inference_mode():
        inference, _ = pair(5)
        ema_update_([inference, inference.clone()], [student, student], 0.5, backend=backend)
    assert (inference == 0.5).all()
    weight = torch.ones(5, requires_grad=True)
    saved = (weight * teacher).sum()
    ema_update_([teacher], [student], 0.5, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
