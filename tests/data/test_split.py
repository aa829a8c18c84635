import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ctt.data import open_dataset
from ctt.data.check import examine_split
from ctt.data.dataset import Dataset
from ctt.data.digits import INFO
from ctt.data.files import same_name
from ctt.data.options import DatasetOptions
from ctt.data.split import (
    draw_split,
    make_split,
    parse_ratio,
    path_lines,
    read_list,
    resolve,
    with_all_classes,
    write_list,
)
from ctt.errors import UserError
from tests.data.trees import save_image, save_mask

IDS = [f"image {i:03}" for i in range(100)]


class Names(Dataset):
    """Names without images; `x` at the front marks those that have no label."""

    info = INFO

    def __init__(self, ids: list[str], evaluation: list[str] | None = None) -> None:
        self.ids, self.evaluation = sorted(ids), evaluation or []

    def train_ids(self) -> list[str]:
        return [name for name in self.ids if not name.startswith("x")]

    def unlabeled_ids(self) -> list[str]:
        return [name for name in self.ids if name.startswith("x")]

    def eval_ids(self) -> list[str]:
        return self.evaluation

    def image(self, name: str) -> Tensor:
        raise NotImplementedError

    def label(self, name: str) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("text", "count"), [("1/20", 5), ("0.05", 5), ("50", 50), ("1", 1), ("1/1", 100), ("1e-1", 10)]
)
def test_ratio_as_fraction_share_or_count(text: str, count: int) -> None:
    assert parse_ratio(text, 100) == count


def test_counts_of_the_paper_win_over_rounding() -> None:
    counts = {Fraction(1, 30): 4}
    assert [parse_ratio(text, 100, counts) for text in ("1/30", "2/60", "3", "1/31")] == [
        4,
        4,
        3,
        3,
    ]


@pytest.mark.parametrize("text", ["1/0", "0", "-1", "101", "half", "", "1.5", "-1/2", "nan"])
def test_bad_ratio_names_the_option(text: str) -> None:
    with pytest.raises(UserError, match="`ratio`"):
        parse_ratio(text, 100)


@given(st.integers(1, 100), st.integers(0, 5))
def test_split_parts_the_images(labeled: int, seed: int) -> None:
    first, second = draw_split(IDS, labeled, seed)
    assert len(first) == labeled
    assert sorted(first + second) == IDS
    assert first == sorted(first)
    assert second == sorted(second)


def test_split_does_not_depend_on_the_order_of_a_listing() -> None:
    assert draw_split(IDS, 7, 3) == draw_split(IDS[::-1], 7, 3)
    assert draw_split(IDS, 7, 3) != draw_split(IDS, 7, 4)


def test_images_without_labels_are_never_drawn() -> None:
    dataset = Names([*IDS, "x 1", "x 2"])
    labeled, unlabeled = make_split(dataset, "1/1", 0, None, None)
    assert (labeled, unlabeled) == (IDS, ["x 1", "x 2"])


FORMS = {
    "name": "{0}",
    "image": "JPEGImages/{0}.jpg",
    "image and mask": "JPEGImages/{0}.jpg SegmentationClass/{0}.png",
    "image and None": "JPEGImages/{0}.jpg None",
    "slashes": "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png",
    "tab": "train/{0}.jpg\tlabels/{0}.png",
    "city": "leftImg8bit/train/c/{0}_leftImg8bit.png",
    "city and mask": (
        "leftImg8bit/train/c/{0}_leftImg8bit.png gtFine/train/c/{0}_gtFine_labelTrainIds.png"
    ),
    "city and tab": "images/{0}_leftImg8bit.png\tsegmentation/{0}_gtFine_trainIds.png",
}
# a slash or a line end cannot be part of a file's name; a list is stripped of outer spaces
LETTERS = st.characters(exclude_characters="/\n\r\t\0", exclude_categories=["Cs"])
NAME = (
    st.text(LETTERS, min_size=1, max_size=12)
    .map(str.strip)
    .filter(lambda name: name not in ("", "None", ".", "..") and not name.startswith("x"))
)


@given(
    names=st.lists(NAME, min_size=1, max_size=6, unique_by=same_name),
    form=st.sampled_from(sorted(FORMS)),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
    last=st.booleans(),
)
def test_lists_of_every_form_are_read_as_they_are(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    form: str,
    end: str,
    mark: bool,
    last: bool,
) -> None:
    class Paths(Names):
        def find(self, entry: str) -> str | None:
            file = entry.rpartition("/")[2]
            return super().find(file.removesuffix(".jpg").removesuffix("_leftImg8bit.png"))

    path = tmp_path_factory.mktemp("lists") / "list.txt"
    text = end.join(FORMS[form].format(name) for name in names) + end * last
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    dataset = Paths(names)
    if form == "image and None":
        with pytest.raises(UserError, match="has no mask in this line"):
            read_list(path, dataset, labeled=True)
    assert read_list(path, dataset, labeled=form == "name") == names


def test_the_mask_of_another_image_is_no_mask() -> None:
    known = {"a.jpg": "a", "a b.jpg": "a b"}
    assert resolve("a b.jpg a b.png", known.get) == ("a b", "a b.png")
    with pytest.raises(UserError, match=r"a\.jpg is listed with b\.png, which is not its mask"):
        resolve("a.jpg b.png", known.get)


@pytest.mark.parametrize("masks", ["masks", "elsewhere"])
@pytest.mark.parametrize("separator", [" ", "\t"])
def test_a_name_that_begins_with_another_one(tmp_path: Path, masks: str, separator: str) -> None:
    """As file managers name copies; the masks may also be those of another machine."""
    names = ["IMG", "IMG (1)", "IMG (2)"]
    for name in names:
        save_image(tmp_path / "images" / f"{name}.jpg", np.zeros((4, 4, 3), np.uint8))
        save_image(tmp_path / "unlabeled" / f"u {name}.jpg", np.zeros((4, 4, 3), np.uint8))
        save_mask(tmp_path / "masks" / f"{name}.png", np.ones((4, 4), np.uint8), "L")
    save_image(tmp_path / "val" / "images" / "v.jpg", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "dataset.yaml").write_text("classes: [ground, thing]\n")
    dataset = open_dataset("folder", tmp_path, DatasetOptions())
    for name in names:
        line = f"images/{name}.jpg{separator}{masks}/{name}.png"
        expected = (f"images/{name}.jpg", f"{masks}/{name}.png")
        assert resolve(line, dataset.find, dataset.is_mask) == expected
        assert resolve(f"images/{name}", dataset.find) == (expected[0], "")
        unlabeled = (f"unlabeled/u {name}.jpg", "None")
        assert resolve(separator.join(unlabeled), dataset.find, dataset.is_mask) == unlabeled
    line = f"images/IMG (3).jpg{separator}{masks}/IMG (3).png"
    assert resolve(line, dataset.find, dataset.is_mask) is None


def test_nothing_to_label() -> None:
    with pytest.raises(UserError, match="no image that may be labelled"):
        make_split(Names(["x 1"]), "1/2", 0, None, None)


def test_lists_win_over_the_ratio(tmp_path: Path) -> None:
    dataset = Names(IDS)
    write_list(tmp_path / "labeled.txt", IDS[5:8])
    labeled, unlabeled = make_split(dataset, "1/2", 0, tmp_path / "labeled.txt", None)
    assert labeled == IDS[5:8]
    assert unlabeled == IDS[:5] + IDS[8:]
    write_list(tmp_path / "unlabeled.txt", IDS[:2])
    lists = (tmp_path / "labeled.txt", tmp_path / "unlabeled.txt")
    assert make_split(dataset, "1/2", 0, *lists) == (IDS[5:8], IDS[:2])


def test_an_image_in_both_lists_is_labelled(tmp_path: Path) -> None:
    """As 2008_004822 is in the four lists of CPS for the augmented VOC."""
    dataset = Names(IDS)
    lists = (tmp_path / "labeled.txt", tmp_path / "unlabeled.txt")
    write_list(lists[0], IDS[:3])
    write_list(lists[1], IDS[2:9])
    assert make_split(dataset, "1/2", 0, *lists) == (IDS[:3], IDS[3:9])
    assert "1 of the images are in the list of labelled and in that of unl" in dataset.notes[0]
    checked = Names(IDS)
    assert examine_split(checked, *lists) == (IDS[:3], IDS[3:9], [])
    assert checked.notes == dataset.notes


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "text"),
    [
        ("nobody\n", None, "nobody is no training image"),
        ("\n\n", None, "is empty"),
        (f"{IDS[0]}\n{IDS[0]}\n", None, "more than once"),
        (None, f"{IDS[0]}\n", "needs `split_labeled`"),
        ("x 1\n", None, "x 1 is to be labelled"),
        (f"{IDS[0]}\n", "test 1\n", "an image to evaluate on"),
    ],
)
def test_bad_lists(tmp_path: Path, labeled: str | None, unlabeled: str | None, text: str) -> None:
    paths: list[Path | None] = []
    for name, content in (("labeled.txt", labeled), ("unlabeled.txt", unlabeled)):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        paths.append(path if content is not None else None)
    with pytest.raises(UserError, match=text):
        make_split(Names([*IDS, "x 1"], ["test 1"]), "1/2", 0, *paths)


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("the pickle was read",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_refused_and_not_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "train_voc_split.pkl"
    path.write_bytes(pickle.dumps(Bomb(), protocol))
    with pytest.raises(UserError, match=r"a pickle or an array\. Pickles can run any program"):
        read_list(path, Names(IDS), labeled=True)


def test_other_files_are_no_list(tmp_path: Path) -> None:
    torch.save(torch.arange(3), tmp_path / "split")
    for name in ("split", "nothing"):
        with pytest.raises(UserError, match="cannot be read"):
            read_list(tmp_path / name, Names(IDS), labeled=True)
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "list").write_bytes("Straße\n".encode(encoding))
        with pytest.raises(UserError, match="The line is no UTF-8: save the list as UTF-8"):
            read_list(tmp_path / "list", Names(["Straße"]), labeled=True)


SHOWN = st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=2, max_size=12)


@given(SHOWN, st.data())
def test_parts_of_all_classes_lose_none(shown: list[set[int]], draw: st.DataObject) -> None:
    names = {f"{i:02}": classes for i, classes in enumerate(shown)}
    size = draw.draw(st.integers(1, len(names) - 1))
    before = draw_split(list(names), size, "holdout")
    after = with_all_classes(*before, names)
    assert [len(part) for part in after] == [len(part) for part in before]
    assert sorted(after[0] + after[1]) == sorted(names)
    classes = [[{c for n in part for c in names[n]} for part in parts] for parts in (before, after)]
    assert all(old <= new for old, new in zip(*classes, strict=True))
    if classes[0][0] == set().union(*shown):
        assert after == before


def test_a_rare_class_is_in_both_parts() -> None:
    names = {f"{i:02}": {0, 1} for i in range(20)}
    names |= {"05": {0, 2}, "11": {0, 2}}
    part, rest = with_all_classes(["01", "02"], sorted(names.keys() - {"01", "02"}), names)
    assert len({"05", "11"} & set(part)) == len({"05", "11"} & set(rest)) == 1
    names["11"] = {0, 1}  # a single image cannot be in both
    assert "05" in with_all_classes(["01", "02"], sorted(names.keys() - {"01", "02"}), names)[1]


def test_one_sign_stands_between_image_and_mask_in_all_lines() -> None:
    plain = [["a.jpg", "a.png"], ["b.jpg", "None"]]
    assert path_lines(plain) == ["a.jpg a.png", "b.jpg None"]
    assert path_lines([*plain, ["c d.jpg", "c d.png"]])[::2] == [
        "a.jpg\ta.png",
        "c d.jpg\tc d.png",
    ]
