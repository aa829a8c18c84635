"""PseudoSeg beside a rendering of its equations."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctt import models
from ctt.data.dataset import IGNORE
from ctt.methods.activation_maps import Refiner, on_grid, read
from ctt.methods.pseudoseg import PseudoSeg
from ctt.settings import Settings, update
from tests.methods.grids import at_cells, at_pixels
from tests.methods.rendering import SIZE, Scene, mean_cross_entropy, scores
from tests.train.steps import make

VIT = {"name": "vit", "backbone": "test_vit"}


def activation_maps(refiner: Refiner, last: Tensor, present: Tensor) -> Tensor:
    """Return Grad-CAM (B, C - 1, h, w) of the classes that are present, by autograd."""
    last = last.detach().requires_grad_()
    logits = last.mean(dim=(2, 3)) @ refiner.classifier.weight.T + refiner.classifier.bias
    maps = []
    for c in range(logits.shape[1]):
        (gradient,) = torch.autograd.grad(logits[:, c].sum(), last, retain_graph=True)
        weight = gradient.mean(dim=(2, 3), keepdim=True)
        maps.append((weight * last).sum(dim=1).relu() * present[:, c, None, None])
    found = torch.stack(maps, dim=1).detach()
    peak = found.flatten(2).max(dim=2).values[:, :, None, None]
    return torch.where(peak > 0, found / peak, 0)


def refined_maps(refiner: Any, stages: list[Tensor], present: Tensor, valid: Tensor) -> Tensor:
    """Return logits (B, C, h, w) of maps that attention refines."""
    last = stages[-1].detach()
    maps = activation_maps(refiner, last, present)
    finer = F.adaptive_avg_pool2d(stages[-2].detach(), last.shape[2:])  # type: ignore[arg-type]
    column = torch.cat([finer, last], dim=1)
    out = []
    for image, x, cells in zip(maps, column, valid, strict=True):
        x = x.flatten(1)  # (D, n)
        query, key = refiner.query.weight[..., 0, 0] @ x, refiner.key.weight[..., 0, 0] @ x
        attention = (query.T @ key / 128**0.5).exp() * cells.flatten()
        attention = attention / attention.sum(dim=1, keepdim=True)
        flat = image.flatten(1)
        out.append((flat + flat @ attention.T).view_as(image))
    joined = torch.stack(out)
    joined = torch.cat([2 - joined.max(dim=1, keepdim=True).values, joined], dim=1)
    mixed = torch.einsum("cd,bdhw->bchw", refiner.logits[0].weight[..., 0, 0], joined)
    mean, var = mixed.mean(dim=(0, 2, 3)), mixed.var(dim=(0, 2, 3), unbiased=False)
    normal = (mixed - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    weight, bias = refiner.logits[1].weight, refiner.logits[1].bias
    return normal * weight[:, None, None] + bias[:, None, None]


def erased(draw: Tensor, side: float) -> Tensor:
    """Return the pixels (B, H, W) of a box around each centre, as the first and last row and
    column of it say."""
    found = torch.zeros(draw.shape[1], *SIZE, dtype=torch.bool)
    for image, (y, x) in zip(found, draw.T.tolist(), strict=True):
        for i in range(SIZE[0]):
            for j in range(SIZE[1]):
                inside = abs((i + 0.5) / SIZE[0] - y) < side / 2
                image[i, j] = inside and abs((j + 0.5) / SIZE[1] - x) < side / 2
    return found


@pytest.mark.parametrize(("pairs", "model", "strides"), [(2, {}, (2, 4)), (1, VIT, (8, 2))])
def test_the_objective(
    tiny: Settings, pairs: int, model: dict[str, Any], strides: tuple[int, int]
) -> None:
    options = {"weight": 0.7, "temperature": 0.4, "cutout": 0.4, "background": 3}
    scene = Scene(tiny, "pseudoseg", {"options": options, "model": model}, pairs)
    stride, times = strides  # of the features, and how many of them the last stage has
    coarse = stride * times
    patches = scene.method.students[0].patches
    first, of_coarse, between = ((n - 1) / 2 if patches else 0.0 for n in (stride, coarse, times))
    box = erased(scene.drawn("cutout"), 0.4)
    shown = at_cells(~(scene.padding | box), stride, first)
    objects = torch.tensor([c for c in range(11) if c != 3])
    truth = torch.stack([(scene.label == c).flatten(1).any(dim=1) for c in objects], dim=1)
    sums: dict[str, Tensor] = dict.fromkeys(scene.engine.method.terms, torch.zeros(()))
    for k, student in enumerate(scene.method.students):
        refiner = scene.method.refiners[k]
        with torch.no_grad():
            stages = copy.deepcopy(student).eval().encode(scene.more)
            guess = stages[-1].mean(dim=(2, 3)) @ refiner.classifier.weight.T
            guess = guess + refiner.classifier.bias
        present, valid = guess.sigmoid() >= 0.5, at_cells(~scene.padding, coarse, of_coarse)
        assert 0 < present.double().mean() < 1
        refined = refined_maps(refiner, stages, present, valid).detach()
        with torch.no_grad():
            decoded = copy.deepcopy(student)(scene.more).logits
        refined = at_pixels(refined, decoded.shape, times, between)
        root = torch.cat([decoded, refined]).square().mean().sqrt()
        mean = ((decoded / root).softmax(dim=1) + (refined / root).softmax(dim=1)) / 2
        soft = mean**2.5 / (mean**2.5).sum(dim=1, keepdim=True)
        student = copy.copy(student)
        stages = student.encode(scene.images)
        fine = student.classifier(student.decode(stages))
        logits = at_pixels(fine, SIZE, stride, first)
        sums["sup"] = sums["sup"] + mean_cross_entropy(logits, scene.label)
        said = stages[-1].mean(dim=(2, 3)) @ refiner.classifier.weight.T + refiner.classifier.bias
        likely = said.sigmoid()
        wrong = torch.where(truth, -likely.log(), -(1 - likely).log()).mean()
        sums["presence"] = sums["presence"] + wrong
        valid = at_cells(scene.label != IGNORE, coarse, of_coarse)
        refined = refined_maps(refiner, stages, truth, valid)
        full = at_pixels(refined, SIZE, coarse, of_coarse)
        sums["refined"] = sums["refined"] + mean_cross_entropy(full, scene.label)
        strong = torch.where(box[:, None], 0, scene.more)  # the mean colour, once normalised
        distance = -(soft * student(strong).logits.log_softmax(dim=1)).sum(dim=1)
        sums["consistency"] = sums["consistency"] + distance[shown].mean()
    weights = {"sup": 1.0, "refined": 1.0, "presence": 1.0, "consistency": 0.7}
    scene.check({name: (weights[name], value) for name, value in sums.items()})
    assert scores(scene.method.students[0], scene.more).shape[2:] == SIZE


def test_labels_are_sharpened(tiny: Settings) -> None:
    """Of logits whose squares have the mean 1: (p, 1 - p) becomes (p^2, (1 - p)^2) over the sum."""
    engine = make(tiny.with_method("pseudoseg"))
    assert isinstance(engine.method, PseudoSeg)
    logits = torch.tensor([1.0, -1.0])[None, :, None, None]
    p = logits.softmax(dim=1)
    expected = p.square() / p.square().sum(dim=1, keepdim=True)
    for scale in (1.0, 5.0):
        soft = engine.method.sharpened([scale * logits, scale * logits], engine.step)
        torch.testing.assert_close(soft, expected)


def test_without_a_background_every_class_is_an_object(tiny: Settings) -> None:
    settings = update(tiny.with_method("pseudoseg"), {"options": {"background": -1}}, "test")
    refiner: Any = make(settings).method.refiners[0]
    stages = [torch.rand(2, 8, 6, 6), torch.rand(2, 16, 3, 3)]
    valid = torch.ones(2, 3, 3, dtype=torch.bool)
    assert refiner.presence(stages).shape == (2, 11)
    none = refiner(stages, torch.zeros(2, 11, dtype=torch.bool), valid)
    assert torch.equal(none, torch.zeros(2, 11, 3, 3))  # each channel is one number, normalised


def test_attention_sees_the_image_alone() -> None:
    torch.manual_seed(0)
    refiner = Refiner(models.build("small", 4, 8, 4), 4, 0).eval()
    stages = [torch.rand(1, 8, 6, 6), torch.rand(1, 16, 3, 3)]
    valid = torch.ones(1, 3, 3, dtype=torch.bool)
    valid[:, 2] = False
    present = torch.ones(1, 3, dtype=torch.bool)
    before = refiner(stages, present, valid)
    refiner.key.weight.data.mul_(0)  # all cells of the image alike
    weight = refiner.classifier.weight[:, :, None, None]
    maps = F.conv2d(stages[1], weight).relu()
    maps = maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-5)
    refined = maps + maps[:, :, :2].mean(dim=(2, 3), keepdim=True)
    refined = torch.cat([2 - refined.amax(dim=1, keepdim=True), refined], dim=1)
    after = refiner(stages, present, valid)
    torch.testing.assert_close(after, refiner.logits(refined))
    assert not torch.allclose(before, after)


CASES = [("small", "", 8), ("deeplabv2", "resnet18", 8), ("deeplabv3plus", "resnet18", 16)]
CASES += [("vit", "vit_tiny_patch16_224", 16), ("dpt", "test_vit", 16)]
if importlib.util.find_spec("segmentation_models_pytorch"):
    CASES += [("smp:unet", "resnet18", 32), ("smp:dpt", "vit_tiny_patch16_224", 16)]


@pytest.mark.parametrize(("name", "backbone", "stride"), CASES)
def test_where_the_cells_of_the_last_stage_are(name: str, backbone: str, stride: int) -> None:
    network = models.build(name, 5, 16, 8, backbone).eval()
    refiner = Refiner(network, 5, 0).eval()
    for size in ((64, 96), (70, 83), (33, 41)):
        with torch.no_grad():
            stages = read(network, network.encode(torch.randn(2, 3, *size)))
        assert network.stage_stride(stages[-1], size) == stride
        outside = torch.zeros(2, *size, dtype=torch.bool)
        outside[:, -stride:] = True
        cells = on_grid(outside, stages[-1], network)
        assert cells.shape[1:] == stages[-1].shape[2:]
        first = (stride - 1) // 2 if network.patches else 0
        places = at_cells(torch.arange(size[0])[None, :, None].expand(outside.shape), stride, first)
        beyond = torch.ones_like(cells)  # the image ends before cells that its padding has
        beyond[:, : places.shape[1], : places.shape[2]] = places >= size[0] - stride
        assert torch.equal(cells, beyond)
        present = torch.ones(2, 4, dtype=torch.bool)
        assert refiner(stages, present, ~cells).shape[2:] == stages[-1].shape[2:]
