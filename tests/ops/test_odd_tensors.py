"""Tensors and modes that other people's programs bring along."""

import functools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ctt.ops import (
    MemoryBank,
    class_topk,
    ema_update_,
    info_nce,
    pair_info_nce,
    queue_push_,
)
from tests.ops.common import contrast, high_level, low_level, runs

EMA = pytest.mark.parametrize(("backend", "device"), runs("ema_update_"))
PUSH = pytest.mark.parametrize(("backend", "device"), runs("queue_push_"))
CONTRAST = pytest.mark.parametrize(("backend", "device"), runs("info_nce"))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[object]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sharded_tensors_are_averaged_each(backend: str, mesh: object) -> None:
    """Their own address is 0, for all of them."""
    from torch.distributed.tensor import distribute_tensor

    teacher = [distribute_tensor(torch.full((4, 4), x), mesh) for x in (1.0, 2.0)]  # type: ignore[arg-type]
    student = [distribute_tensor(torch.zeros(4, 4), mesh) for _ in teacher]  # type: ignore[arg-type]
    ema_update_(teacher, student, 0.5, backend=backend)
    assert [float(t.full_tensor()[0, 0]) for t in teacher] == [0.5, 1.0]


def test_tensors_without_memory_of_their_own_are_refused(mesh: object) -> None:
    """Their address is 0, which a kernel would read."""
    from torch.distributed.tensor import distribute_tensor

    def spread(x: Tensor) -> Tensor:
        found: Tensor = distribute_tensor(x, mesh)  # type: ignore[arg-type]
        return found

    case = contrast(12, 3, 4, 8)
    query, label, keys = spread(case.query), spread(case.label), spread(case.keys)
    with pytest.raises(TypeError, match=r"info_nce: a DTensor of shape \(12, 8\) has no memory"):
        info_nce(query, label, keys, temperature=0.5)
    with pytest.raises(TypeError, match="pair_info_nce: a DTensor"):
        pair_info_nce(case.query, query, case.label, [(case.keys, None)], temperature=0.5)
    with pytest.raises(TypeError, match=r"class_topk: a DTensor .* x.to_local\(\)"):
        class_topk(spread(torch.rand(12)), label, 2, 3)
    numbers = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match="queue_push_: a DTensor"):
        queue_push_(keys, numbers, numbers, case.query, torch.zeros(3, 2, dtype=torch.int64))
    freed = torch.randn(12, 8)
    freed.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="info_nce: a Tensor of shape"):
        info_nce(freed, case.label, case.keys, temperature=0.5)


def test_a_bank_of_a_group_of_processes_is_saved_by_its_state(mesh: object) -> None:
    bank = MemoryBank(2, 3, 4, group=dist.group.WORLD)
    with pytest.raises(TypeError, match=r"cannot be pickled; save its state_dict"):
        pickle.dumps(bank)
    assert pickle.loads(pickle.dumps(MemoryBank(2, 3, 4))).capacity == 3


def test_losses_of_tensors_without_data_have_their_shape() -> None:
    case = contrast(12, 3, 4, 8, device="meta")
    for loss in (high_level("auto"), low_level("auto")):
        query = case.query.detach().requires_grad_()
        loss(query, case, "none").sum().backward()
        assert query.grad is not None
        assert query.grad.shape == (12, 8)


@EMA
def test_compiled_and_eager_averages_of_tied_weights_agree(backend: str, device: str) -> None:
    def tensors(value: float) -> list[Tensor]:
        one = torch.full((3,), value, device=device)
        return [one, one, torch.full((3, 4), value, device=device).t()[:2]]

    update = functools.partial(ema_update_, backend=backend)
    compiled = torch.compile(update, backend="aot_eager", fullgraph=True)
    for order in ((update, compiled), (compiled, update)):
        teacher, student = tensors(1.0), tensors(0.0)
        for each in order:
            each(teacher, student, 0.5)
        assert [float(t.flatten()[0]) for t in teacher] == [0.25] * 3


@CONTRAST
def test_pixels_of_a_map_are_compiled(backend: str, device: str) -> None:
    """Those of one image are a view, and the gradient has a layout of its own."""
    case = contrast(30, 3, 4, 8, device=device)
    maps = case.query.t().contiguous().view(1, 8, 5, 6)
    x = maps.permute(0, 2, 3, 1).flatten(0, 2)
    assert not x.is_contiguous()
    full = torch.full((3,), 4, device=device)
    arguments = (x, None, case.label, [case.keys], [full], None, 0.1, None, "mean", True, False)
    torch.library.opcheck(
        torch.ops.ctt.contrast, (*arguments, backend), test_utils="test_faketensor"
    )


@CONTRAST
def test_another_default_device_and_type(backend: str, device: str) -> None:
    case = contrast(40, 3, 6, 8, device=device, partly=True)
    whole = contrast(40, 3, 6, 8, device=device)

    def run() -> list[Tensor]:
        query = case.query.clone().requires_grad_()
        loss = high_level(backend)(query, replace(case, mask=None), "none")
        (gradient,) = torch.autograd.grad(loss.sum(), query)
        every = high_level(backend)(whole.query, replace(whole, count=None), "class")
        return [loss.detach(), gradient, every]

    plain = run()
    with torch.device("meta"):
        found = run()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        narrow = run()
    finally:
        torch.set_default_dtype(before)
    for one, other, third in zip(plain, found, narrow, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@CONTRAST
def test_a_pixel_that_is_no_number_shows(backend: str, device: str) -> None:
    """A diverged network would train on unnoticed."""
    case = contrast(9, 3, 4, 8, device=device)
    case.query[4, 2] = torch.nan
    query = case.query.clone().requires_grad_()
    loss = high_level(backend)(query, case, "mean")
    (gradient,) = torch.autograd.grad(loss, query)
    assert loss.isnan()
    assert gradient[4].isnan().any()
    assert gradient[:4].isfinite().all()
    fine = contrast(9, 3, 4, 8, device=device)
    assert fine.positive is not None
    fine.positive[4, 2] = torch.nan
    assert low_level(backend)(fine.query, fine, "mean").isnan()


@CONTRAST
def test_gradients_of_many_at_once(backend: str, device: str) -> None:
    case = contrast(6, 3, 4, 8, device=device)
    query = case.query.clone().requires_grad_()
    loss = high_level(backend)(query, case, "none")
    each = [torch.autograd.grad(x, query, retain_graph=True)[0] for x in loss]
    (found,) = torch.autograd.grad(loss, query, torch.eye(6, device=device), is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack(each))


@CONTRAST
def test_views_that_negate_their_memory(backend: str, device: str) -> None:
    case = contrast(30, 3, 4, 8, device=device)
    negated = torch.complex(case.query, -case.query).conj().imag  # as case.query, by its bit
    assert negated.is_neg()
    loss = high_level(backend)
    torch.testing.assert_close(loss(negated, case, "mean"), loss(case.query, case, "mean"))


@PUSH
def test_pushes_of_views_that_negate_their_memory(backend: str, device: str) -> None:
    features = torch.randn(30, 8, device=device)
    negated = torch.complex(features, -features).conj().imag  # as features, by its bit
    values = torch.complex(torch.zeros(9, device=device), -torch.rand(9, device=device))
    values = values.conj().imag
    label = torch.zeros(9, dtype=torch.int64, device=device)
    index, _ = class_topk(values, label, 2, 1, backend=backend)
    assert index[0].tolist() == values.resolve_neg().topk(2).indices.tolist()
    keys = torch.zeros(1, 2, 8, device=device)
    count, cursor = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
    queue_push_(
        keys, count, cursor, negated, torch.tensor([[0, 1]], device=device), backend=backend
    )
    expected = nn.functional.normalize(features[:2], dim=1)
    torch.testing.assert_close(keys[0], expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_floats_of_8_bits_are_refused_by_name(dtype: torch.dtype) -> None:
    values, small = torch.rand(8, 4), torch.rand(8, 4).to(dtype)
    label, bank = torch.zeros(8, dtype=torch.int64), MemoryBank(2, 4, 4)
    keys, count = torch.rand(2, 4, 4), torch.full((2,), 4)
    calls: list[Callable[[], object]] = [
        lambda: info_nce(small, label, keys, count, temperature=0.1),
        lambda: info_nce(values, label, keys.to(dtype), count, temperature=0.1),
        lambda: pair_info_nce(small, values, label, [(keys, count)], temperature=0.1),
        lambda: class_topk(small[:, 0], label, 2, 2),
        lambda: bank.push(small, label, values[:, 0], top_k=2, per_class=2),
        lambda: ema_update_([small], [values], 0.9),
        lambda: ema_update_([values], [small], 0.9),
        lambda: ema_update_([values], [values], torch.ones(()).to(dtype)),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=f"floating.*got .*{dtype}"):
            call()
