import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ctt import recipes
from ctt.errors import UserError
from ctt.settings import Settings, to_dict, update, validate

OWN_METHOD = """
from ctt.methods.supervised import Supervised
class Mine(Supervised):
    pass
"""

OWN_OPTIONS = """
from dataclasses import dataclass, field
from ctt.methods import About
from ctt.methods.options import Options
from ctt.methods.supervised import Supervised
@dataclass(frozen=True)
class MyOptions(Options):
    scales: list[float] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
class Mine(Supervised):
    about = About(unlabeled=False, options=MyOptions)
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
    weights = {"model": {"weights": ["imagenet"]}}  # of what `frozen` is put over
    validate(update(update(Settings(), weights, "test"), recipes.load(name), name))


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
        ({"optim": {"lr": True}}, "must be of type float, got True"),
        ({"data": {"scale": [True, 2]}}, "must be of type float, got True"),
        ({"model": {"backbone": None}}, "must be of type str, got None"),
        ({"model": {"name": ["small"]}}, "must be of type str, got .'small'"),
        ({"dataset": {"folder": 1}}, "must be of type str, got .'folder'"),
        ({"views": {"mix": "mixup"}}, "must be one of none, classmix"),
        ({"data": {"batch-size": 4, "batch_size": 8}}, "batch-size and batch_size are two spell"),
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


def test_a_method_may_have_lists_as_options(tmp_path: Path) -> None:
    """A run of it could not be resumed: its own config.yaml was refused."""
    (tmp_path / "mine.py").write_text(OWN_OPTIONS)
    own = {"scales": [0.5, 1.0], "weights": {"sky": 2.0}}
    values = {"method": f"{tmp_path / 'mine.py'}:Mine", "options": own}
    assert to_dict(update(Settings(), values, "file"))["options"] == own


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


def test_folders_count_in_the_hash_by_what_they_hold(tmp_path: Path) -> None:
    def hash_of(group: dict[str, object]) -> str:
        return update(Settings(), group, "test").hash()

    for option in ("folder", "confidence"):
        here, copy, other = (tmp_path / option / place / "masks" for place in "abc")
        for folder, grey in ((here, 1), (copy, 1), (other, 2)):
            folder.mkdir(parents=True)
            Image.new("L", (4, 4), grey).save(folder / "1.png")
            (folder / ".hidden.png").touch()
            (folder / "log.txt").write_text(str(folder), "utf-8")
        one = hash_of({"masks": {option: str(here)}})
        assert one == hash_of({"masks": {option: str(copy)}})
        assert one != hash_of({"masks": {option: str(other)}})
        (copy / "2.png").write_bytes((here / "1.png").read_bytes())
        assert one != hash_of({"masks": {option: str(copy)}})
        gone = hash_of({"masks": {option: "/gone/masks"}})
        assert gone == hash_of({"masks": {option: "/elsewhere/masks"}})


def test_a_teacher_counts_in_the_hash_by_its_weights(tmp_path: Path) -> None:
    def hash_of(place: str, weights: bytes, file: str = "") -> str:
        folder = tmp_path / place / "run"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "best.safetensors").write_bytes(weights)
        return update(Settings(), {"teacher": str(folder / file)}, "test").hash()

    assert hash_of("a", b"1") == hash_of("b", b"1") == hash_of("a", b"1", "best.safetensors")
    assert hash_of("a", b"1") != hash_of("b", b"2")
    mine, others = (update(Settings(), {"teacher": f"hf:{x}/net"}, "test") for x in ("me", "you"))
    assert mine.hash() != others.hash()


def test_a_folder_of_data_counts_in_the_hash_and_its_path_does_not(tmp_path: Path) -> None:
    def dataset(place: str, image: str = "images/1.png", grey: int = 0, text: str = "") -> str:
        root = tmp_path / place
        for name in (image, "masks/1.png"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), grey).save(root / name)
        (root / "dataset.yaml").write_text(f"classes: [sky, sea]\n{text}", "utf-8")
        return hash_of(root)

    def hash_of(root: Path, name: str = "folder") -> str:
        return update(Settings(), {"dataset": name, "data_root": str(root)}, "test").hash()

    one = dataset("a")
    assert one == dataset("copy")
    assert one != dataset("b", grey=1)
    assert one != dataset("c", image="images/2.png")
    assert one != dataset("d", text="ignore_index: 9\n")
    assert one != dataset("e", image="unlabeled/1.png")
    assert hash_of(tmp_path / "gone") == update(Settings(), {"dataset": "folder"}, "").hash()
    assert hash_of(tmp_path / "a", "voc") == hash_of(tmp_path / "b", "voc")
