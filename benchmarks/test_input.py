"""Training images as one loader process makes them: decode, resize, geometric view, crop.

The reference is the chain of published programs: decode, resize, rotate, pad and crop with Pillow.
The limit is decoding the image and its mask and nothing else. A loader process runs one thread, so
one thread is measured; images per second are 1000 over the milliseconds of an image.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row, Run, Setting
from ctt import data
from ctt.data.dataset import IGNORE, Dataset
from ctt.data.loader import ViewDataset
from ctt.data.options import DatasetOptions
from ctt.data.prepare import Prepared
from ctt.data.views import GeometricView
from tests.data import trees

CPU = torch.device("cpu")
IMAGES = 8
ROTATION, TRANSLATION = 10.0, 0.1


@dataclass(frozen=True)
class Case:
    """Files of a dataset, and the batches that training makes of them."""

    dataset: str
    image: tuple[int, int]
    crop: tuple[int, int]
    scale: tuple[float, float]
    resize: tuple[int, int] | None = None


SIZES = {
    "tiny": Case("voc", (40, 50), (32, 32), (0.5, 1.6)),
    "voc-321": Case("voc", (375, 500), (321, 321), (0.5, 1.6)),
    "cityscapes-256x512": Case("cityscapes", (1024, 2048), (256, 512), (1, 1), (512, 1024)),
}
PAPER = [name for name in SIZES if name != "tiny"]
GROUPS = {"default": PAPER, "paper": PAPER, "series": []}


def write_files(root: Path, case: Case) -> Dataset:
    """Write real photographs into a made-up dataset, so that decoding costs what it does."""
    from sklearn.datasets import load_sample_images

    if case.dataset == "voc":
        trees.write_voc(root, classic=2, augmented=IMAGES - 2, size=case.image)
    else:
        trees.write_cityscapes(root, train=IMAGES, size=case.image)
    dataset = data.open_dataset(case.dataset, root, DatasetOptions())
    height, width = case.image
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for i, name in enumerate(dataset.train_ids()):
        photo = photos[i % 2].rotate(i // 2 * 180).resize((width, height), Image.Resampling.BICUBIC)
        photo.save(dataset.files(name, labeled=False)[0], quality=92)
    return dataset


def pillow_chain(dataset: Dataset, case: Case, name: str, seed: int) -> tuple[Tensor, Tensor]:
    rng = random.Random(seed)
    files = dataset.files(name, labeled=True)
    with Image.open(files[0]) as file:
        image = file.convert("RGB")
    mask = Image.fromarray(dataset.label(name).numpy())
    if case.resize is not None:
        image = image.resize(case.resize[::-1], Image.Resampling.BILINEAR)
        mask = mask.resize(case.resize[::-1], Image.Resampling.NEAREST)
    factor, angle = rng.uniform(*case.scale), rng.uniform(-ROTATION, ROTATION)
    size = (round(image.width * factor), round(image.height * factor))
    image = image.resize(size, Image.Resampling.BILINEAR)
    mask = mask.resize(size, Image.Resampling.NEAREST)
    image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(124, 116, 104))
    mask = mask.rotate(angle, Image.Resampling.NEAREST, fillcolor=IGNORE)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    height, width = case.crop
    left = rng.randint(min(0, size[0] - width), max(0, size[0] - width))
    top = rng.randint(min(0, size[1] - height), max(0, size[1] - height))
    box = (left, top, left + width, top + height)
    pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1).contiguous()
    # what a crop adds is 0, which is a class: the mask is pasted onto ignored pixels
    padded = Image.new("L", (width, height), IGNORE)
    padded.paste(mask, (-left, -top))
    return pixels, torch.from_numpy(np.array(padded))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("one_thread")
def test_input(
    benchmark: BenchmarkFixture,
    tmp_path: Path,
    size: str,
    seconds: float,
    record: Callable[[list[Row]], None],
) -> None:
    case = SIZES[size]
    dataset = write_files(tmp_path / "data", case)
    names = dataset.train_ids()[:IMAGES]
    view = GeometricView(case.crop, case.scale, True, ROTATION, TRANSLATION, dataset.info.mean)

    def ours(cache: Path | None) -> ViewDataset:
        prepared = Prepared(dataset, case.resize, cache)
        return ViewDataset(prepared, names, view, True, 0, "benchmark")

    keys = [(i, i) for i in range(len(names))]
    plain, cached = ours(None), ours(tmp_path / "cache")
    runs: dict[str, Run] = {
        harness.REFERENCE: lambda: [pillow_chain(dataset, case, names[i], i) for i, _ in keys],
        "ctt": partial(plain.__getitems__, keys),
        "ctt, cached": partial(cached.__getitems__, keys),
        "decode alone": lambda: [dataset.pair(name) for name in names],
    }
    check(runs, dataset, case)
    bytes_each = [dataset.files(n, labeled=False)[0].stat().st_size for n in names]
    shape = f"{case.image[0]}x{case.image[1]}, {sum(bytes_each) // len(names) // 1000} kB"
    setting = Setting(
        "training image", size, f"{shape} -> {case.crop[0]}x{case.crop[1]}", "uint8", CPU
    )
    memory = {n: harness.extra_memory(run, CPU) for n, run in runs.items()}
    times = harness.divided(harness.time_in_turns(runs, CPU, seconds), len(names))
    record(harness.rows(setting, times, memory, times["decode alone"]))
    benchmark.pedantic(runs["ctt"], rounds=2)


def check(runs: dict[str, Run], dataset: Dataset, case: Case) -> None:
    """Raise where a way gives something else than crops with the classes of the masks."""
    classes = {*range(len(dataset.info.classes)), IGNORE}
    results = {name: run() for name, run in runs.items()}
    for name in (harness.REFERENCE, "ctt", "ctt, cached"):
        for image, label in results[name]:  # type: ignore[attr-defined]
            assert image.shape == (3, *case.crop), name
            assert label.shape == case.crop, name
            assert set(label.unique().tolist()) <= classes, name
    for one, other in zip(results["ctt"], results["ctt, cached"], strict=True):  # type: ignore[call-overload]
        assert all(map(torch.equal, one, other))
