"""C3-SemiSeg beside a rendering of its equations, in plain loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ctt.data import mixing
from ctt.data.dataset import IGNORE
from ctt.errors import UserError
from ctt.methods.sampling import class_quantiles, half_of_each, put_first
from ctt.settings import Settings, update, validate
from tests.methods.rendering import SIZE, Scene, mean_cross_entropy, no_gradient, scores, surer
from tests.methods.test_u2pl import ALONE

OPTIONS: dict[str, Any] = {
    "start": 0.0,
    "consistency_ramp": 0.0,
    "contrast_ramp": 0.0,
    "consistency": 0.7,
}
OPTIONS |= {"contrast": 0.2, "anchors": 3, "dim": 5}


def apart(method: Any) -> None:
    """Have pixels of both teachers above and below the thresholds, which differ by class."""
    surer(method)
    for net in method.teachers:
        net.classifier.bias.data[4] = -100  # which they never predict
    method.thresholds.copy_(torch.linspace(0.1, 0.4, method.thresholds.numel()).view(-1, 11))


def restored(maps: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange the pixels of the first and the second three images that are not kept."""
    one, other = maps[:3].clone(), maps[3:].clone()
    for i in range(3):
        one[i][:, ~keep[i]], other[i][:, ~keep[i]] = (
            other[i][:, ~keep[i]],
            one[i][:, ~keep[i]],
        )
    return one, other


def drawn(pixels: list[tuple[int, ...]], ticket: Tensor, count: int) -> list[tuple[int, ...]]:
    return sorted(pixels, key=lambda at: -float(ticket[at]))[:count]


@pytest.mark.parametrize(("pairs", "background"), [(1, -1), (2, 1)])
def test_every_term_and_gradient(tiny: Settings, pairs: int, background: int) -> None:
    options = {"options": OPTIONS | {"background": background}}
    scene = Scene(tiny, "c3-semiseg", options, pairs, 3, apart)
    terms = {"sup": torch.zeros(()), "consistency": torch.zeros(()), "contrast": torch.zeros(())}
    keep = mixing.half_area_mask(SIZE, scene.drawn("boxes"))
    assert not keep.all()
    images = torch.cat(restored(torch.cat([scene.images, scene.more]), keep))
    for k, (student, teacher) in enumerate(
        zip(scene.method.students, scene.method.teachers, strict=True)
    ):
        labeled, unlabeled = restored(scores(student, images), keep)
        terms["sup"] = terms["sup"] + mean_cross_entropy(labeled, scene.label)
        soft = no_gradient(teacher, scene.more)
        confidence, label = soft.max(dim=1)
        thresholds = scene.engine.method.thresholds[k]  # which follow before they are asked
        sure = ~scene.padding & (confidence >= thresholds[label])
        assert sure.any()
        assert not sure[~scene.padding].all()
        away = -(soft * unlabeled.softmax(dim=1).log()).sum(dim=1)[sure].mean() / 11
        terms["consistency"] = terms["consistency"] + away
        label = label.masked_fill(~sure, IGNORE)
        told = contrast(scene, k, images, keep, label, background)
        terms["contrast"] = terms["contrast"] + told
    weights = {"sup": 1.0, "consistency": 0.7, "contrast": 0.2}
    scene.check({name: (weights[name], value) for name, value in terms.items()})


def contrast(
    scene: Scene, k: int, images: Tensor, keep: Tensor, label: Tensor, background: int
) -> Tensor:
    method, stride, count = scene.method, scene.method.students[k].stride, OPTIONS["anchors"]
    out, keep = method.students[k](images), keep[:, ::stride, ::stride]
    features = torch.cat(restored(method.heads[k](out.features), keep))
    answer = torch.cat(restored(out.logits, keep)).argmax(dim=1)
    own = torch.cat([scene.label, label])[:, ::stride, ::stride]
    ticket = scene.drawn(f"anchors {k}").transpose(0, 1).flatten(0, 1)  # labelled images first
    with torch.no_grad():
        known = method.teachers[k](torch.cat([scene.images, scene.more])).features
        known = method.head_teachers[k](known)
    keys: dict[int, list[Tensor]] = {}
    anchors: list[tuple[int, Tensor]] = []
    seen = {"few": 0, "right": 0, "wrong": 0}
    for c in range(11):
        for i in range(6):
            pixels: list[tuple[int, ...]] = [(i, y, x) for y, x in (own[i] == c).nonzero().tolist()]
            if c == background or len(pixels) <= count:
                seen["few"] += len(pixels)
                continue
            for i, y, x in drawn(pixels, ticket, count):
                keys.setdefault(c, []).append(known[i, :, y, x] / known[i, :, y, x].norm())
            wrong = [at for at in pixels if answer[at] != c]
            right = [at for at in pixels if answer[at] == c]
            half = min(len(wrong), max(math.ceil(count / 2), count - len(right)))
            chosen = drawn(wrong, ticket, half) + drawn(right, ticket, count - half)
            assert len(chosen) == count
            seen["wrong"], seen["right"] = seen["wrong"] + half, seen["right"] + count - half
            for i, y, x in chosen:
                anchors.append((c, features[i, :, y, x] / features[i, :, y, x].norm()))
    assert min(seen.values()) > 0
    assert len(keys) > 1
    told = []
    for c, f in anchors:
        others = sum(torch.exp(f @ key / 0.15) for o in keys if o != c for key in keys[o])
        same = torch.stack([torch.exp(f @ key / 0.15) for key in keys[c]])
        told.append(-torch.log(same / (same + others)).mean())
    return torch.stack(told).mean()


def test_thresholds_follow_what_the_teacher_is_sure_of(tiny: Settings) -> None:
    scene = Scene(tiny, "c3-semiseg", {"options": OPTIONS}, 2, 2, apart)
    done: Any = scene.engine.method
    kept = []
    for k, teacher in enumerate(scene.method.teachers):
        confidence, label = no_gradient(teacher, scene.more).max(dim=1)
        before, after = scene.method.thresholds[k], done.thresholds[k]
        for c in range(11):
            values = confidence[(label == c) & ~scene.padding].sort().values
            if len(values):  # four fifths are above
                expected = 0.9 * before[c] + 0.1 * values[len(values) // 5]
                assert abs(after[c] - expected) < 0.1 / 1024 + 1e-6
            else:
                assert after[c] == before[c]
                kept.append(c)
    assert kept.count(4) == 2
    assert len(kept) < 20


def test_labels_alone_teach_before_the_start(tiny: Settings) -> None:
    options = {"start": 0.5, "anchors": 3}
    scene = Scene(tiny, "c3-semiseg", {"options": options}, 1, 2, surer)
    done: Any = scene.engine.method
    assert torch.equal(done.thresholds, scene.method.thresholds)
    images = torch.cat([scene.images, scene.more])  # nothing is exchanged
    sup = mean_cross_entropy(scores(scene.method.students[0], images)[:3], scene.label)
    torch.testing.assert_close(scene.terms["sup"], sup.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(scene.terms["total"], sup.detach(), rtol=1e-6, atol=0)
    assert scene.terms["contrast"] > 0  # but without weight


def test_weights_rise_from_the_start_on(tiny: Settings) -> None:
    scene = Scene(tiny, "c3-semiseg", {"train": {"iterations": 1000}}, 1, 1)
    weights = scene.engine.method.schedules()
    for name, end, full in (("consistency", 260, 50), ("contrast", 110, 0.15)):
        assert weights[name](99) == 0
        assert 0 < weights[name](100) == pytest.approx(full * math.exp(-5))
        assert weights[name](end - 1) < weights[name](end) == pytest.approx(full)


def test_a_background_must_be_a_class(tiny: Settings) -> None:
    with pytest.raises(UserError, match=r"`options\.background` 11"):
        Scene(tiny, "c3-semiseg", {"options": {"background": 11}}, 1, 1)


def test_half_of_those_drawn_are_of_a_kind() -> None:
    ticket = torch.tensor([0.1, 0.9, 0.5, 0.4, 0.3, 0.8])
    member = torch.tensor([[True] * 6, [True, True, False, False, True, True], [False] * 6])
    kind = torch.tensor([True, True, True, False, False, False])
    place, there = half_of_each(member, kind, 4, ticket)
    found = [set(p[t].tolist()) for p, t in zip(place, there, strict=True)]
    assert found == [{1, 2, 5, 3}, {0, 1, 4, 5}, set()]
    only = half_of_each(member, torch.ones(6, dtype=torch.bool), 4, ticket)
    assert set(only[0][0][only[1][0]].tolist()) == {1, 5, 2, 3}


def test_what_is_there_comes_first() -> None:
    there = torch.tensor([[False, True, False, True], [True, False, False, False]])
    values = torch.arange(8.0).view(2, 4, 1)
    first, held = put_first(values, there)
    assert held.tolist() == [2, 1]
    assert first[0, :2, 0].tolist() == [1, 3]
    assert first[1, 0, 0] == 4


def test_quantiles_of_each_class() -> None:
    values, own = torch.rand(3000), torch.arange(3000) % 3
    own[own == 2] = IGNORE
    level, seen = class_quantiles(values, own, 3, 0.2, ALONE)
    assert seen.tolist() == [True, True, False]
    for c in range(2):
        assert level[c] == values[own == c].sort().values[200]


def test_a_threshold_is_of_some_pixels(tiny: Settings) -> None:
    """That of none would be infinite, and stay so."""
    settings = update(tiny.with_method("c3-semiseg"), {"options": {"sure": 0}}, "test")
    with pytest.raises(UserError, match=r"`options\.sure` must be above 0 and at most 1, got 0"):
        validate(settings)
