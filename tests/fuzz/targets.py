"""Inputs that nobody meant, for everything that reads files or arguments of others.

A target takes an input, and returns or raises `UserError`; what else it raises is a fault. Inputs
are like real ones with parts changed, because pure noise is refused at the first byte.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from ctt import checkpoint, data, models, recipes
from ctt.cli import data as data_program
from ctt.cli import evaluate, export, predict, train
from ctt.cli.common import BAD_INPUT, run_program
from ctt.data.dataset import Dataset
from ctt.data.description import KEYS, read_description
from ctt.data.digits import INFO
from ctt.data.labels import LabelMap
from ctt.data.masks import read_mask
from ctt.data.options import DatasetOptions
from ctt.data.pictures import read_image
from ctt.data.split import read_list
from ctt.errors import UserError
from ctt.models import weights
from ctt.settings import Settings, to_dict, update, validate
from tests.data import trees
from tests.fuzz import annotations

LONGEST = 5000  # letters of a message
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), max_size=4)


def changed(content: bytes, changes: list[tuple[float, bytes]]) -> bytes:
    """Bytes with others written over them; an empty change cuts the rest off."""
    result = bytearray(content)
    for place, new in changes:
        at = int(place * len(result))
        result[at : at + len(new) if new else None] = new
    return bytes(result)


WORDS = (
    *("images/photo 0.jpg", "masks/photo 0.png", "images/größer/photo 1.jpg", "photo 2", "None"),
    *("\t", " ", "\\", "/", "..", "C:\\", "\n", "\r\n", "\ufeff", "\x00", "\x1b[2J", "a" * 300),
)
LISTS = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from(WORDS), max_size=12).map(lambda words: "".join(words).encode()),
    st.lists(st.one_of(st.sampled_from([w.encode() for w in WORDS]), st.binary(max_size=3))).map(
        b"".join
    ),
)


@cache
def small_set(folder: Path) -> Dataset:
    trees.write_folder(folder / "set", labeled=3, unlabeled=2, evaluation=1)
    return data.open_dataset("folder", folder / "set", DatasetOptions())


def read_a_list(content: bytes, folder: Path) -> None:
    path = folder / "list.txt"
    path.write_bytes(content)
    read_list(path, small_set(folder), labeled=len(content) % 2 == 0)


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV")
FORMATS = {".png": "PNG", ".tif": "TIFF", ".bmp": "BMP", ".gif": "GIF", ".jpg": "JPEG"}


@cache
def picture(mode: str, form: str, pages: int) -> bytes:
    """An image file, or nothing where the format has no such images."""
    file = io.BytesIO()
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = Image.fromarray(values).convert(mode) if mode != "I;16" else Image.new(mode, (4, 3), 7)
    try:
        image.save(file, form, save_all=True, append_images=[image] * (pages - 1))
    except (OSError, ValueError, KeyError):
        return b""
    return file.getvalue()


PICTURES = st.tuples(
    st.sampled_from(sorted(FORMATS)),
    st.one_of(
        st.binary(max_size=40),
        st.builds(
            lambda mode, form, pages, changes: changed(picture(mode, form, pages), changes),
            st.sampled_from(MODES),
            st.sampled_from(sorted(FORMATS.values())),
            st.integers(1, 3),
            CHANGES,
        ),
    ),
)
LABELS = LabelMap({c: c for c in range(12)}, "abcdefghijkl", {(c, c, c): c for c in range(12)})


def read_a_picture(content: tuple[str, bytes], folder: Path) -> None:
    path = folder / f"picture{content[0]}"
    path.write_bytes(content[1])
    try:
        LABELS(read_mask(path, turned=True), path)
    except UserError:
        read_image(path, 300 if len(content[1]) % 2 else None)
        raise


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.integers(0, 300),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["a", "ignore", "none", "off", "1/2", "../x", "x.py:Mine", "\x1b"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.integers(0, 3), SCALARS), inner)
    ),
    max_leaves=8,
)
# a few lines that stand for 9**6 values
LISTS_OF_LISTS = [f"&a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else 'x')}]" for i in range(7)]
LAUGHS = f"classes: [{', '.join(LISTS_OF_LISTS)}]".encode()
COLOUR = st.lists(st.integers(-1, 256), min_size=3, max_size=3)
GOOD = {
    "classes": st.lists(st.sampled_from("abcd"), min_size=1, max_size=4),
    "palette": st.lists(COLOUR, min_size=1, max_size=4),
    "ignore_color": COLOUR,
    "ignore_index": st.integers(0, 300),
    "id_map": st.dictionaries(st.integers(0, 9), st.sampled_from(["a", "b", "ignore", 0, 1])),
    "mask_suffix": st.sampled_from(["_mask", ""]),
}
KEYS_OF_ANY_KIND = {key: st.one_of(GOOD.get(key, VALUES), VALUES) for key in KEYS}


def description_of(classes: int) -> st.SearchStrategy[Any]:
    """What fits a number of classes, but for what chance adds."""
    return st.fixed_dictionaries(
        {"classes": st.just([*"abcd"][:classes])},
        optional={
            "palette": st.just([[c, 2, 3] for c in range(classes)]),
            "id_map": st.dictionaries(st.integers(0, 9), st.integers(0, classes - 1), max_size=3),
            "ignore_index": st.integers(0, 300),
            "mean": st.just([0.5, 0.5, 0.5]),
            "white": st.floats(-1, 4095),
            "pairs": VALUES,
        },
    )


def dumped(values: object) -> bytes:
    return yaml.safe_dump(values).encode()


DESCRIPTIONS = st.one_of(
    st.binary(max_size=40),
    st.text("[]{}:,&*!<>|-?#'\"%@` \n\tab01", max_size=40).map(str.encode),
    st.sampled_from([b"[" * 5000, b"a: " + b"1" * 5000, b"a: 2001-99-99", b"? [a]\n: 1", LAUGHS]),
    st.fixed_dictionaries({}, optional=KEYS_OF_ANY_KIND).map(dumped),
    st.fixed_dictionaries({}, optional=GOOD).map(dumped),
    st.integers(2, 4).flatmap(description_of).map(dumped),
)


def read_a_description(content: bytes, folder: Path) -> None:
    path = folder / "dataset.yaml"
    path.write_bytes(content)
    read_description(path)


def settings_like(value: Any) -> st.SearchStrategy[Any]:
    """Settings of the same names, most of them as they are."""
    if isinstance(value, dict):
        return st.fixed_dictionaries({}, optional={k: settings_like(v) for k, v in value.items()})
    return st.one_of(st.just(value), VALUES, SCALARS)


@cache
def plain_settings() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(to_dict(Settings())))
    return values


RECIPES = st.one_of(
    DESCRIPTIONS,
    st.deferred(lambda: settings_like({**plain_settings(), "recipe": "digits"})).map(dumped),
)


def read_a_recipe(content: bytes, folder: Path) -> None:
    path = folder / "settings.yaml"
    path.write_bytes(content)
    values = recipes.load_file(path)
    values.pop("recipe", None)
    validate(update(Settings(), values, str(path)))


@cache
def network() -> Any:
    return models.build("small", 3, width=2, features=4)


@cache
def weight_files() -> dict[str, bytes]:
    """Whole files of weights: this program's own, and what trainers write."""
    state = network().state_dict()
    files = {}
    for name, values in {
        "state.pth": state,
        "nested.pth": {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
        "numbers.pth": {"model": state, "best": np.float64(0.5)},
        "list.pth": [1, 2],
        "checkpoint.pth": {"format": checkpoint.FORMAT, "method": state, "iteration": 3},
    }.items():
        file = io.BytesIO()
        torch.save(values, file)
        files[name] = file.getvalue()
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    files["old.pth"] = file.getvalue()
    meta = checkpoint.description(network(), INFO, "note")
    files["own.safetensors"] = save(state, {"ctt": json.dumps(meta)})
    files["plain.safetensors"] = save(state)
    return files


WEIGHTS = st.deferred(
    lambda: st.builds(
        lambda name, changes: (name, changed(weight_files()[name], changes)),
        st.sampled_from(sorted(weight_files())),
        CHANGES,
    )
)


def read_weights(content: tuple[str, bytes], folder: Path) -> None:
    path = folder / f"weights{Path(content[0]).suffix}"
    path.write_bytes(content[1])
    refused = 0
    for reader in (
        lambda: weights.start_from(network(), str(path)),
        lambda: checkpoint.load_network(path),
        lambda: checkpoint.load(path),
    ):
        try:
            reader()
        except UserError:
            refused += 1
    if refused == 3:
        raise UserError("no reader takes it")


OPTIONS = (
    *(
        "--dataset",
        "folder",
        "digits",
        "--data-root",
        "nowhere",
        "--ratio",
        "1/2",
        "-1",
        "0",
        "nan",
    ),
    *(
        "--method",
        "supervised",
        "mean-teacher",
        "x.py:Y",
        "--pairs",
        "2",
        "--seed",
        "1e9",
        "--help",
    ),
    *("--data.crop", "32", "--data.crop=8", "--eval.scales", "--model.weights", "imagenet", "none"),
    *("--model.backbone", "resnet18", "--recipe", "voc", "--config", "nothing.yaml", "--resume"),
    *("--out", "--no-dry-run", "--train.amp", "bf16", "--train.iterations", "--x", "--", "-h", ""),
    *(
        "a" * 300,
        "check",
        "split",
        "--form",
        "paths",
        "--threads",
        "--show",
        "--network",
        "best",
        "--workers",
    ),
)
ARGUMENTS = st.tuples(
    st.sampled_from(["train", "data", "predict", "eval", "export"]),
    st.lists(st.one_of(st.sampled_from(OPTIONS), st.text(max_size=4)), max_size=6),
)


def read_arguments(content: tuple[str, list[str]], folder: Path) -> None:
    program, arguments = content
    readers: dict[str, Callable[[list[str]], object]] = {
        "train": train.read,
        "data": data_program._main,
        "predict": predict._main,
        "eval": evaluate._main,
        "export": export._main,
    }
    nothing = {name: lambda command: 0 for name in ("check", "split", "fetch")}
    with patch.multiple(data_program, **nothing):  # type: ignore[arg-type]
        try:
            run_program(f"ctt-{program}", lambda: int(readers[program](arguments) is None))
        except SystemExit as stop:
            if stop.code not in (0, BAD_INPUT):
                raise
            if stop.code:
                raise UserError("usage") from None


@dataclass(frozen=True)
class Target:
    """What reads inputs of a kind."""

    inputs: st.SearchStrategy[Any]
    read: Callable[[Any, Path], None]


FORM = st.sampled_from(sorted(annotations.CHANGED))
ANNOTATIONS = st.one_of(
    st.tuples(FORM, CHANGES),
    st.tuples(FORM, st.tuples(st.floats(0, 1), VALUES)),
)


def read_annotations(content: tuple[str, Any], folder: Path) -> None:
    form, change = content
    if isinstance(change, list):
        file = changed(annotations.exported(form, folder)[1], change)
    else:
        file = annotations.with_value(form, folder, *change)
    annotations.read_annotations(form, file, folder)


TARGETS = {
    "split list": Target(LISTS, read_a_list),
    "image and mask": Target(PICTURES, read_a_picture),
    "annotations": Target(ANNOTATIONS, read_annotations),
    "dataset.yaml": Target(DESCRIPTIONS, read_a_description),
    "recipe": Target(RECIPES, read_a_recipe),
    "weights": Target(WEIGHTS, read_weights),
    "command line": Target(ARGUMENTS, read_arguments),
}


def fuzz(name: str, inputs: int, folder: Path) -> Counter[str]:
    """Return how many inputs a target takes and refuses; any other error is raised."""
    target = TARGETS[name]
    counts: Counter[str] = Counter()

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def feed(content: Any) -> None:
        try:
            target.read(content, folder)
            counts["taken"] += 1
        except UserError as error:
            counts["refused" if len(str(error)) < LONGEST else "refused at length"] += 1

    feed()
    return counts
