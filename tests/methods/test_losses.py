import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.methods import losses
from ctt.models.base import Grid
from ctt.ops import MemoryBank
from tests.methods.grids import at_cells


def test_cross_entropy_is_the_mean_over_valid_pixels() -> None:
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 0] = torch.tensor([[math.log(3), 0.0, 5.0]])
    label = torch.tensor([[[0, 1, 255]]])
    expected = (-math.log(3 / 4) - math.log(1 / 2)) / 2
    assert losses.pixel_cross_entropy(
        logits, Grid(1), label, losses.valid_pixels(label)
    ).item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ignored_crops_give_0_not_nan(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    label = torch.full((2, 8, 8), 255)
    loss = losses.pixel_cross_entropy(logits, Grid(2), label, losses.valid_pixels(label))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_grid_takes_every_stride_th_label(dtype: torch.dtype) -> None:
    label = torch.tensor([[[0, 1, 2, 255], [4, 5, 6, 7]]], dtype=dtype)
    assert losses.to_grid(label, Grid(2)).tolist() == [[[0, 2]]]
    odd = torch.arange(321 * 17, dtype=dtype).view(1, 321, 17)
    grid = losses.to_grid(odd, Grid(8))
    assert grid.shape == (1, 41, 3)
    assert grid[0, 40, 2] == odd[0, 320, 16]


@pytest.mark.parametrize("stride", [1, 2, 7, 8, 14])
def test_patches_have_the_labels_of_their_middle(stride: int) -> None:
    values = torch.arange(45 * 33).view(1, 45, 33)
    found = losses.to_grid(values, Grid.of_patches(stride))
    assert torch.equal(found, at_cells(values, stride, (stride - 1) / 2))


def test_pixels_keep_their_features() -> None:
    maps = torch.randn(2, 5, 3, 4)
    pixels = losses.as_pixels(maps)
    assert torch.equal(pixels[1 * 12 + 2 * 4 + 3], maps[1, :, 2, 3])
    nhwc = maps.to(memory_format=torch.channels_last)
    assert losses.as_pixels(nhwc).data_ptr() == nhwc.data_ptr()


def test_confidence_weights() -> None:
    label = torch.tensor([[[0, 1], [255, 1]]])
    confidence = torch.tensor([[[0.9, 0.5], [0.99, 0.8]]])
    kept, weight = losses.weigh_pseudo_label(label, confidence, "none", 0.8)
    assert kept is label
    assert weight is None
    kept, weight = losses.weigh_pseudo_label(label, confidence, "threshold", 0.8)
    assert kept.tolist() == [[[0, 255], [255, 1]]]
    assert weight is None
    kept, weight = losses.weigh_pseudo_label(label, confidence, "uniform", 0.8)
    assert kept is label
    assert weight is not None
    assert weight.item() == pytest.approx(2 / 3)  # padding does not count


def test_masks_of_high_and_low_contrast() -> None:
    own = torch.tensor([0.9, 0.75, 0.5, 0.5])
    peer = torch.tensor([0.95, 0.99, 0.6, 0.4])
    high = losses.high_level_mask(own, 0.75)
    assert high.tolist() == [True, True, False, False]
    assert losses.low_level_mask(high, own, peer, True).tolist() == [False, False, True, False]
    assert losses.low_level_mask(high, own, peer, False).tolist() == [False, False, True, True]


def bank_with(counts: list[int], capacity: int = 3) -> MemoryBank:
    bank = MemoryBank(len(counts), capacity, 4)
    bank.keys.copy_(F.normalize(torch.randn(bank.keys.shape), dim=-1))
    bank.count.copy_(torch.tensor(counts))
    return bank


def test_a_class_that_never_appears_blocks_no_other() -> None:
    bank = bank_with([3, 0, 3, 2])
    full = bank_with([3, 3, 3, 3])
    both = {start: losses.usable_counts([bank, full], start) for start in ("class", "all")}
    assert [count.tolist() for count in both["class"]] == [[3, 0, 3, 0], [3, 3, 3, 3]]
    assert [count.tolist() for count in both["all"]] == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert losses.usable_counts([full], "all")[0].tolist() == [3, 3, 3, 3]
    features = torch.randn(1, 4, 2, 2, requires_grad=True)
    label = torch.tensor([[[0, 1], [2, 3]]])
    on = torch.ones(1, 2, 2, dtype=torch.bool)
    for start, is_on in (("class", True), ("all", False)):
        (count,) = losses.usable_counts([bank], start)
        loss = losses.high_level_contrast(features, label, on, bank, count, 0.5, "class")
        (grad,) = torch.autograd.grad(loss, features)
        assert (loss.item() > 0) == is_on
        # pixels of classes 1 and 3 wait for their queues
        moved = grad.abs().sum(dim=1) > 0
        assert moved.tolist() == [[[is_on, False], [is_on, False]]]


def low(features: Tensor, peer: Tensor, bank: MemoryBank) -> Tensor:
    label = torch.zeros(1, 1, 1, dtype=torch.int64)
    on = torch.ones(1, 1, 1, dtype=torch.bool)
    banks: list[tuple[Tensor, Tensor | None]] = [(bank.keys, bank.count), (bank.keys, bank.count)]
    return losses.low_level_contrast(features, peer, label, on, banks, 0.5, "class")


def test_low_contrast_by_hand_and_without_gradient_to_the_peer() -> None:
    bank = MemoryBank(2, 1, 2)
    bank.keys.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    bank.count.fill_(1)
    features = torch.tensor([2.0, 0.0]).reshape(1, 2, 1, 1).requires_grad_()
    peer = torch.tensor([3.0, 3.0]).reshape(1, 2, 1, 1).requires_grad_()
    loss = low(features, peer, bank)
    positive = math.exp(math.sqrt(0.5) / 0.5)
    negative = 2 * math.exp(0 / 0.5)  # the key of class 1, once in each bank
    assert loss.item() == pytest.approx(-math.log(positive / (positive + negative)), rel=1e-6)
    loss.backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0
    assert peer.grad is None


@pytest.mark.parametrize("reduction", ["class", "mean"])
def test_parts_of_the_contrast_add_up_to_the_mean(reduction: str) -> None:
    torch.manual_seed(0)
    banks = [MemoryBank(5, 4, 8) for _ in range(2)]
    for bank in banks:
        label = torch.randint(0, 4, (60,))  # class 4 has no key
        bank.push(torch.randn(60, 8), label, torch.rand(60), top_k=4, per_class=4)
    features, peer = torch.randn(2, 4, 8, 3, 3)
    label = torch.randint(0, 5, (4, 3, 3))
    label[:, 0, 0] = 255
    mask = torch.rand(4, 3, 3) < 0.7
    pairs = [(bank.keys, bank.count) for bank in banks]

    def both(part: slice, total: losses.Total | None) -> list[Tensor]:
        own = (label[part], mask[part])
        high = losses.high_level_contrast(
            features[part], *own, banks[0], banks[0].count, 0.5, reduction, total
        )
        low = losses.low_level_contrast(
            features[part], peer[part], *own, pairs, 0.5, reduction, total
        )
        return [high, low]

    counts: list[Tensor] = []
    everything = slice(0, 4)
    both(everything, lambda count: counts.append(count) or count)  # type: ignore[func-returns-value]
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        answers = iter(counts)
        parts.append(both(part, lambda _, answers=answers: next(answers)))  # type: ignore[misc]
    for expected, first, second in zip(both(everything, None), *parts, strict=True):
        torch.testing.assert_close(first + second, expected)


def test_small_probabilities_are_sharpened_too() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0]).view(1, 5, 1, 1)
    torch.testing.assert_close(losses.at_temperature(p, 0.5), p**2 / (p**2).sum())
    torch.testing.assert_close(losses.at_temperature(p, 1), p)
    spread = torch.full((1, 50, 1, 1), 0.02)  # to the power of 100 each would be 0
    torch.testing.assert_close(losses.at_temperature(spread, 0.01), spread)
    assert losses.at_temperature(torch.full((1, 2, 1, 1), torch.nan), 0.5).isnan().all()
