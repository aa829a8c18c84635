import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from ctt import recipes
from ctt.errors import UserError
from ctt.settings import Settings, to_dict, update, validate

OWN_METHOD = """
from ctt.methods.supervised import Supervised
class Mine(Supervised):
    pass
"""


def test_settings_survive_yaml() -> None:
    settings = update(Settings(), recipes.load("digits"), "recipe")
    text = yaml.safe_dump(to_dict(settings))
    again = update(Settings(), yaml.safe_load(text), "file")
    assert again == settings
    assert again.hash() == settings.hash()
    assert again.hash() != Settings().hash()


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_valid(name: str) -> None:
    validate(update(Settings(), recipes.load(name), name))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"loss": {"tau": 1}}, "there is no setting loss.tau"),
        ({"loss": 3}, "must hold settings"),
        ({"loss": {"tau_hc": "warm"}}, "must be of type float"),
        ({"train": {"iterations": 1.5}}, "must be of type int"),
        ({"train": {"deterministic": 1}}, "must be true or false"),
        ({"data": {"crop": [3]}}, "list of 2 numbers"),
        ({"eval": {"scales": ["big"]}}, "must be of type float"),
        ({"views": {"mix": "mixup"}}, "must be one of none, classmix"),
    ],
)
def test_bad_values_are_named(values: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        update(Settings(), values, "file.yaml")


def test_yaml_numbers_become_what_the_setting_wants() -> None:
    values = yaml.safe_load(
        "{optim: {lr: 1, weight-decay: 5e-4}, data: {crop: [8, 9]}, train: {amp: off}, "
        "eval: {scales: [1, 2, 5e-1]}}"
    )
    settings = update(Settings(), values, "file")
    assert settings.optim.lr == 1.0
    assert settings.optim.weight_decay == 5e-4
    assert settings.data.crop == (8, 9)
    assert settings.train.amp == "off"
    assert settings.eval.scales == (1.0, 2.0, 0.5)


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("loss", "tau_hc", -1.0),
        ("loss", "tau_lc", 0.0),
        ("loss", "gamma", 1.5),
        ("optim", "lr", math.nan),
        ("optim", "lr", math.inf),
        ("bank", "capacity", 0),
        ("train", "iterations", 0),
        ("data", "scale", (2.0, 1.0)),
        ("ema", "decay", 1.1),
        ("eval", "scales", ()),
        ("eval", "scales", (1.0, 0.0)),
        ("eval", "scales", (math.nan,)),
        ("eval", "window", (801, 7)),
        ("eval", "stride", 0.0),
        ("eval", "stride", 802.0),
        ("eval", "batch_pixels", 0),
    ],
)
def test_values_out_of_range_name_their_field(group: str, name: str, value: object) -> None:
    settings = Settings()
    part = dataclasses.replace(getattr(settings, group), **{name: value})
    with pytest.raises(UserError, match=rf"`{group}\.{name}`"):
        validate(dataclasses.replace(settings, **{group: part}))


def test_the_hash_names_the_experiment_and_not_the_machine() -> None:
    elsewhere = {"data_root": "/data", "data": {"workers": 7}, "train": {"device": "cpu"}}
    assert update(Settings(), elsewhere, "test").hash() == Settings().hash()
    assert update(Settings(), {"seed": 1}, "test").hash() != Settings().hash()
    assert update(Settings(), {"pairs": 2}, "test").hash() == Settings().hash()
    assert update(Settings(), {"pairs": 3}, "test").hash() != Settings().hash()


@pytest.mark.parametrize(
    ("option", "ending"),
    [("split_labeled", ""), ("split_unlabeled", ""), ("weights", ""), ("method", ":Mine")],
)
def test_files_count_in_the_hash_by_what_they_hold(
    option: str, ending: str, tmp_path: Path
) -> None:
    def hash_of(folder: str, text: str) -> str:
        path = tmp_path / folder / "file.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{text}\n" + OWN_METHOD)
        values: dict[str, object] = {option: f"{path}{ending}"}
        return update(Settings(), {"model": values} if option == "weights" else values, "").hash()

    assert hash_of("a", "# first") == hash_of("b", "# first")
    assert hash_of("a", "# first") != hash_of("b", "# second")
