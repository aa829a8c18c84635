"""U2PL beside a rendering of its equations, in plain loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ctt.data import mixing
from ctt.data.dataset import IGNORE
from ctt.methods import sampling
from ctt.settings import Settings
from tests.methods.rendering import SIZE, Scene, cross_entropies, mean_cross_entropy, mixed, scores


class Alone:
    """A step of one process."""

    alone = True
    rank = 0

    def total(self, values: Tensor) -> Tensor:
        return values


ALONE: Any = Alone()


def test_the_share_of_values_below_a_threshold() -> None:
    values = torch.rand(50, 40, generator=torch.Generator().manual_seed(0))
    valid = values > 0.1
    for share in (0.0, 0.2, 0.8, 1.0):
        top = sampling.quantile(values, valid, share, ALONE)
        assert float((values[valid] < top).double().mean()) == pytest.approx(share, abs=0.01)


def test_thresholds_of_a_network_that_is_sure() -> None:
    """Its entropies crowd together near 0, its confidences near 1."""
    rng = torch.Generator().manual_seed(0)
    margin = torch.where(torch.rand(20000, generator=rng) < 0.85, 11.0, 1.0)
    logits = torch.zeros(20000, 21)
    logits[:, 3] = margin + 1.5 * torch.randn(20000, generator=rng)
    everywhere = torch.ones(20000, dtype=torch.bool)
    unsure = sampling.entropy(logits[:, :, None])[:, 0]
    for values in (unsure, logits.softmax(dim=1).amax(dim=1)):
        for share in (0.05, 0.2, 0.8):
            top = sampling.quantile(values, everywhere, share, ALONE)
            assert float((values < top).float().mean()) == pytest.approx(share, abs=0.01)
            assert float((values <= top).float().mean()) == pytest.approx(share, abs=0.01)
    same = torch.zeros(7)
    assert float(sampling.quantile(same, everywhere[:7], 0.5, ALONE)) == 0
    assert float(sampling.quantile(same, ~everywhere[:7], 0.5, ALONE)) == math.inf


def test_members_are_drawn_by_their_numbers() -> None:
    member = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    number, drawn = sampling.numbered(member, 2, torch.tensor([0.2, 0.9, 0.5, 0.4, 0.8]), ALONE)
    assert number.tolist() == [-1, 0, 0, 1, -1]
    assert drawn.tolist() == [2, 1]


def test_members_are_drawn_without_waiting_for_the_device() -> None:
    """A number written into one place of a tensor is copied there from the host."""

    class NoCopies(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "copy" in str(function):
                assert args[0].device == args[1].device, function
            return function(*args, **(kwargs or {}))

    with FakeTensorMode():
        member = torch.ones(2, 5, dtype=torch.bool, device="cuda")
        ticket = torch.rand(5, device="cuda")
        with NoCopies():
            number, _ = sampling.numbered(member, 2, ticket, ALONE)
    assert number.device.type == "cuda"


def test_members_of_one_number_are_all_drawn() -> None:
    """Random numbers have 24 bits, so two of many pixels often have the same."""
    member = torch.ones(1, 5, dtype=torch.bool)
    number, drawn = sampling.numbered(member, 4, torch.tensor([0.5, 0.9, 0.5, 0.5, 0.1]), ALONE)
    assert sorted(number[:4].tolist()) == [0, 1, 2, 3]
    assert number[1] == 0
    assert (int(number[4]), drawn.tolist()) == (-1, [4])


def test_entropies_of_sure_pixels_count() -> None:
    """They are -0.0, whose bits are those of a negative number."""
    values = torch.tensor([-0.0] * 6 + [0.25, 0.5, 0.75, 1.0])
    everywhere = torch.ones(10, dtype=torch.bool)
    assert float(sampling.quantile(values, everywhere, 0.8, ALONE)) == 0.75
    assert float(sampling.quantile(values, everywhere, 0.2, ALONE)) == 0


def entropies(logits: Tensor) -> Tensor:
    p = logits.softmax(dim=1)
    return -(p * p.log()).sum(dim=1) / torch.tensor(11.0).double().log()


@pytest.mark.parametrize("mix", ["half-width", "none"])
def test_every_term_and_gradient(tiny: Settings, mix: str) -> None:
    options = {
        "start": 0,
        "drop": 0.3,
        "mix": mix,
        "sure": 0.08,
        "anchors": 9,
        "negatives": 5,
        "capacity": 40,
        "pushed": 6,
        "unlabeled": 0.5,
        "contrast": 0.25,
    }
    scene = Scene(tiny, "u2pl", {"options": options}, steps=5)
    method, n = scene.method, 3
    (teacher,), (student,) = method.teachers, method.students
    share = 0.3 * (1 - 4 / scene.settings.train.iterations)
    keep = torch.ones_like(scene.padding)
    if mix != "none" and float(scene.drawn("whether mixed")) < 0.5:
        keep = mixing.half_width_mask(SIZE, scene.drawn("mix"))
    with torch.no_grad():
        label = scores(teacher, scene.more).argmax(dim=1)
        label[scene.padding] = IGNORE
        label, images = mixed(label, keep), mixed(scene.more, keep)
        out = teacher(torch.cat([scene.images, images]))
        unsure = entropies(scores(teacher, torch.cat([scene.images, images]))[n:])
        valid = label != IGNORE
        top = sampling.quantile(unsure, valid, 1 - share, ALONE)
    trusted = label.masked_fill(unsure >= top, IGNORE)
    full = scores(student, torch.cat([scene.images, images]))
    kept = (trusted != IGNORE).sum()
    dropped_mean = cross_entropies(full[n:], trusted).sum() / kept * (valid.sum() / kept)
    assert float(kept) < float(valid.sum())

    # the contrast, pixel by pixel
    stride = student.stride
    bank = scene.engine.method.banks[0]  # pushed to before the anchors look at it
    with torch.no_grad():
        p = out.logits.softmax(dim=1)
        grid = entropies(out.logits)[n:]
        truth, more = scene.label[:, ::stride, ::stride], label[:, ::stride, ::stride]
        low = sampling.quantile(grid, more != IGNORE, share, ALONE)
        own = torch.cat([truth, more.masked_fill(grid > low, IGNORE)]).flatten()
        rep = method.head_teachers[0](out.features)
        rep = torch.nn.functional.normalize(rep, dim=1).movedim(1, -1).flatten(0, 2)
        p = p.movedim(1, -1).flatten(0, 2)
    mine = student(torch.cat([scene.images, images])).features
    mine = method.heads[0](mine).movedim(1, -1).flatten(0, 2)
    ticket = scene.drawn("anchors 0").flatten()
    draw, losses = scene.drawn("negatives 0"), []
    for c in range(11):
        of_class = (own == c).nonzero().flatten().tolist()
        chosen = [i for i in of_class if p[i, c] > 0.08]
        chosen = sorted(chosen, key=lambda i: -float(ticket[i]))[:9]
        if not chosen or int(bank.count[c]) == 0:
            continue
        positive = rep[of_class].mean(dim=0)
        values = []
        for slot, i in enumerate(chosen):
            picked = (draw[c, slot] * int(bank.count[c])).long()
            others = [positive, *(bank.keys[c, int(j)].double() for j in picked)]
            cosines = torch.stack([mine[i] @ x / (mine[i].norm() * x.norm()) for x in others])
            values.append(-(cosines / 0.5).log_softmax(dim=0)[0])
        losses.append(torch.stack(values).mean())
    assert len(losses) > 2
    sup = mean_cross_entropy(full[:n], scene.label)
    contrast = torch.stack(losses).mean()
    scene.check({"sup": (1.0, sup), "ct": (0.5, dropped_mean), "contrast": (0.25, contrast)})


def test_no_negative_of_a_class_is_labelled_so(tiny: Settings) -> None:
    """Keys of class c are labelled pixels of another truth, or unsure ones that are unlikely c."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_bank: Any, member: Tensor, *_: Any) -> None:
        seen.append((member, scene_labels[-1]))

    scene_labels: list[Tensor] = []
    numbered = sampling.numbered

    def own_labels(member: Tensor, *arguments: Any) -> Any:
        scene_labels.append(member)
        return numbered(member, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "push", note)
        patch.setattr(sampling, "numbered", own_labels)
        Scene(tiny, "u2pl", {"options": {"sure": 0.0}}, steps=2)
    for member, own in seen:
        assert member.any()
        half = member.shape[1] // 2
        assert not (member & own)[:, :half].any()
