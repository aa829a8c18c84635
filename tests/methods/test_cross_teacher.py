"""Cross-teacher training beside a rendering of the paper's equations, in plain loops."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ctt.data import mixing
from ctt.data.dataset import IGNORE
from ctt.data.digits import INFO
from ctt.methods.base import Setup
from ctt.methods.teacher_banks import TeacherBanks
from ctt.settings import Settings, update
from tests.methods.rendering import SIZE, Scene, mean_cross_entropy, mixed, no_gradient, scores

START = 2  # iteration at which the contrast begins
TAU_HC, TAU_LC, GAMMA = 0.5, 0.3, 0.12


def fill(method: Any) -> None:
    """Fill the banks: most queues are full, one is half full and one empty."""
    rng = torch.Generator().manual_seed(7)
    for k, bank in enumerate(method.banks):
        keys = torch.randn(bank.keys.shape, generator=rng, dtype=torch.float64)
        bank.keys.copy_(keys / keys.norm(dim=2, keepdim=True))
        bank.count.fill_(bank.capacity)
        bank.count[3 + k], bank.count[7] = bank.capacity // 2, 0


def scene_of(tiny: Settings, pairs: int, steps: int, loss: dict[str, Any]) -> Scene:
    change = {
        "views": {"mix": "cutmix"},
        "loss": {
            "hc": 0.3,
            "lc": 0.7,
            "tau_hc": TAU_HC,
            "tau_lc": TAU_LC,
            "gamma": GAMMA,
            "confidence_weight": "none",
            "contrast_reduction": "class",
            "contrast_stride": 1,
            "hc_confidence": "student",
            "lc_pixels": "all",
            "directional": True,
            **loss,
        },
        "bank": {"capacity": 4, "start_after": START, "start": "class"},
    }
    return Scene(tiny, "cross-teacher", change, pairs, steps, fill)


def unit(v: Tensor) -> Tensor:
    """Return a vector of length 1; one of length 0 has no direction and stays."""
    return v / v.norm() if float(v.detach().norm()) > 1e-12 else 0 * v


class Rendering:
    """Equations (1) to (9) for a scene."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.pairs = scene, len(scene.method.students)
        keep = mixing.cutmix_mask(SIZE, scene.drawn("mix"))
        given = [no_gradient(teacher, scene.more) for teacher in scene.method.teachers]
        images = torch.cat([scene.images, mixed(scene.more, keep)])
        self.label, self.sure, self.sup, self.ct = [], [], 0, 0
        self.features, self.own = [], []
        for k, student in enumerate(scene.method.students):
            p = sum(given[j] for j in self.others(k)) / len(self.others(k))
            confidence, label = p.max(dim=1)
            label[scene.padding] = IGNORE
            label, confidence = mixed(label, keep), mixed(confidence, keep)
            full = scores(student, images)  # its batch norms see what they see in the step
            out = student(images)
            stride = student.stride
            self.sup = self.sup + mean_cross_entropy(full[:3], scene.label)
            self.ct = self.ct + mean_cross_entropy(full[3:], label)
            on_grid = [x[:, ::stride, ::stride] for x in (scene.label, label, confidence)]
            self.label.append(torch.cat(on_grid[:2]).flatten())
            self.sure.append(torch.cat([torch.ones_like(on_grid[2]), on_grid[2]]).flatten())
            self.features.append(out.features.movedim(1, -1).flatten(0, 2))
            self.own.append(out.logits.detach().softmax(dim=1).movedim(1, -1).flatten(0, 2))

    def others(self, k: int) -> list[int]:
        return [j for j in range(self.pairs) if j != k] or [k]

    def keys(self, k: int) -> dict[int, Tensor]:
        """Return the keys of the classes whose queues are full."""
        bank = self.scene.method.banks[k]
        full = [c for c in range(11) if int(bank.count[c]) == bank.capacity]
        return {c: bank.keys[c] for c in full}

    def mean_of_classes(self, losses: dict[int, list[Tensor]]) -> Tensor:
        means = [torch.stack(values).mean() for values in losses.values()]
        return torch.stack(means).mean() if means else torch.zeros(())

    def high(self, k: int, decisive: Tensor) -> Tensor:
        losses: dict[int, list[Tensor]] = {}
        keys = self.keys(k)
        for i, label in enumerate(self.label[k].tolist()):
            if label not in keys or decisive[i] < GAMMA:
                continue
            v = unit(self.features[k][i])
            z = sum((keys[c] @ v / TAU_HC).exp().sum() for c in keys if c != label)
            e = (keys[label] @ v / TAU_HC).exp()
            losses.setdefault(label, []).append(-(e / (e + z)).log().mean())
        return self.mean_of_classes(losses)

    def low(self, k: int, j: int, decisive: Tensor, directional: bool, first: int) -> Tensor:
        losses: dict[int, list[Tensor]] = {}
        for i in range(first, len(self.label[k])):
            mine, peer = self.own[k][i].max(), self.own[j][i].max()
            if self.label[k][i] == IGNORE or decisive[i] >= GAMMA:
                continue
            if directional and not mine < peer:
                continue
            label = int(self.own[j][i].argmax())
            v = unit(self.features[k][i])
            v2 = unit(self.features[j][i].detach())
            both = [x for m in (k, j) for c, x in self.keys(m).items() if c != label]
            z = sum((x @ v / TAU_LC).exp().sum() for x in both)
            e = (v @ v2 / TAU_LC).exp()
            losses.setdefault(label, []).append(-(e / (e + z)).log())
        return self.mean_of_classes(losses)

    def terms(self, confidence: str, directional: bool, unlabeled: bool) -> dict[str, Any]:
        hc, lc = torch.zeros(()), torch.zeros(())
        for k in range(self.pairs):
            own = self.own[k].max(dim=1).values
            decisive = self.sure[k] if confidence == "teacher" else own
            hc = hc + self.high(k, decisive)
            peers = [j for j in range(self.pairs) if j != k]
            first = len(own) // 2 if unlabeled else 0
            for j in peers:
                lc = lc + self.low(k, j, decisive, directional, first) / len(peers)
        return {"sup": (1.0, self.sup), "ct": (1.0, self.ct), "hc": (0.3, hc), "lc": (0.7, lc)}


@pytest.mark.parametrize("pairs", [1, 2, 3])
@pytest.mark.parametrize("confidence", ["student", "teacher"])
def test_every_term_and_gradient(tiny: Settings, pairs: int, confidence: str) -> None:
    scene = scene_of(tiny, pairs, START + 1, {"hc_confidence": confidence})
    terms = Rendering(scene).terms(confidence, True, False)
    assert float(terms["hc"][1].detach()) > 0
    assert (float(terms["lc"][1].detach()) > 0) == (pairs > 1)
    scene.check(terms)


@pytest.mark.parametrize(
    "change",
    [{"directional": False}, {"lc_pixels": "unlabeled"}],
    ids=["any direction", "unlabeled"],
)
def test_options_of_the_low_level_contrast(tiny: Settings, change: dict[str, Any]) -> None:
    scene = scene_of(tiny, 2, START + 1, change)
    scene.check(
        Rendering(scene).terms("student", "directional" not in change, "lc_pixels" in change)
    )


@pytest.mark.parametrize(
    ("batch", "every", "expected"), [(3, 2, 1), (6, 4, 3), (12, 4, 4), (2, 9, 2)]
)
def test_banks_take_the_same_images_of_every_batch(
    tiny: Settings, batch: int, every: int, expected: int
) -> None:
    change = {"bank": {"every": every}, "data": {"batch_size": batch}}
    setup = Setup(update(tiny, change, "test"), INFO, 1, 6)
    assert TeacherBanks(setup, 4).every == expected


def test_contrast_begins_at_its_iteration(tiny: Settings) -> None:
    """Not one before, and (above) not one after."""
    scene = scene_of(tiny, 2, START, {})
    rendering = Rendering(scene)
    zero = torch.zeros(())
    scene.check(
        {"sup": (1.0, rendering.sup), "ct": (1.0, rendering.ct), "hc": (1, zero), "lc": (1, zero)}
    )


@pytest.mark.parametrize("every", [1, 3])
def test_banks_take_well_classified_labelled_pixels(tiny: Settings, every: int) -> None:
    """Of teacher k into bank k: right classes, the surest first, normalised."""
    bank_settings = {"capacity": 50, "top_k": 3, "per_class": 3, "random_choice": False}
    change = {
        "bank": {**bank_settings, "every": every},
        "loss": {"confidence_weight": "none"},
    }
    scene = Scene(tiny, "cross-teacher", change, 2)
    done: Any = scene.engine.method
    pushed = 0
    for k, teacher in enumerate(done.teachers):  # which have followed their students by now
        with torch.no_grad():
            out = teacher(scene.images[::every])
        stride = teacher.stride
        truth = scene.label[::every, ::stride, ::stride].flatten()
        p, found = out.logits.softmax(dim=1).movedim(1, -1).flatten(0, 2).max(dim=1)
        features = out.features.movedim(1, -1).flatten(0, 2)
        for c in range(11):
            right = ((truth == c) & (found == c)).nonzero().flatten()
            order = right[p[right].argsort(descending=True, stable=True)][:3]
            old, bank = int(scene.method.banks[k].count[c]), done.banks[k]
            assert int(bank.count[c]) == old + len(order)
            expected = torch.stack([unit(v) for v in features[order]] or [features[0]])[
                : len(order)
            ]
            seen = bank.keys[c, old : old + len(order)]
            torch.testing.assert_close(seen, expected.to(seen.dtype), rtol=1e-5, atol=1e-6)
            pushed += len(order)
    assert pushed > 0
