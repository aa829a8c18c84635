"""Two different encoders that teach each other: patches of 14 and 16, features of 8 and 10."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ctt
from ctt import checkpoint, models, recipes
from ctt.cli import evaluate, export, predict
from ctt.cli import train as program
from ctt.cli.common import INTERRUPTED
from ctt.data.dataset import IGNORE
from ctt.data.digits import INFO
from ctt.errors import UserError
from ctt.methods import losses
from ctt.methods.base import Setup
from ctt.methods.optim import make_optimizer
from ctt.models.weights import published_input
from ctt.settings import Settings, to_dict, update
from ctt.train import loop
from tests.data import trees
from tests.methods.test_contract import assert_same, close, train_exactly
from tests.models.tiny import PATCH14
from tests.train.processes import finish, shown, start
from tests.train.steps import batch, make, run, unlabelled

TWO: dict[str, Any] = {
    "data": {"batch_size": 4},
    "model": {"name": "dpt", "backbone": [PATCH14, "test_vit"], "features": 0},
    "loss": {"confidence_weight": "none", "contrast_stride": 2},
    "optim": {"name": "adamw", "lr": 1e-2, "pair_lr": [1e-2, 5e-3]},
    "bank": {"capacity": 1, "per_class": 1},
}


def two(tiny: Settings, **change: Any) -> Settings:
    return update(update(tiny, TWO, "test"), change, "test")


def train_two(settings: Settings, size: int, file: Path) -> None:
    """Train in a process that knows the small encoders, because it has imported this module."""
    train_exactly(settings, size, file)


def test_two_processes_equal_one_with_twice_the_batch(tiny: Settings, tmp_path: Path) -> None:
    settings = two(tiny)
    both = start(2, tmp_path / "log", train_two, settings, 8, tmp_path / "two")
    train_two(settings, 8, tmp_path / "one")
    assert finish(both) == [0, 0], shown(tmp_path / "log")
    one, *others = (torch.load(tmp_path / f"{file}.pt") for file in ("one-0", "two-0", "two-1"))
    assert all(float(one["seen"][-1][term]) > 0 for term in ("sup", "ct", "hc", "lc"))
    for state in others:
        close(state, one)


def test_stopped_and_resumed_equals_undisturbed(tiny: Settings, tmp_path: Path) -> None:
    settings = two(tiny, loss={"labels_from": "all"}, model={"drop_path": [0.0, 0.3]})
    undisturbed = make(settings)
    run(undisturbed, 4, 3)
    checkpoint.save(tmp_path / "last.pt", undisturbed.state_dict())
    run(undisturbed, 4, 2, first=3)
    resumed = make(settings)
    resumed.load_state_dict(checkpoint.load(tmp_path / "last.pt"))
    run(resumed, 4, 2, first=3)
    assert_same(resumed.state_dict(), undisturbed.state_dict())


def test_features_of_two_widths_are_contrasted_at_the_smaller(tiny: Settings) -> None:
    engine = make(two(tiny))
    method: Any = engine.method
    assert [net.feature_channels for net in method.students] == [8, 10]
    assert {bank.keys.shape[2] for bank in method.banks} == {8}
    before = [p.weight.clone() for p in method.projections]
    slow = [p.weight.clone() for p in method.slow_projections]
    run(engine, 4, 2)
    for k in range(2):
        assert not torch.equal(method.projections[k].weight, before[k])
        assert not torch.equal(method.slow_projections[k].weight, slow[k])
    # keys are what the teachers' own projections make of the teachers' features
    teacher, step = method.teachers[1], engine.step
    images, label = batch(4, seed=1)
    with torch.no_grad():
        out = step.forward(teacher, images.float() / 255)
        keys = torch.nn.functional.normalize(method.slow_projections[1](out.features), dim=1)
    bank = method.banks[1]
    truth = losses.to_grid(label.long(), teacher.grid)
    right = out.logits.argmax(dim=1) == truth
    for c in bank.count.nonzero().flatten().tolist():
        own = keys.movedim(1, -1)[right & (truth == c)]
        if len(own):  # pushed in this step, the last of the queue
            newest = bank.keys[c, (int(bank.cursor[c]) - 1) % bank.capacity]
            assert float((own - newest).abs().sum(dim=1).min()) < 1e-4


def test_one_width_has_no_projections(tiny: Settings) -> None:
    method: Any = make(two(tiny, model={"features": 6})).method
    assert not list(method.projections.parameters())


def test_before_the_contrast_begins_every_process_goes_on(tiny: Settings, tmp_path: Path) -> None:
    """Projections have no gradient yet, for which the others would wait."""
    settings = two(tiny, bank={"start_after": 100})
    both = start(2, tmp_path / "log", train_two, settings, 4, tmp_path / "two")
    assert finish(both) == [0, 0], shown(tmp_path / "log")


def test_labels_of_all_are_weighted_by_how_sure_each_is(tiny: Settings) -> None:
    rng = torch.Generator().manual_seed(0)
    p = [torch.rand(2, 3, 4, 5, generator=rng).softmax(dim=1) ** 4 for _ in range(3)]
    p = [x / x.sum(dim=1, keepdim=True) for x in p]
    p[1][0, :, 1, 2] = math.nan
    found = losses.surest_of(p)
    for b in range(2):
        for y in range(4):
            for x in range(5):
                cells = [q[b, :, y, x] for q in p if not q[b, :, y, x].isnan().any()]
                weights = [float(c.max()) for c in cells]
                mean = sum(w * c for w, c in zip(weights, cells, strict=True)) / sum(weights)
                torch.testing.assert_close(found[b, :, y, x], mean)
    engine = make(two(tiny, loss={"labels_from": "all"}))
    images, padding = unlabelled(4)
    b = {"images": images.float() / 255, "unlabeled": images.float() / 255}
    b |= {"label": batch(4)[1].long(), "padding": padding == IGNORE}
    engine.step.begin(0)
    with torch.no_grad():
        given = [engine.step.probability(net, b["unlabeled"]) for net in engine.method.teachers]
        told = list(engine.method.teachings(given))  # type: ignore[operator]
    assert len(told) == 2
    assert told[0] is told[1]
    torch.testing.assert_close(told[0], losses.surest_of(given))


def test_each_pair_has_its_own_rates(tiny: Settings) -> None:
    settings = two(tiny, optim={"lr": 1e-3, "pair_lr": [1e-3, 3e-3], "pair_head_lr_factor": [4, 5]})
    setup = Setup(settings, INFO, 2, 6)
    students = [setup.student(k) for k in range(2)]
    groups = make_optimizer(students, settings).param_groups
    assert [g["lr_factor"] for g in groups] == pytest.approx([1, 4, 3, 15])
    drop = two(tiny, model={"drop_path": [0.0, 0.4]})
    rates = [
        max([m.drop_prob for m in net.modules() if type(m).__name__ == "DropPath"], default=0.0)
        for net in (Setup(drop, INFO, 2, 6).student(k) for k in range(2))
    ]
    assert rates == pytest.approx([0.0, 0.4])


def test_architectures_may_differ(tiny: Settings) -> None:
    names = {"pair_name": ["small", "dpt"], "backbone": ["", "test_vit"], "width": 4}
    engine = make(two(tiny, model=names))
    assert [net.options["name"] for net in engine.method.students] == ["small", "dpt"]
    for terms in run(engine, 4, 2):
        assert all(bool(x.isfinite()) for x in terms.values())
    assert settings_of_both("deeplabv3plus", "dpt")[0]["output_stride"] == 8
    assert settings_of_both("deeplabv3plus", "dpt")[1]["output_stride"] == 0


def settings_of_both(*names: str) -> list[dict[str, Any]]:
    change = {"model": {"pair_name": list(names), "output_stride": 8}}
    settings = update(Settings(), change, "test")
    return [settings.network(k) for k in range(2)]


@pytest.mark.parametrize("name", ["dpt", "vit", "deeplabv2", "deeplabv3plus"])
def test_a_backbone_has_the_normalisation_of_its_weights(tiny: Settings, name: str) -> None:
    backbone = "test_vit" if name in ("dpt", "vit") else "resnet18"
    model = {"name": name, "backbone": [backbone], "normalization": "weights", "features": 8}
    setup = Setup(update(tiny, {"model": model}, "test"), INFO, 1, 6)
    own: Any = setup.student(0).eval()
    plain: Any = models.build(num_classes=11, **own.options | {"normalization": "data"}).eval()
    state = {n: x for n, x in own.state_dict().items() if not n.startswith("input_")}
    plain.load_state_dict(state)
    images = torch.rand(1, 3, 48, 48)

    def normal(mean: Any, std: Any) -> torch.Tensor:
        return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    found = own(normal(INFO.mean, INFO.std)).logits
    expected = plain(normal(*published_input(backbone))).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain(normal(INFO.mean, INFO.std)).logits, rtol=1e-3)


def test_a_network_without_backbone_has_none() -> None:
    with pytest.raises(UserError, match="the network small has no backbone with published"):
        models.build("small", 5, normalization="weights")


def test_crops_must_be_whole_patches_of_both(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run"), "--train.iterations", "1"]
    model = ["--model.name", "dpt", "--model.backbone", PATCH14, "test_vit"]
    with pytest.raises(UserError, match="whole patches of 14 and 16 pixels") as told:
        program._main([*model, *out, "--data.crop", "100", "220"])
    assert "multiples of 112, such as 112 224" in str(told.value)


SMALL = (
    "--model.weights none --model.backbone {} test_vit --train.iterations 3 --train.log-every 1 "
    "--train.eval-every 3 --train.no-tensorboard --train.deterministic --train.measured-images 0 "
    "--train.threads 1 --data.workers 0 --data.batch-size 2 --data.crop 112 112 "
    "--bank.capacity 4 --loss.gamma 0.05 --model.normalization data"
)


class AfterTwoSteps:
    """What a run looks at to know whether it is to stop."""

    def __init__(self) -> None:
        self.asked = 0

    def __bool__(self) -> bool:
        self.asked += 1
        return self.asked == 2


@pytest.mark.parametrize("dataset", ["voc", pytest.param("cityscapes", marks=pytest.mark.slow)])
def test_the_recipe_from_training_to_masks(
    tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a made-up tree: trained, stopped, resumed bit-equal, evaluated, predicted, exported."""
    root, out, whole = tmp_path / "data", tmp_path / "run", tmp_path / "whole"
    if dataset == "voc":
        trees.write_voc(root, classic=8, augmented=12, evaluation=1)
        given = ["--recipe", "voc-classic-two-encoders", "--ratio", "1/4"]
        picture = next((root / "VOCdevkit" / "VOC2012" / "JPEGImages").iterdir())
    else:
        trees.write_cityscapes(root, train=12, evaluation=1)
        given = ["--recipe", "cityscapes-two-encoders", "--ratio", "1/4"]
        given += ["--eval.window", "112", "112"]
        picture = next((root / "leftImg8bit" / "val" / "lindau").iterdir())
    given += ["--data-root", str(root), *SMALL.format(PATCH14).split()]
    assert program._main([*given, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "interrupt_flag", lambda: contextlib.nullcontext(AfterTwoSteps()))
        assert program._main([*given, "--out", str(out)]) == INTERRUPTED
    assert checkpoint.load(out / "checkpoints" / "last.pt")["iteration"] == 2
    assert program._main(["--resume", str(out)]) == 0
    once, twice = (checkpoint.load(x / "checkpoints" / "last.pt") for x in (whole, out))
    for part in ("method", "optimizers"):
        assert_same(once[part], twice[part])
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert set(summary["miou"]) == {"student_1", "student_2", "teacher_1", "teacher_2", "ensemble"}
    assert summary["protocol"]["fit"] == "resize"
    scores = tmp_path / "scores"
    assert evaluate._main([str(out), "--out", str(scores), "--workers", "0"]) == 0
    again = json.loads((scores / "summary.json").read_text("utf-8"))
    assert again["miou"] == summary["miou"]
    for network in ("teacher_1", "student_2", "ensemble"):
        masks = ["--out", str(tmp_path / network), "--network", network]
        assert predict._main([str(out), str(picture), *masks]) == 0
        (mask,) = (tmp_path / network).glob("*_mask.png")
        with Image.open(picture) as photo, Image.open(mask) as found:
            assert found.size == photo.size
    file = tmp_path / "net.safetensors"
    options = ["--network", "teacher_2", "--format", "safetensors", "--out", str(file)]
    assert export._main([str(out), *options]) == 0
    assert ctt.load(file).classes == ctt.load(out).classes


RECIPES = {  # rates of CLIP's encoder, crop
    "voc-classic": (1e-6, 560),
    "cityscapes": (5e-6, 784),
    "ade20k": (4e-7, 560),
    "coco": (4e-7, 560),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_recipes_differ_from_one_encoder_where_they_say(name: str) -> None:
    rate, crop = RECIPES[name]
    alone, both = (
        update(Settings(), recipes.load(f"{name}-{kind}"), "test")
        for kind in ("dinov2-cross-teacher", "two-encoders")
    )
    assert both.optim.pair_lr == (5e-6, rate)
    heads = [
        lr * x for lr, x in zip(both.optim.pair_lr, both.optim.pair_head_lr_factor, strict=True)
    ]
    assert heads == pytest.approx([2e-4, 2e-4])
    assert both.data.crop == (crop, crop)
    assert crop % 112 == 0
    first, second = to_dict(alone), to_dict(both)
    changed = {
        f"{group}.{key}" if isinstance(value, dict) else group
        for group, value in first.items()
        for key in (value if isinstance(value, dict) else [None])
        if (value[key] != second[group][key] if key else value != second[group])
    }
    expected = {"data.crop", "model.backbone", "model.normalization"}
    expected |= {"optim.pair_lr", "optim.pair_head_lr_factor"}
    expected |= {"eval.window"} if name == "cityscapes" else set()
    assert changed == expected
