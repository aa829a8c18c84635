"""Methods in rounds beside a rendering of their equations, in the last of their rounds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ctt.data import mixing
from ctt.data.dataset import IGNORE
from ctt.errors import UserError
from ctt.methods.base import round_starts
from ctt.settings import Settings
from tests.methods.rendering import SIZE, Scene, cross_entropies, mean_cross_entropy, mixed, scores

LONG: dict[str, Any] = {"train": {"iterations": 400}, "views": {"mix": "none"}}


@pytest.mark.parametrize("mix", ["none", "cutmix", "classmix"])
def test_self_training_learns_the_labels_that_were_kept(tiny: Settings, mix: str) -> None:
    change: dict[str, Any] = {
        **LONG,
        "views": {"mix": mix},
        "loss": {"ct": 0.5, "confidence_weight": "none"},
    }
    scene = Scene(tiny, "self-training", change)
    keep = torch.ones_like(scene.padding)
    if mix == "cutmix":
        keep = mixing.cutmix_mask(SIZE, scene.drawn("mix"))
    elif mix == "classmix":
        keep = mixing.classmix_mask(scene.kept, scene.drawn("mix"))
    (student,) = scene.method.students
    out = scores(student, torch.cat([scene.images, mixed(scene.more, keep)]))
    ct = mean_cross_entropy(out[3:], mixed(scene.kept, keep))
    scene.check({"sup": (1.0, mean_cross_entropy(out[:3], scene.label)), "ct": (0.5, ct)})


@pytest.mark.parametrize(
    ("name", "anew"), [("self-training", True), ("st", True), ("st++", True), ("dst-cbc", False)]
)
def test_teachers_warm_up_again_with_new_students(tiny: Settings, name: str, anew: bool) -> None:
    scene = Scene(tiny, name, LONG)
    decay, rounds = scene.method.schedules()["decay"], scene.method.rounds()
    starts = round_starts(rounds, LONG["train"]["iterations"])
    assert decay(0) == 0.5
    assert decay(starts[-2] - 1) == pytest.approx(tiny.ema.decay)
    assert decay(starts[-2]) == pytest.approx(0.5 if anew else tiny.ema.decay)
    if name == "st++":  # the first training goes on while its snapshots are taken
        assert decay(starts[1]) > 0.9


@pytest.mark.parametrize("name", ["st", "st++"])
def test_st_learns_nothing_where_noise_covers_the_image(tiny: Settings, name: str) -> None:
    scene = Scene(tiny, name, LONG)
    keep = mixing.small_box_mask(SIZE, scene.drawn("cutout"))
    noise = noise_of(scene.drawn("cutout noise"))
    (student,) = scene.method.students
    images = torch.where(keep[:, None], scene.more, noise)
    out = scores(student, torch.cat([scene.images, images]))
    ct = mean_cross_entropy(out[3:], scene.kept.masked_fill(~keep, IGNORE))
    scene.check({"sup": (1.0, mean_cross_entropy(out[:3], scene.label)), "ct": (1.0, ct)})


def noise_of(draw: Tensor) -> Tensor:
    from ctt.data.digits import INFO

    mean, std = (torch.tensor(x).double()[:, None, None] for x in (INFO.mean, INFO.std))
    return (draw - mean) / std


@pytest.mark.parametrize(
    ("gamma", "labeled"),
    [(0.0, {}), (2.0, {}), (2.0, {"weights": (7.0,) * 11}), (9.0, {"ohem": 1.0})],
)
def test_dst_cbc_weighs_by_the_present_probability(
    tiny: Settings, gamma: float, labeled: dict[str, Any]
) -> None:
    """Class weights that are all alike, and hard pixels that are all, change nothing."""
    change = {"options": {"gamma": gamma}, "labeled": labeled}
    scene = Scene(tiny, "dst-cbc", {**LONG, **change})
    (student,) = scene.method.students
    out = scores(student, torch.cat([scene.images, scene.more]))
    n = (scene.label != IGNORE).sum() + (scene.kept != IGNORE).sum()
    entropies = cross_entropies(out[3:], scene.kept)
    weight = torch.exp(-entropies.detach()) ** gamma
    sup = mean_cross_entropy(out[:3], scene.label)
    share = float((scene.label != IGNORE).sum() / n)
    scene.check({"sup": (share, sup), "ct": (1.0, (weight * entropies).sum() / n)})


def test_dmt_weighs_by_who_is_surer(tiny: Settings) -> None:
    options = {"gamma": 2.0, "gamma_other": 3.0}
    scene = Scene(tiny, "dmt", {**LONG, "options": options}, steps=12)
    learner = scene.method.students[1]  # of the last round
    out = scores(learner, torch.cat([scene.images, scene.more]))
    n = (scene.label != IGNORE).sum() + (scene.kept != IGNORE).sum()
    own, answer = out[3:].detach().softmax(dim=1).max(dim=1)
    entropies = cross_entropies(out[3:], scene.kept)
    p, seen, ct = torch.exp(-entropies.detach()), [0, 0, 0], torch.zeros(())
    for place in (scene.kept != IGNORE).nonzero().tolist():
        i = tuple(place)
        if answer[i] == scene.kept[i]:
            case, weight = 0, p[i] ** 2
        elif own[i] > scene.kept_confidence[i]:
            case, weight = 1, 0.0
        else:
            case, weight = 2, p[i] ** 3
        seen[case] += 1
        ct = ct + weight * entropies[i]
    assert min(seen) > 0
    sup = mean_cross_entropy(out[:3], scene.label)
    share = float((scene.label != IGNORE).sum() / n)
    scene.check({"sup": (share, sup), "ct": (1.0, ct / n)})


def test_dmt_has_two_students(tiny: Settings) -> None:
    with pytest.raises(UserError, match="dmt has two students"):
        Scene(tiny, "dmt", LONG, pairs=3)
