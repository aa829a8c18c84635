from pathlib import Path

import pytest

from ctt import recipes
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


def test_the_set_of_voc_in_a_file_counts_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("dataset: voc\ndata: {voc_set: classic}\n")
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
