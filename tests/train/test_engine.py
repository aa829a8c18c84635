import copy
import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ctt.data.dataset import IGNORE
from ctt.data.digits import INFO
from ctt.data.views import normalize, to_unit
from ctt.methods import losses
from ctt.methods.base import Networks
from ctt.methods.losses import usable_counts
from ctt.methods.optim import learning_rate
from ctt.models.base import Grid, Output, SegmentationModel
from ctt.settings import Settings, update
from ctt.train.context import StepContext
from ctt.train.distributed import World
from ctt.train.engine import Engine
from ctt.train.phases import NAMES
from ctt.train.prefetcher import DevicePrefetcher
from tests.methods.grids import at_pixels
from tests.train.steps import CPU, batch, make, unlabelled


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


def prepared(engine: Engine, images: Tensor, padding: Tensor) -> dict[str, Tensor]:
    """Return the batch with the labels that teachers give to unlabelled images."""
    b = {"images": to_unit(images), "label": padding.long()}
    b |= {"unlabeled": to_unit(images), "padding": padding == IGNORE}
    engine.step.begin(0)
    with torch.no_grad():
        return engine.method.prepare(b, engine.step)


@pytest.mark.parametrize("mix", ["none", "cutmix", "classmix"])
@pytest.mark.parametrize("pairs", [2, 3])
def test_both_students_and_the_labels_show_the_same_pixels(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch, mix: str, pairs: int
) -> None:
    views = {"mix": mix, "jitter": 0, "blur_probability": 0}
    settings = update(tiny, {"views": views, "loss": {"confidence_weight": "none"}}, "test")
    engine = make(settings, pairs)
    engine.method.teachers = Networks(ByColour().eval() for _ in range(pairs))
    seen: list[Tensor] = []
    for student in engine.method.students:
        student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batches: list[dict[str, Tensor]] = []
    monkeypatch.setattr(engine.method, "after_step", lambda b, _: batches.append(b))
    classes = batch(4, seed=3)[1]
    images = torch.stack([20 * classes, classes, classes], dim=1)
    engine(batch(4), (images, torch.zeros_like(classes)))
    targets = [batches[0][f"label {k}"] for k in range(pairs)]
    for strong, target in zip(seen, targets, strict=True):
        assert torch.equal(strong, seen[0])
        shown = ((strong[4:, 0] * INFO.std[0] + INFO.mean[0]) * 255 / 20).round().long()
        assert torch.equal(target, shown)
    changed = not torch.equal(targets[0], classes.long())
    assert changed == (mix != "none")


@pytest.mark.parametrize("per_student", [True, False])
def test_colours_may_differ_between_students(tiny: Settings, per_student: bool) -> None:
    settings = update(
        tiny, {"views": {"per_student": per_student, "jitter_probability": 1}}, "test"
    )
    engine = make(settings, 2)
    seen: list[Tensor] = []
    for student in engine.method.students:
        student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    engine(batch(), unlabelled())
    assert torch.equal(seen[0], seen[1]) != per_student


def test_padding_of_unlabelled_images_is_never_a_label(tiny: Settings) -> None:
    b = prepared(make(update(tiny, {"views": {"mix": "none"}}, "test"), 2), *unlabelled())
    assert torch.equal(b["mixed"], b["unlabeled"])
    for k in range(2):
        assert torch.equal(b[f"label {k}"] == IGNORE, b["padding"])


@pytest.mark.parametrize("method", ["cps", "dual-teachers", "fixmatch"])
def test_nothing_but_padding_teaches_nothing(tiny: Settings, method: str) -> None:
    engine = make(dataclasses.replace(tiny, method=method), 2)
    images, padding = unlabelled()
    terms = engine(batch(), (images, torch.full_like(padding, IGNORE)))
    assert float(terms["ct"]) == 0
    assert all(torch.isfinite(value) for value in terms.values())


def test_a_teacher_without_finite_probabilities_labels_nothing(tiny: Settings) -> None:
    """The largest of NaNs is at index 0: the students would be trained towards class 0."""
    change = {"views": {"mix": "none"}, "loss": {"confidence_weight": "none"}}
    engine = make(update(tiny, change, "test"), 2)
    # teacher 2 labels for student 1
    engine.method.teachers[1].classifier.bias.data.fill_(float("inf"))
    b = prepared(engine, *unlabelled())
    assert (b["label 0"] == IGNORE).all()
    assert (b["confidence 0"] == 0).all()
    assert torch.equal(b["label 1"] == IGNORE, b["padding"])
    terms = engine(batch(), unlabelled())
    assert all(torch.isfinite(value) for value in terms.values())
    assert float(terms["lost_pixels"]) == 0.5


def test_pairs_of_different_strides_teach_each_other(tiny: Settings) -> None:
    """Each cross-entropy is at its network's own stride, contrast on the coarser grid."""
    change = {
        "model": {"name": "vit", "backbone": ["test_vit", "vit_small_patch14_dinov2"]},
        "loss": {"gamma": 0.0, "hc": 1, "lc": 0},
        "bank": {"capacity": 1},
        "optim": {"lr": 1e-4},
    }
    engine = make(update(tiny, change, "test"), 2)
    assert [student.stride for student in engine.method.students] == [8, 7]
    seen: list[Tensor] = []
    for student in engine.method.students:
        student.register_forward_hook(lambda _, inputs, out: seen.append(out.logits.detach()))
    hc = 0.0
    for i in range(6):
        seen.clear()
        images, label = batch(4, seed=i, classes=2)
        terms = engine((images, label), unlabelled(4, seed=i))
        label = label.long()
        expected = sum(
            losses.pixel_cross_entropy(
                logits[:4], Grid.of_patches(stride), label, losses.valid_pixels(label)
            )
            for logits, stride in zip(seen, (8, 7), strict=True)
        )
        assert float(terms["sup"]) == pytest.approx(float(expected), rel=1e-5)
        hc = max(hc, float(terms["hc"]))
    assert hc > 0


GRIDS = [
    (Grid(4), Grid(8)),
    (Grid(7), Grid(8)),
    (Grid.of_patches(7), Grid.of_patches(8)),
    (Grid(4), Grid.of_patches(14)),
    (Grid.of_patches(7), Grid(8)),
    (Grid(8), Grid(8)),
    (Grid(8), Grid(8).every(2)),
    (Grid.of_patches(7), Grid.of_patches(7).every(2)),
]


@pytest.mark.parametrize(("grid", "coarse"), GRIDS)
def test_the_nearest_cells_of_a_finer_grid(grid: Grid, coarse: Grid) -> None:
    def columns(grid: Grid) -> Tensor:
        return grid.origin + grid.stride * torch.arange(-(-100 // grid.stride))

    fine = columns(grid).expand(1, 2, 50 // grid.stride, -1)  # a cell holds its column
    wanted = columns(coarse)
    found = losses.coarsen(fine, grid, coarse, (50 // coarse.stride, len(wanted)))[0, 0, 0]
    nearest = (wanted[:, None] - columns(grid)).abs().amin(dim=1)
    assert torch.equal((found - wanted).abs(), nearest)


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_labels_come_from_the_other_teachers(tiny: Settings, pairs: int) -> None:
    engine = make(update(tiny, {"views": {"mix": "none"}}, "test"), pairs)
    b = prepared(engine, *unlabelled())
    images, padding = b["unlabeled"], b["padding"]
    normalized = normalize(images, INFO)
    for k in range(pairs):
        others = [j for j in range(pairs) if j != k] or [k]
        mean = torch.zeros(len(images), 11, 24, 24)
        for j in others:
            logits = engine.method.teachers[j](normalized).logits
            mean += at_pixels(logits, (24, 24), 2).softmax(dim=1) / len(others)
        label = mean.argmax(dim=1).masked_fill(padding, IGNORE)
        first, second = mean.topk(2, dim=1).values.unbind(1)
        clear = first - second > 1e-6  # elsewhere rounding decides
        assert torch.equal(b[f"label {k}"][clear], label[clear])
        assert clear.float().mean() > 0.99
        assert torch.allclose(b[f"confidence {k}"], mean.amax(dim=1), atol=1e-6)


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_steps_of_k_pairs(tiny: Settings, pairs: int) -> None:
    change = {"loss": {"gamma": 0.3}, "bank": {"capacity": 2}, "train": {"iterations": 12}}
    settings = update(tiny, change, "test")
    engine = make(settings, pairs)
    seen = {"hc": 0.0, "lc": 0.0}
    for i in range(12):
        terms = engine(batch(seed=i), unlabelled(seed=10 + i))
        assert all(torch.isfinite(value) for value in terms.values())
        seen = {name: max(value, float(terms[name])) for name, value in seen.items()}
    assert engine.iteration == 12
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
    engine = make(settings, 2)
    method: Any = engine.method
    # the teachers know classes 0 to 5; 6 to 10 never come
    method.teachers = Networks(WithFeatures().eval() for _ in range(2))
    method.ema.averaged, method.ema.copied = ([], []), {}
    labels = batch(classes=6)[1]
    images = torch.stack([20 * labels, labels, labels], dim=1)
    first = engine((images, labels), unlabelled())
    assert float(first["hc"]) == 0
    for _ in range(3):
        later = engine((images, labels), unlabelled())
    assert method.banks[0].full.tolist()[6:] == [False] * 5
    assert method.banks[0].full.any()
    assert float(later["hc"]) > 0
    assert sum(int(count.sum()) for count in usable_counts(method.banks, "all")) == 0


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
        engine = make(settings, 2)
        for _ in range(3):  # the first one fills the banks
            terms = engine(batch(), unlabelled())
        assert terms["hc"] > 0
        assert terms["lc"] > 0
    calls = len(seen) // 2
    first_step = 2  # before it the weights are the same, later ones have learnt from other pixels
    for whole, thin in zip(seen[:first_step], seen[calls : calls + first_step], strict=True):
        for maps, some in zip(whole, thin, strict=True):
            assert torch.equal(maps[..., ::2, ::2], some)


def test_teachers_follow_but_never_learn(tiny: Settings) -> None:
    engine = make(tiny, 2)
    method = engine.method
    storages = {p.data_ptr() for net in method.students for p in net.parameters()}
    for teacher in method.teachers:
        assert not storages & {p.data_ptr() for p in teacher.parameters()}
    before = copy.deepcopy(method.teachers[0])
    engine(batch(), unlabelled())
    decay = min(1 - 1 / 2, tiny.ema.decay)
    student, teacher = method.students[0], method.teachers[0]
    for old, new, own in zip(
        before.parameters(), teacher.parameters(), student.parameters(), strict=True
    ):
        assert new.grad is None
        assert not new.requires_grad
        assert torch.allclose(new, decay * old + (1 - decay) * own, atol=1e-7)
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, dict(student.named_buffers())[name])
    assert not method.train().teachers[0].training
    assert student.training


def test_averaged_buffers_leave_counters_alone(tiny: Settings) -> None:
    engine = make(update(tiny, {"ema": {"buffers": "average"}}, "test"), 1)
    teacher = engine.method.teachers[0]
    old = dict(copy.deepcopy(teacher).named_buffers())
    engine(batch(), unlabelled())
    own = dict(engine.method.students[0].named_buffers())
    for name, buffer in teacher.named_buffers():
        if buffer.is_floating_point():
            assert torch.allclose(buffer, 0.5 * old[name] + 0.5 * own[name], atol=1e-6)
        else:
            assert torch.equal(buffer, own[name])


def test_students_start_different(tiny: Settings) -> None:
    weights = [net.state_dict()["stem.0.weight"] for net in make(tiny, 3).method.students]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    again = make(tiny, 3).method.students[2]
    assert torch.equal(weights[2], again.state_dict()["stem.0.weight"])


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_crops_without_any_label_do_no_harm(tiny: Settings, amp: str) -> None:
    settings = update(tiny, {"train": {"amp": amp}}, "test")
    engine = make(settings, 2)
    images, label = batch()
    terms = engine((images, torch.full_like(label, IGNORE)), unlabelled())
    assert float(terms["sup"]) == 0
    for network in engine.method.networks().values():
        assert all(torch.isfinite(p).all() for p in network.parameters())


def test_supervised_takes_no_unlabelled_images(tiny: Settings) -> None:
    engine = make(dataclasses.replace(tiny, method="supervised"), 1)
    assert set(engine(batch(), None)) == {"sup", "total"}


def test_mean_teacher_has_no_contrast(tiny: Settings) -> None:
    engine = make(dataclasses.replace(tiny, method="mean-teacher"), 1)
    assert set(engine(batch(), unlabelled())) == {"sup", "ct", "total", "lost_pixels"}


def test_banks_hold_well_classified_pixels_of_the_teacher(tiny: Settings) -> None:
    engine = make(tiny, 2)
    method: Any = engine.method
    method.teachers = Networks(WithFeatures().eval() for _ in range(2))
    labels = batch(classes=4)[1]
    shown = labels.clone()
    shown[labels == 2] = 3  # the teacher will say 3 where the truth is 2
    images = torch.stack([20 * shown, shown, shown], dim=1)
    with torch.no_grad():
        b = {"images": to_unit(images), "label": labels.long()}
        method.banks.fill(b, method.teachers, method.slow_projections, engine.step)
    for bank in method.banks:
        held = bank.count.tolist()
        assert held[2] == 0
        assert all(held[c] == min(4, 4) for c in (0, 1, 3))
        for c in (0, 1, 3):
            assert torch.allclose(bank.queue(c).norm(dim=1), torch.ones(held[c]))
            assert (bank.queue(c).argmax(dim=1) == c).all()


def test_learning_rate_warms_up_and_decays(tiny: Settings) -> None:
    optim = dataclasses.replace(tiny.optim, lr=1.0, warmup=2, power=0.9)
    assert [learning_rate(optim, 10, i) for i in (0, 1)] == [0.5, 1.0]
    assert learning_rate(optim, 10, 5) == pytest.approx(0.5**0.9)


def test_parts_of_a_batch_add_up_to_it(tiny: Settings) -> None:
    """But for batch norm, which is held still here, and for the contrast."""
    change = {"loss": {"hc": 0, "lc": 0, "confidence_weight": "uniform"}, "optim": {"lr": 0.01}}
    images, label = batch(4)
    label[0] = IGNORE  # parts with unequal numbers of labelled pixels
    ends = []
    for parts in (1, 2, 4):
        settings = update(update(tiny, change, "test"), {"train": {"accumulate": parts}}, "test")
        engine = make(settings, 2)
        engine.method.eval()
        terms = engine((images, label), unlabelled(4))
        ends.append((terms, engine.method.students[1].state_dict()))
    for terms, weights in ends[1:]:
        for name in ("sup", "ct", "total"):
            assert float(terms[name]) == pytest.approx(float(ends[0][0][name]), rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, ends[0][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("contrast_stride", [1, 2])
def test_crops_that_are_no_multiple_of_the_stride(tiny: Settings, contrast_stride: int) -> None:
    settings = update(tiny, {"loss": {"contrast_stride": contrast_stride}}, "test")
    engine = make(settings, 2)
    for i in range(4):
        cut = [(x[..., :23, :21], y[..., :23, :21]) for x, y in (batch(seed=i), unlabelled(seed=i))]
        terms = engine(*cut)
    assert all(torch.isfinite(value) for value in terms.values())
    assert float(terms["hc"] + terms["lc"]) > 0


def test_contrast_of_parts_is_finite(tiny: Settings) -> None:
    settings = update(tiny, {"train": {"accumulate": 2}}, "test")
    engine = make(settings, 2)
    for i in range(4):
        terms = engine(batch(4, seed=i), unlabelled(4, seed=i))
    assert all(torch.isfinite(value) for value in terms.values())
    assert float(terms["hc"] + terms["lc"]) > 0


def test_the_contrast_of_equal_parts_is_that_of_one(tiny: Settings) -> None:
    change = {
        "views": {"mix": "none", "jitter": 0, "blur_probability": 0},
        "optim": {"lr": 1e-9},
        "loss": {"gamma": 0.12},
    }
    found = []
    for parts in (1, 2):
        settings = update(update(tiny, change, "test"), {"train": {"accumulate": parts}}, "test")
        engine = make(settings, 2)
        engine.method.eval()
        for i in range(4):
            twice = [torch.cat([x, x]) for x in (*batch(2, seed=i), *unlabelled(2, seed=i))]
            terms = engine((twice[0], twice[1]), (twice[2], twice[3]))
        found.append({name: float(terms[name]) for name in ("hc", "lc")})
    assert min(found[0].values()) > 0
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_layers_that_draw_numbers_draw_those_of_the_step(tiny: Settings) -> None:
    """Whatever else has drawn from PyTorch's generator, as before a resume."""
    ends = []
    for others in (0, 7):
        engine = make(tiny, 2)
        for student in engine.method.students:
            student.classifier.register_forward_pre_hook(
                lambda _, inputs: (functional.dropout(inputs[0], 0.5),)
            )
        for i in range(3):
            torch.rand(others * i)
            engine(batch(seed=i), unlabelled(seed=i))
        ends.append(engine.method.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


@pytest.mark.parametrize(("shape", "axis"), [((4, 3), 1), ((3, 11), 0), ((5,), None)])
def test_draws_of_processes_are_those_of_one(
    tiny: Settings, shape: tuple[int, ...], axis: int | None
) -> None:
    def context(rank: int, processes: int) -> StepContext:
        return StepContext(tiny, INFO, CPU, World(rank, processes), {})

    whole = [n * 2 if i == axis else n for i, n in enumerate(shape)]
    one, parts = context(0, 1), [context(rank, 2) for rank in (0, 1)]
    for iteration in (0, 7):  # the first time by itself, later with all that is known
        for c in (one, *parts):
            c.begin(iteration)
        expected = one.rand("mix", whole, axis)
        first, second = (c.rand("mix", shape, axis) for c in parts)
        joined = first if axis is None else torch.cat([first, second], dim=axis)
        assert torch.equal(joined, expected)
    fresh = context(0, 1)
    fresh.begin(7)
    assert torch.equal(fresh.rand("mix", whole, axis), expected)
    assert not torch.equal(fresh.rand("other", whole, axis), expected)
    with pytest.raises(ValueError, match="drawn as"):
        fresh.rand("mix", [*whole, 2], axis)


@pytest.mark.parametrize("how", ["network", "blocks"])
def test_compiled_networks_in_bf16_train_alike(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """With the tracing of torch.compile; generating code takes too long here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ends = []
    for change in ({}, {"compile": how, "amp": "bf16"}):
        settings = update(tiny, {"train": change, "optim": {"lr": 0.01}}, "test")
        engine = make(settings, 2)
        terms = [engine(batch(seed=i), unlabelled(seed=i)) for i in range(4)]
        ends.append([float(values["sup"]) for values in terms])
        assert all(torch.isfinite(x).all() for x in engine.method.students[0].state_dict().values())
    assert ends[1] == pytest.approx(ends[0], rel=0.03)
    assert ends[1] != ends[0]


def test_phases_of_a_step_are_timed(tiny: Settings) -> None:
    engine = make(tiny, 2)
    phases = engine.step.phase
    phases.timing = True
    feed = DevicePrefetcher(iter([batch()]), iter([unlabelled()]), phases)
    engine(*feed())
    spent = phases.seconds()
    assert tuple(spent) == NAMES
    assert all(value > 0 for value in spent.values())
    assert phases.seconds() == {}
    assert feed.waited() > 0
    assert feed.waited() == 0


def test_what_a_graph_records_is_the_step(tiny: Settings) -> None:
    """Learning rate, ramp and decay then come as tensors; here an ordinary call reads them."""
    change = {"loss": {"ct_ramp": 5, "confidence_weight": "none"}, "optim": {"warmup": 3}}
    ends = []
    for graph in (False, True):
        settings = update(update(tiny, change, "test"), {"train": {"cuda_graph": graph}}, "test")
        engine = make(settings, 2)
        engine._replay = lambda _, inputs, body: body([x.clone() for x in inputs])  # type: ignore
        for i in range(4):
            terms = engine(batch(seed=i), unlabelled(seed=i))
        ends.append((terms, engine.method.teachers[0].state_dict()))
    for name, value in ends[0][0].items():
        assert float(ends[1][0][name]) == pytest.approx(float(value), rel=1e-4)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], value, rtol=1e-4, atol=1e-6)
