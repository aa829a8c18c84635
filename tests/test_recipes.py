from pathlib import Path

import pytest

import ctt
from ctt import data, methods, recipes
from ctt.cli.train import parse
from ctt.errors import UserError
from ctt.settings import Settings, to_dict, update

PAPER = ("voc-aug-deeplabv2", "voc-classic-deeplabv3plus", "cityscapes-deeplabv2")


def resolved(name: str) -> Settings:
    return update(Settings(), recipes.load(name), name)


@pytest.mark.parametrize(
    ("arguments", "network", "crop", "batch"),
    [
        ("--dataset voc", "deeplabv2", (321, 321), 10),
        ("--dataset voc --data.voc-set classic", "deeplabv3plus", (321, 321), 10),
        ("--data.voc-set=classic --dataset=voc", "deeplabv3plus", (321, 321), 10),
        ("--dataset cityscapes", "deeplabv2", (256, 512), 2),
        ("--dataset ade20k", "dpt", (518, 518), 2),
        ("--dataset coco", "dpt", (518, 518), 4),
        ("--recipe digits --dataset cityscapes", "small", (40, 40), 12),
        ("--dataset folder --train.device cpu", "small", (0, 0), 4),
        ("--dataset folder --train.device cuda", "deeplabv3plus", (321, 321), 10),
        ("--dataset folder --recipe folder", "deeplabv3plus", (321, 321), 10),
        ("", "small", (40, 40), 12),
    ],
)
def test_a_data_set_brings_its_recipe(
    arguments: str, network: str, crop: tuple[int, int], batch: int
) -> None:
    settings = parse(arguments.split())
    assert settings.model.name == network
    assert settings.data.crop == crop
    assert settings.data.batch_size == batch


def test_the_number_of_a_device_is_no_name(tmp_path: Path) -> None:
    """A GPU of that number may be meant: the message is that of other devices."""
    with pytest.raises(UserError, match=r"`train\.device` 0 cannot be used here"):
        ctt.train(dataset="folder", data_root=tmp_path, train={"device": 0}, out=tmp_path / "run")


def test_the_set_of_voc_in_a_file_counts_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for name in ("voc_set", "voc-set"):
        file.write_text(f"dataset: voc\ndata: {{{name}: classic}}\n")
        assert parse(["--config", str(file)]).model.name == "deeplabv3plus"
    file.write_text("dataset: voc\ndata: 3\n")
    with pytest.raises(UserError, match="data must hold settings"):
        parse(["--config", str(file)])


def test_another_network_brings_its_own_backbone(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("dataset: voc\nmodel: {name: vit}\n")
    for arguments, backbone in (
        ("--dataset voc", ("resnet101",)),
        ("--dataset voc --model.name vit", ()),
        (f"--config {file}", ()),
        ("--dataset voc --model.name deeplabv3plus --model.backbone resnet50", ("resnet50",)),
        ("--dataset voc --model.name deeplabv2", ("resnet101",)),
    ):
        assert parse(arguments.split()).model.backbone == backbone, arguments


@pytest.mark.parametrize("name", PAPER)
def test_the_constants_of_the_paper(name: str) -> None:
    s = resolved(name)
    assert (s.optim.lr, s.optim.head_lr_factor, s.optim.power) == (2.5e-4, 10, 0.9)
    assert (s.optim.momentum, s.optim.weight_decay, s.ema.decay) == (0.9, 5e-4, 0.99)
    assert (s.loss.sup, s.loss.ct, s.loss.hc, s.loss.lc) == (1, 1, 0.1, 0.1)
    assert (s.loss.tau_hc, s.loss.tau_lc, s.loss.gamma) == (0.5, 0.5, 0.75)
    assert (s.bank.capacity, s.bank.top_k, s.model.features) == (128, 256, 256)
    assert s.train.iterations == 80_000
    assert s.views.mix == ("classmix" if name.startswith("cityscapes") else "none")


@pytest.mark.parametrize("name", PAPER)
def test_the_released_form_differs_where_it_says(name: str) -> None:
    paper, released = (to_dict(resolved(n)) for n in (name, f"{name}-released"))
    changed = {
        f"{group}.{key}": value
        for group, values in released.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value != paper[group][key]
    }
    assert changed == {
        "loss.tau_hc": 0.1,
        "loss.hc_confidence": "teacher",
        "loss.confidence_weight": "uniform",
        "loss.lc_pixels": "unlabeled",
        "bank.capacity": 256,
        "bank.per_image": True,
        "bank.random_choice": False,
    }
    assert {k: v for k, v in released.items() if not isinstance(v, dict)} == {
        k: v for k, v in paper.items() if not isinstance(v, dict)
    }


def test_nested_settings_are_merged() -> None:
    low = {"optim": {"lr": 1, "power": 1}, "seed": 1}
    high = {"optim": {"lr": 2}}
    assert recipes.merge(low, high) == {"optim": {"lr": 2, "power": 1}, "seed": 1}


SETS = {
    # images of a GPU, iterations, crop
    "voc-classic": (4, 39_300, 518),
    "cityscapes": (2, 62_600, 798),
    "ade20k": (2, 149_000, 518),
    "coco": (4, 148_000, 518),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("method", ["unimatch-v2", "fixmatch", "cross-teacher"])
def test_the_constants_of_unimatch_v2(name: str, method: str) -> None:
    s = resolved(f"{name}-dinov2-{method}")
    images, iterations, crop = SETS[name]
    assert (s.data.batch_size, s.train.iterations, s.data.crop) == (images, iterations, (crop,) * 2)
    assert (s.data.scale, s.data.flip, s.data.rotation, s.data.translation) == (
        (0.5, 2),
        True,
        0,
        0,
    )
    assert s.data.voc_set == "classic"
    assert (s.model.name, s.model.backbone) == ("dpt", ("vit_base_patch14_dinov2.lvd142m",))
    assert (s.model.weights, s.model.features, s.model.freeze_backbone) == (("imagenet",), 0, False)
    assert (s.optim.name, s.optim.lr, s.optim.lr * s.optim.head_lr_factor) == ("adamw", 5e-6, 2e-4)
    assert (s.optim.betas, s.optim.weight_decay, s.optim.decay_vectors) == (
        (0.9, 0.999),
        0.01,
        True,
    )
    assert (s.optim.schedule, s.optim.power, s.optim.warmup) == ("poly", 0.9, 0)
    assert (s.optim.layer_decay, s.optim.clip_norm, s.model.drop_path) == (1, 0, (0,))
    assert (s.ema.decay, s.ema.buffers, s.train.amp) == (0.996, "average", "off")
    v = s.views
    assert (v.jitter, v.hue, v.jitter_probability, v.grey_probability) == (0.5, 0.25, 0.8, 0.2)
    assert (v.blur_probability, v.blur_sigma, v.mix) == (0.5, (0.1, 2), "small-box")
    assert not v.strong_labeled
    threshold, pairs = s.loss.confidence_threshold, s.pairs or methods.get(s.method).pairs
    if method == "unimatch-v2":
        assert (s.method, pairs, s.loss.sup) == ("unimatch-v2", 1, 1)
        assert (s.options.weight, threshold) == (1, 0.968)  # type: ignore[attr-defined]
        threshold = s.options.threshold  # type: ignore[attr-defined]
    else:
        assert (s.loss.confidence_weight, s.loss.unlabeled_mean) == ("threshold", "valid")
    if method == "fixmatch":
        assert (s.method, pairs, s.loss.sup, s.loss.ct) == ("mean-teacher", 1, 0.5, 0.5)
    if method == "cross-teacher":
        assert (s.method, pairs) == ("cross-teacher", 2)
        assert (s.loss.sup, s.loss.ct, s.loss.hc, s.loss.lc) == (1, 1, 0.1, 0.1)
    assert threshold == 0.95
    if name == "cityscapes":
        assert (s.labeled.ohem, s.labeled.ohem_kept * s.data.batch_size) == (0.7, 200_000)
        assert (s.eval.protocol, s.eval.window) == ("sliding", (798, 798))
        assert int(s.eval.stride * 798) == 532
    else:
        assert s.labeled.plain
        assert (s.eval.protocol, s.eval.fit) == ("whole", "resize")


@pytest.mark.parametrize("name", ["voc-classic", "ade20k"])
def test_the_frozen_form_differs_in_nothing_else(name: str) -> None:
    tuned = to_dict(resolved(f"{name}-dinov2-unimatch-v2"))
    frozen = to_dict(resolved(f"{name}-dinov2-unimatch-v2-frozen"))
    assert frozen["model"].pop("freeze_backbone")
    assert not tuned["model"].pop("freeze_backbone")
    assert frozen == tuned


@pytest.mark.parametrize("dataset", data.names())
def test_another_method_has_its_own_pairs(dataset: str) -> None:
    """Not those of the method of the dataset's recipe: rows of a comparison would be others."""
    pairs = parse(["--dataset", dataset, "--method", "mean-teacher"]).pairs
    assert (pairs or methods.get("mean-teacher").pairs) == 1
