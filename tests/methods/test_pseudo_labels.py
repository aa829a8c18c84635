"""Methods with hard labels beside a rendering of their equations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ctt.data import mixing
from ctt.data.dataset import IGNORE
from ctt.settings import Settings, update
from tests.methods.rendering import (
    SIZE,
    Scene,
    cross_entropies,
    mean_cross_entropy,
    mixed,
    no_gradient,
    scores,
    surer,
)
from tests.train.steps import batch, make, unlabelled

LABELERS = {
    "mean-teacher": ("teachers", lambda k, pairs: [k]),
    "mean-teacher-ensemble": ("teachers", lambda k, pairs: [k]),
    "dual-teachers": ("teachers", lambda k, pairs: list(range(pairs))),
    "cps": ("students", lambda k, pairs: [j for j in range(pairs) if j != k]),
    "fixmatch": ("students", lambda k, pairs: [k]),
}


def shown(scene: Scene, keep: Tensor, labelers: Any, chosen: Any) -> tuple[list, list, Tensor]:  # type: ignore[type-arg]
    """Return label and confidence for each student, mixed, and the mixed images."""
    given = [no_gradient(net, scene.more) for net in labelers]
    labels, sure = [], []
    for k in range(len(scene.method.students)):
        p = torch.stack([given[j] for j in chosen(k, len(given))]).mean(dim=0)
        confidence, label = p.max(dim=1)
        label[scene.padding] = IGNORE
        labels.append(mixed(label, keep))
        sure.append(mixed(confidence, keep))
    return labels, sure, mixed(scene.more, keep)


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_supervised(tiny: Settings, pairs: int) -> None:
    scene = Scene(tiny, "supervised", {}, pairs)
    sup = sum(
        mean_cross_entropy(scores(net, scene.images), scene.label) for net in scene.method.students
    )
    scene.check({"sup": (1.0, sup)})


@pytest.mark.parametrize("name", LABELERS)
@pytest.mark.parametrize("rule", ["none", "uniform", "threshold"])
@pytest.mark.parametrize("mean", ["kept", "valid", "all"])
def test_hard_labels(tiny: Settings, name: str, rule: str, mean: str) -> None:
    threshold = 0.2 if LABELERS[name][0] == "teachers" else 0.13
    loss = {"confidence_weight": rule, "confidence_threshold": threshold, "unlabeled_mean": mean}
    change = {"views": {"mix": "cutmix"}, "loss": {**loss, "ct": 0.7, "ct_ramp": 12}}
    scene = Scene(tiny, name, change, alter=surer)
    keep = mixing.cutmix_mask(SIZE, scene.drawn("mix"))
    kind, chosen = LABELERS[name]
    labels, sure, images = shown(scene, keep, getattr(scene.method, kind), chosen)
    sup, ct = 0, 0
    for k, net in enumerate(scene.method.students):
        out = scores(net, torch.cat([scene.images, images]))
        sup += mean_cross_entropy(out[:3], scene.label)
        label, valid = labels[k].clone(), labels[k] != IGNORE
        share = ((sure[k] >= threshold) & valid).sum() / valid.sum()
        assert 0.02 < share < 0.98
        if rule == "threshold":
            label[sure[k] < threshold] = IGNORE
        divisor = {"kept": (label != IGNORE).sum(), "valid": valid.sum(), "all": label.numel()}
        value = cross_entropies(out[3:], label).sum() / max(1, divisor[mean])
        if rule == "uniform":
            value = value * share
        ct += value
    scene.check({"sup": (1.0, sup), "ct": (0.7 * 3 / 12, ct)})


def test_classmix_with_fewer_classes_and_the_mean_over_all_pixels(tiny: Settings) -> None:
    change = {"options": {"threshold": 0.2, "weight": 0.5}}
    scene = Scene(tiny, "classmix", change, alter=surer)
    (teacher,), (student,) = scene.method.teachers, scene.method.students
    confidence, label = no_gradient(teacher, scene.more).max(dim=1)
    label[scene.padding] = IGNORE
    keep = torch.zeros_like(scene.padding)
    for i, draw in enumerate(scene.drawn("mix")):
        present = sorted({int(c) for c in label[i].unique()} - {IGNORE}, key=lambda c: draw[c])
        for c in present[: len(present) // 2]:
            keep[i] |= label[i] == c
    label, confidence = mixed(label, keep), mixed(confidence, keep)
    out = scores(student, torch.cat([scene.images, mixed(scene.more, keep)]))
    valid = label != IGNORE
    share = ((confidence >= 0.2) & valid).sum() / valid.sum()
    assert 0.02 < share < 0.98
    ct = cross_entropies(out[3:], label).sum() / label.numel() * share
    scene.check({"sup": (1.0, mean_cross_entropy(out[:3], scene.label)), "ct": (0.5, ct)})


@pytest.mark.parametrize("name", ["mean-teacher", "fixmatch", "cps", "cross-teacher"])
def test_students_learn_from_labelled_images_alone_before_the_others_join(
    tiny: Settings, name: str
) -> None:
    change = {"loss": {"ct_after": 0.4, "ct_ramp": 4}, "bank": {"start_after": 0}}
    engine = make(update(tiny, {"method": name, "train": {"iterations": 5}, **change}, "test"))
    pairs = len(engine.method.students)
    supervised = {"method": "supervised", "train": {"iterations": 5}}
    alone = make(update(tiny, supervised, "test"), pairs)
    for seed in range(2):
        values = engine(batch(seed=seed), unlabelled())
        alone(batch(seed=seed), None)
        assert "ct" not in values
    for ours, theirs in zip(engine.method.students, alone.method.students, strict=True):
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    assert "ct" in engine(batch(seed=2), unlabelled())
    assert engine.step["ramp"] == 1 / 4
    assert engine.trained == 3 * 3 * pairs + 3 * pairs
    stages = [engine.method.stage(i) for i in range(4)]
    assert stages[0] == stages[1] != stages[2] == stages[3]
