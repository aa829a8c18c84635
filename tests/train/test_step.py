import copy
import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctt import methods
from ctt.data.digits import INFO
from ctt.data.mixing import cutmix_mask
from ctt.data.source import IGNORE
from ctt.methods import losses
from ctt.methods.losses import usable_counts
from ctt.models.base import Output, SegmentationModel, upsample
from ctt.train.draws import Draws
from ctt.train.feed import Feed
from ctt.train.phases import NAMES
from ctt.train.settings import Settings, update
from ctt.train.state import EmaUpdate, TrainState, learning_rate
from ctt.train.step import LOST, Step, Target, normalize, to_unit

Batch = tuple[Tensor, Tensor]
CPU = torch.device("cpu")


def batch(size: int = 3, seed: int = 0, classes: int = 11) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 24, 24), generator=rng, dtype=torch.uint8)
    blocks = torch.randint(0, classes, (size, 3, 3), generator=rng, dtype=torch.uint8)
    return images, blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)


def unlabelled(size: int = 3, seed: int = 1) -> Batch:
    images, _ = batch(size, seed)
    padding = torch.zeros(size, 24, 24, dtype=torch.uint8)
    padding[:, :2] = IGNORE
    return images, padding


def make(settings: Settings, pairs: int) -> tuple[TrainState, Step]:
    state = TrainState(settings, pairs, 11, CPU)
    return state, Step(settings, methods.get(settings.method), INFO, 6, CPU)


class ByColour(SegmentationModel):
    """Says class c, surely, where the first channel is 20 c."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.stride = nn.Identity(), 1

    def encode(self, images: Tensor) -> list[Tensor]:
        return [images]

    def decode(self, stages: list[Tensor]) -> Tensor:
        (images,) = stages
        colour = (images[:, :1] * INFO.std[0] + INFO.mean[0]) * 255 / 20  # (B, 1, H, W)
        return -50 * (colour - torch.arange(11)[:, None, None]).abs()


@pytest.mark.parametrize("mix", ["none", "cutmix", "classmix"])
@pytest.mark.parametrize("pairs", [2, 3])
def test_both_students_and_the_labels_show_the_same_pixels(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch, mix: str, pairs: int
) -> None:
    views = {"mix": mix, "jitter": 0, "blur_probability": 0}
    settings = update(tiny, {"views": views, "loss": {"confidence_weight": "none"}}, "test")
    state, step = make(settings, pairs)
    state.teachers = [ByColour().eval() for _ in range(pairs)]
    seen: list[Tensor] = []
    for student in state.students:
        student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    targets: list[Target] = []
    lesson = Step._lesson
    monkeypatch.setattr(Step, "_lesson", lambda s, t, lost: targets.append(t) or lesson(s, t, lost))
    monkeypatch.setattr(Step, "_fill_banks", lambda *_: None)
    monkeypatch.setattr(EmaUpdate, "step", lambda *_: None)
    classes = batch(4, seed=3)[1]
    images = torch.stack([20 * classes, classes, classes], dim=1)
    step(state, batch(4), (images, torch.zeros_like(classes)))
    for strong, target in zip(seen, targets, strict=True):
        assert torch.equal(strong, seen[0])
        shown = ((strong[4:, 0] * INFO.std[0] + INFO.mean[0]) * 255 / 20).round().long()
        assert torch.equal(target.label, shown)
    changed = not torch.equal(targets[0].label, classes.long())
    assert changed == (mix != "none")


@pytest.mark.parametrize("per_student", [True, False])
def test_colours_may_differ_between_students(tiny: Settings, per_student: bool) -> None:
    settings = update(
        tiny, {"views": {"per_student": per_student, "jitter_probability": 1}}, "test"
    )
    state, step = make(settings, 2)
    seen: list[Tensor] = []
    for student in state.students:
        student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    step(state, batch(), unlabelled())
    assert torch.equal(seen[0], seen[1]) != per_student


def test_padding_of_unlabelled_images_is_never_a_label(tiny: Settings) -> None:
    state, step = make(update(tiny, {"views": {"mix": "none"}}, "test"), 2)
    images, padding = unlabelled()
    mixed, lessons = step._teach(state, to_unit(images), padding == IGNORE, torch.empty(0))
    assert torch.equal(mixed, to_unit(images))
    for lesson in lessons:
        assert torch.equal(lesson.target.label == IGNORE, padding == IGNORE)


@pytest.mark.parametrize(("method", "pairs"), [("cps", 2), ("fixmatch", 1), ("dual-teachers", 2)])
@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_the_objective_of_methods_without_contrast(
    tiny: Settings, method: str, pairs: int, mix: str
) -> None:
    """Losses and gradients, against the formulas written out with other functions."""
    change = {"views": {"mix": mix, "jitter": 0, "blur_probability": 0, "strong_labeled": False}}
    change |= {"loss": {"confidence_weight": "none", "ct": 1.5}, "optim": {"momentum": 0}}
    settings = dataclasses.replace(update(tiny, change, "test"), method=method)
    state, step = make(settings, pairs)
    for teacher in state.teachers:  # teachers that say something else than their students
        teacher.load_state_dict(make(settings, 3)[0].students[2].state_dict())
    students, teachers = copy.deepcopy(state.students), copy.deepcopy(state.teachers)
    images, label = batch(4)
    weak, padding = unlabelled(4)
    draws = step._draws(state, 4, True)
    terms = step(state, (images, label), (weak, padding))

    unit = to_unit(weak)
    labelers = [s.train() for s in students] if method != "dual-teachers" else teachers
    with torch.no_grad():
        asked = [net(normalize(unit, INFO)) for net in labelers]
    chance = [upsample(out.logits, (24, 24), 2).softmax(dim=1) for out in asked]
    keep = torch.ones(4, 24, 24, dtype=torch.bool)
    if mix == "cutmix":
        keep = cutmix_mask((24, 24), draws.split(draws(0)).mix)
    mixed = torch.where(keep[:, None], unit, unit.roll(1, dims=0))
    sup = ct = torch.zeros(())
    for k, student in enumerate(students):
        mean = {"cps": chance[1 - k] if pairs == 2 else None, "fixmatch": chance[0]}.get(method)
        mean = sum(chance) / pairs if mean is None else mean
        pseudo = mean.argmax(dim=1).masked_fill(padding == IGNORE, -1)
        pseudo = torch.where(keep, pseudo, pseudo.roll(1, dims=0))
        logits = student(normalize(torch.cat([to_unit(images), mixed]), INFO)).logits
        scores = upsample(logits, (24, 24), 2)
        sup = sup + nn.functional.cross_entropy(scores[:4], label.long(), ignore_index=IGNORE)
        ct = ct + nn.functional.cross_entropy(scores[4:], pseudo, ignore_index=-1)
    assert set(terms) == {"sup", "ct", "total", LOST}
    assert float(terms["sup"]) == pytest.approx(float(sup.detach()), rel=1e-5)
    assert float(terms["ct"]) == pytest.approx(float(ct.detach()), rel=1e-5)
    (sup + 1.5 * ct).backward()
    for student, trained in zip(students, state.students, strict=True):
        for p, q in zip(student.parameters(), trained.parameters(), strict=True):
            decayed = p.grad + settings.optim.weight_decay * p
            expected = p - learning_rate(settings, 0) * decayed
            torch.testing.assert_close(q, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["cps", "dual-teachers", "fixmatch"])
def test_nothing_but_padding_teaches_nothing(tiny: Settings, method: str) -> None:
    state, step = make(dataclasses.replace(tiny, method=method), 2)
    images, padding = unlabelled()
    terms = step(state, batch(), (images, torch.full_like(padding, IGNORE)))
    assert float(terms["ct"]) == 0
    assert all(torch.isfinite(value) for value in terms.values())


def test_a_teacher_without_finite_probabilities_labels_nothing(tiny: Settings) -> None:
    """The largest of NaNs is at index 0: the students would be trained towards class 0."""
    change = {"views": {"mix": "none"}, "loss": {"confidence_weight": "none"}}
    state, step = make(update(tiny, change, "test"), 2)
    state.teachers[1].classifier.bias.data.fill_(float("inf"))  # teacher 2 labels for student 1
    images, padding = unlabelled()
    _, lessons = step._teach(state, to_unit(images), padding == IGNORE, torch.empty(0))
    assert (lessons[0].label == IGNORE).all()
    assert (lessons[0].target.confidence == 0).all()
    assert torch.equal(lessons[1].label == IGNORE, padding == IGNORE)
    assert [float(lesson.lost) for lesson in lessons] == [1.0, 0.0]
    terms = step(state, batch(), (images, padding))
    assert all(torch.isfinite(value) for value in terms.values())
    assert float(terms[LOST]) == 0.5


def test_pairs_of_different_strides_teach_each_other(tiny: Settings) -> None:
    """Each cross-entropy is at its network's own stride, contrast on the coarser grid."""
    change = {
        "model": {"name": "vit", "backbone": ["test_vit", "vit_small_patch14_dinov2"]},
        "loss": {"gamma": 0.0, "hc": 1, "lc": 0},
        "bank": {"capacity": 1},
        "optim": {"lr": 1e-4},
    }
    state, step = make(update(tiny, change, "test"), 2)
    assert [student.stride for student in state.students] == [8, 7]
    seen: list[Tensor] = []
    for student in state.students:
        student.register_forward_hook(lambda _, inputs, out: seen.append(out.logits.detach()))
    hc = 0.0
    for i in range(6):
        seen.clear()
        images, label = batch(4, seed=i, classes=2)
        terms = step(state, (images, label), unlabelled(4, seed=i))
        label = label.long()
        expected = sum(
            losses.pixel_cross_entropy(logits[:4], stride, label, losses.valid_pixels(label))
            for logits, stride in zip(seen, (8, 7), strict=True)
        )
        assert float(terms["sup"]) == pytest.approx(float(expected), rel=1e-5)
        hc = max(hc, float(terms["hc"]))
    assert hc > 0


@pytest.mark.parametrize(("stride", "coarse"), [(4, 8), (7, 8), (4, 14), (8, 8)])
def test_the_nearest_cells_of_a_finer_grid(stride: int, coarse: int) -> None:
    image = torch.arange(100.0)
    fine = image[::stride].expand(1, 2, 50 // stride, -1)  # a cell holds its column
    columns = image[::coarse]
    found = losses.coarsen(fine, stride, coarse, (50 // coarse, len(columns)))[0, 0, 0]
    assert (found - columns).abs().max() <= stride / 2 + (columns.max() - fine.max()).clamp(min=0)


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_labels_come_from_the_other_teachers(tiny: Settings, pairs: int) -> None:
    state, step = make(update(tiny, {"views": {"mix": "none"}}, "test"), pairs)
    images, padding = unlabelled()
    weak = to_unit(images)
    _, lessons = step._teach(state, weak, padding == IGNORE, torch.empty(0))
    normalized = normalize(weak, INFO)
    for k, (target, *_) in enumerate(lessons):
        others = [j for j in range(pairs) if j != k] or [k]
        mean = torch.zeros(len(images), 11, 24, 24)
        for j in others:
            logits = state.teachers[j](normalized).logits
            up = nn.functional.interpolate(logits, size=(24, 24), mode="bilinear")
            mean += up.softmax(dim=1) / len(others)
        label = mean.argmax(dim=1).masked_fill(padding == IGNORE, IGNORE)
        assert torch.equal(target.label, label)
        assert torch.allclose(target.confidence, mean.amax(dim=1), atol=1e-6)


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_steps_of_k_pairs(tiny: Settings, pairs: int) -> None:
    change = {"loss": {"gamma": 0.3}, "bank": {"capacity": 2}, "train": {"iterations": 12}}
    settings = update(tiny, change, "test")
    state, step = make(settings, pairs)
    seen = {"hc": 0.0, "lc": 0.0}
    for i in range(12):
        terms = step(state, batch(seed=i), unlabelled(seed=10 + i))
        assert all(torch.isfinite(value) for value in terms.values())
        seen = {name: max(value, float(terms[name])) for name, value in seen.items()}
    assert state.iteration == 12
    assert seen["hc"] > 0
    assert (seen["lc"] > 0) == (pairs > 1)  # the low-level contrast needs a peer
    weights = settings.loss
    expected = sum(
        getattr(weights, name) * float(terms[name]) for name in ("sup", "ct", "hc", "lc")
    )
    assert float(terms["total"]) == pytest.approx(expected, rel=1e-5)


def test_contrast_starts_although_a_class_never_appears(tiny: Settings) -> None:
    settings = update(
        tiny, {"loss": {"gamma": 0.0, "lc": 0}, "bank": {"start_after": 0, "capacity": 2}}, "test"
    )
    state, step = make(settings, 2)
    # the teachers know classes 0 to 5; 6 to 10 never come
    state.teachers = [WithFeatures().eval() for _ in range(2)]
    state.ema.averaged, state.ema.copied = ([], []), {}
    labels = batch(classes=6)[1]
    images = torch.stack([20 * labels, labels, labels], dim=1)
    first = step(state, (images, labels), unlabelled())
    assert float(first["hc"]) == 0
    for _ in range(3):
        later = step(state, (images, labels), unlabelled())
    assert state.banks[0].full.tolist()[6:] == [False] * 5
    assert state.banks[0].full.any()
    assert float(later["hc"]) > 0
    assert sum(int(count.sum()) for count in usable_counts(state.banks, "all")) == 0


class WithFeatures(ByColour):
    """As ByColour, with features of eight channels on the grid of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stride = 2

    def forward(self, images: Tensor) -> Output:
        out = super().forward(images[:, :, ::2, ::2])
        return Output(out.logits, out.logits[:, :8])


def test_contrast_of_every_other_pixel(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []
    contrast = losses.high_level_contrast

    def spy(features: Tensor, label: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        seen.append([features.detach(), label, mask])
        return contrast(features, label, mask, *rest)

    monkeypatch.setattr(losses, "high_level_contrast", spy)
    for stride in (1, 2):
        settings = update(tiny, {"loss": {"contrast_stride": stride}}, "test")
        state, step = make(settings, 2)
        for _ in range(3):  # the first one fills the banks
            terms = step(state, batch(), unlabelled())
        assert terms["hc"] > 0
        assert terms["lc"] > 0
    calls = len(seen) // 2
    first_step = 2  # before it the weights are the same, later ones have learnt from other pixels
    for whole, thin in zip(seen[:first_step], seen[calls : calls + first_step], strict=True):
        for maps, some in zip(whole, thin, strict=True):
            assert torch.equal(maps[..., ::2, ::2], some)


def test_teachers_follow_but_never_learn(tiny: Settings) -> None:
    state, step = make(tiny, 2)
    storages = {p.data_ptr() for net in state.students for p in net.parameters()}
    for teacher in state.teachers:
        assert not storages & {p.data_ptr() for p in teacher.parameters()}
    before = copy.deepcopy(state.teachers[0])
    step(state, batch(), unlabelled())
    decay = min(1 - 1 / 2, tiny.ema.decay)
    student, teacher = state.students[0], state.teachers[0]
    for old, new, own in zip(
        before.parameters(), teacher.parameters(), student.parameters(), strict=True
    ):
        assert new.grad is None
        assert not new.requires_grad
        assert torch.allclose(new, decay * old + (1 - decay) * own, atol=1e-7)
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, dict(student.named_buffers())[name])
    assert not teacher.training
    assert student.training


def test_averaged_buffers_leave_counters_alone(tiny: Settings) -> None:
    state, step = make(update(tiny, {"ema": {"buffers": "average"}}, "test"), 1)
    old = dict(copy.deepcopy(state.teachers[0]).named_buffers())
    step(state, batch(), unlabelled())
    own = dict(state.students[0].named_buffers())
    for name, buffer in state.teachers[0].named_buffers():
        if buffer.is_floating_point():
            assert torch.allclose(buffer, 0.5 * old[name] + 0.5 * own[name], atol=1e-6)
        else:
            assert torch.equal(buffer, own[name])


def test_students_start_different(tiny: Settings) -> None:
    state, _ = make(tiny, 3)
    weights = [net.state_dict()["stem.0.weight"] for net in state.students]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    again, _ = make(tiny, 3)
    assert torch.equal(weights[2], again.students[2].state_dict()["stem.0.weight"])


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_crops_without_any_label_do_no_harm(tiny: Settings, amp: str) -> None:
    settings = update(tiny, {"train": {"amp": amp}}, "test")
    state, step = make(settings, 2)
    images, label = batch()
    terms = step(state, (images, torch.full_like(label, IGNORE)), unlabelled())
    assert float(terms["sup"]) == 0
    for network in state.networks().values():
        assert all(torch.isfinite(p).all() for p in network.parameters())


def test_supervised_takes_no_unlabelled_images(tiny: Settings) -> None:
    state, step = make(dataclasses.replace(tiny, method="supervised"), 1)
    assert set(step(state, batch(), None)) == {"sup", "total"}


def test_mean_teacher_has_no_contrast(tiny: Settings) -> None:
    state, step = make(dataclasses.replace(tiny, method="mean-teacher"), 1)
    assert set(step(state, batch(), unlabelled())) == {"sup", "ct", "total", LOST}


def test_banks_hold_well_classified_pixels_of_the_teacher(tiny: Settings) -> None:
    state, step = make(tiny, 2)
    state.teachers = [WithFeatures().eval() for _ in range(2)]
    labels = batch(classes=4)[1]
    shown = labels.clone()
    shown[labels == 2] = 3  # the teacher will say 3 where the truth is 2
    images = torch.stack([20 * shown, shown, shown], dim=1)
    step._fill_banks(state, to_unit(images), labels.long(), torch.rand(2, 1, 11, 256))
    for bank in state.banks:
        held = bank.count.tolist()
        assert held[2] == 0
        assert all(held[c] == min(4, 4) for c in (0, 1, 3))
        for c in (0, 1, 3):
            assert torch.allclose(bank.queue(c).norm(dim=1), torch.ones(held[c]))
            assert (bank.queue(c).argmax(dim=1) == c).all()


def test_learning_rate_warms_up_and_decays(tiny: Settings) -> None:
    optim = dataclasses.replace(tiny.optim, lr=1.0, warmup=2, power=0.9)
    train = dataclasses.replace(tiny.train, iterations=10)
    settings = dataclasses.replace(tiny, optim=optim, train=train)
    assert [learning_rate(settings, i) for i in (0, 1)] == [0.5, 1.0]
    assert learning_rate(settings, 5) == pytest.approx(0.5**0.9)


def test_parts_of_a_batch_add_up_to_it(tiny: Settings) -> None:
    """But for batch norm, which is held still here, and for the contrast."""
    change = {"loss": {"hc": 0, "lc": 0, "confidence_weight": "uniform"}, "optim": {"lr": 0.01}}
    images, label = batch(4)
    label[0] = IGNORE  # parts with unequal numbers of labelled pixels
    ends = []
    for parts in (1, 2, 4):
        settings = update(update(tiny, change, "test"), {"train": {"accumulate": parts}}, "test")
        state, step = make(settings, 2)
        for student in state.students:
            student.eval()
        terms = step(state, (images, label), unlabelled(4))
        ends.append((terms, state.students[1].state_dict()))
    for terms, weights in ends[1:]:
        for name in ("sup", "ct", "total"):
            assert float(terms[name]) == pytest.approx(float(ends[0][0][name]), rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, ends[0][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("contrast_stride", [1, 2])
def test_crops_that_are_no_multiple_of_the_stride(tiny: Settings, contrast_stride: int) -> None:
    settings = update(tiny, {"loss": {"contrast_stride": contrast_stride}}, "test")
    state, step = make(settings, 2)
    for i in range(4):
        cut = [(x[..., :23, :21], y[..., :23, :21]) for x, y in (batch(seed=i), unlabelled(seed=i))]
        terms = step(state, *cut)
    assert all(torch.isfinite(value) for value in terms.values())
    assert float(terms["hc"] + terms["lc"]) > 0


def test_contrast_of_parts_is_finite(tiny: Settings) -> None:
    settings = update(tiny, {"train": {"accumulate": 2}}, "test")
    state, step = make(settings, 2)
    for i in range(4):
        terms = step(state, batch(4, seed=i), unlabelled(4, seed=i))
    assert all(torch.isfinite(value) for value in terms.values())
    assert float(terms["hc"] + terms["lc"]) > 0


def test_draws_of_processes_are_those_of_one(tiny: Settings) -> None:
    for mix in ("cutmix", "classmix"):
        settings = update(tiny, {"views": {"mix": mix}}, "test")
        whole = Draws(settings, 2, 11, 6, True, 3)
        parts = [Draws(settings, 2, 11, 3, True, 3, rank, 2) for rank in (0, 1)]
        expected = whole.split(whole(7))
        first, second = (part.split(part(7)) for part in parts)
        axis = 1 if mix == "cutmix" else 0
        assert torch.equal(torch.cat([first.mix, second.mix], dim=axis), expected.mix)
        for name in ("labeled", "unlabeled"):
            for k in range(2):
                joined = torch.cat([getattr(first, name)[k], getattr(second, name)[k]], dim=1)
                assert torch.equal(joined, getattr(expected, name)[k])
        assert torch.equal(first.bank, expected.bank)
        assert torch.equal(second.bank, expected.bank)
        assert not torch.equal(whole(8), whole(7))


@pytest.mark.parametrize("how", ["network", "blocks"])
def test_compiled_networks_in_bf16_train_alike(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """With the tracing of torch.compile; generating code takes too long here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ends = []
    for change in ({}, {"compile": how, "amp": "bf16"}):
        settings = update(tiny, {"train": change, "optim": {"lr": 0.01}}, "test")
        state, step = make(settings, 2)
        terms = [step(state, batch(seed=i), unlabelled(seed=i)) for i in range(4)]
        ends.append([float(values["sup"]) for values in terms])
        assert all(torch.isfinite(x).all() for x in state.students[0].state_dict().values())
    assert ends[1] == pytest.approx(ends[0], rel=0.03)
    assert ends[1] != ends[0]


def test_phases_of_a_step_are_timed(tiny: Settings) -> None:
    state, step = make(tiny, 2)
    step.phases.timing = True
    feed = Feed(iter([batch()]), iter([unlabelled()]), step.phases)
    step(state, *feed())
    spent = step.phases.seconds()
    assert tuple(spent) == NAMES
    assert all(value > 0 for value in spent.values())
    assert step.phases.seconds() == {}
    assert feed.waited() > 0
    assert feed.waited() == 0


def test_what_a_graph_records_is_the_step(tiny: Settings) -> None:
    """Learning rate, ramp and decay then come as tensors; here an ordinary call reads them."""
    change = {"loss": {"ct_ramp": 5, "confidence_weight": "none"}, "optim": {"warmup": 3}}
    ends = []
    for graph in (False, True):
        settings = update(update(tiny, change, "test"), {"train": {"cuda_graph": graph}}, "test")
        state, step = make(settings, 2)
        step._replay = lambda _, inputs, body: body([x.clone() for x in inputs])  # type: ignore
        for i in range(4):
            terms = step(state, batch(seed=i), unlabelled(seed=i))
        ends.append((terms, state.teachers[0].state_dict()))
    for name, value in ends[0][0].items():
        assert float(ends[1][0][name]) == pytest.approx(float(value), rel=1e-4)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], value, rtol=1e-4, atol=1e-6)
