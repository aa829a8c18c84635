"""Crops that are drawn for rare classes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctt.data.balance import class_pixels
from ctt.data.digits import Digits
from ctt.data.loader import DrawSampler, ViewDataset
from ctt.data.rare import RareClasses, pixel_of
from ctt.data.views import GeometricView
from ctt.settings import Settings, update
from ctt.train.distributed import World
from ctt.train.loop import train
from ctt.train.plan import Plan

PIXELS = torch.tensor([[90, 0, 5], [100, 0, 0], [99, 1, 0], [100, 0, 0]])


def test_counts_are_those_of_the_masks() -> None:
    dataset = Digits(12, 2)
    names = dataset.train_ids()
    found = class_pixels(dataset, names, 0)
    for name, row in zip(names, found, strict=True):
        label = dataset.label(name)
        assert row.tolist() == [int((label == c).sum()) for c in range(11)]
    assert torch.equal(found, class_pixels(dataset, names, 2))


def test_rare_classes_are_drawn_more_often() -> None:
    rare = RareClasses(PIXELS, 0.5, seed=3)
    drawn = [rare(draw) for draw in range(4000)]
    assert drawn == [rare(draw) for draw in range(4000)]
    chosen = [d for d in drawn if d is not None]
    assert len(chosen) == pytest.approx(2000, abs=150)
    assert all(PIXELS[image, wanted] > 0 for image, wanted in chosen)
    frequency = PIXELS.sum(0) / PIXELS.sum()
    expected = ((1 - frequency.double()) / 0.01).softmax(0)
    for c in range(3):
        share = sum(wanted == c for _, wanted in chosen) / len(chosen)
        assert share == pytest.approx(float(expected[c]), abs=0.04)


def test_without_labels_nothing_is_drawn_for_a_class() -> None:
    assert RareClasses(torch.zeros(3, 2, dtype=torch.int64), 1.0, 0)(5) is None
    assert pixel_of(torch.full((3, 3), 255), 1, 0) is None


@pytest.mark.parametrize("crop", [(24, 32), (90, 70)])
def test_the_crop_shows_the_pixel(crop: tuple[int, int]) -> None:
    view = GeometricView(crop, (0.6, 1.7), True, 10.0, 0.1, (0.5, 0.5, 0.5))
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    seen, places = 0, set()
    for seed in range(60):
        label = torch.zeros(60, 80, dtype=torch.uint8)
        row, column = (7 * seed) % 57, (13 * seed) % 77
        label[row : row + 3, column : column + 3] = 1  # which no reduction skips
        _, found = view(image, label, seed, (row + 1, column + 1))
        seen += bool((found == 1).any())
        if (found == 1).any():
            places.add(tuple((found == 1).nonzero()[0].tolist()))
    assert seen >= 59
    assert len(places) > 40


def test_batches_hold_the_images_that_were_drawn_for_a_class() -> None:
    dataset = Digits(12, 2)
    names = dataset.train_ids()
    pixels = class_pixels(dataset, names, 0)
    rare = RareClasses(pixels, 1.0, seed=0)
    view = GeometricView((8, 8), (1.0, 1.0), False, 0.0, 0.0, (0.5, 0.5, 0.5))
    views = ViewDataset(dataset, names, view, True, 0, "labeled", rare)
    own = [list(DrawSampler(len(names), 2, 0, 20, 0, "labeled", r, 2, rare)) for r in (0, 1)]
    joined = list(DrawSampler(len(names), 4, 0, 20, 0, "labeled", rare=rare))
    assert [a + b for a, b in zip(*own, strict=True)] == joined
    for batch in joined:
        for index, draw in batch:
            chosen = rare(draw)
            assert chosen is not None
            assert chosen[0] == index
            label: Tensor = views[index, draw][1]
            assert (label == chosen[1]).any()


def test_processes_read_their_share_of_the_masks(tiny: Settings) -> None:
    change = {"data": {"rare_crops": 0.5}, "labeled": {"class_weights": "enet"}}
    plan = Plan.of(update(tiny.with_method("supervised"), change, "test"), None)
    whole = plan.counted(World())
    assert whole.class_pixels is not None
    parts: list[Tensor] = []

    class Part(World):
        def total(self, values: Tensor) -> Tensor:
            parts.append(values)
            return values

    for rank in (0, 1):
        plan.counted(Part(rank, 2))
    assert torch.equal(parts[0] + parts[1], whole.class_pixels)
    assert all((part.sum(dim=1) > 0).sum() == 3 for part in parts)
    assert len(whole.settings.labeled.weights) == 11


def test_a_run_with_rare_crops(tiny: Settings, tmp_path: Path) -> None:
    change = {"data": {"rare_crops": 0.5}, "train": {"iterations": 2, "eval_every": 2}}
    settings = update(tiny.with_method("supervised"), change, "test")
    first = train(settings, out=tmp_path / "one")
    assert first["iterations"] == 2
