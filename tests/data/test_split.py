from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctt.data.split import draw_split, make_split, parse_ratio, read_list, write_list
from ctt.errors import UserError

IDS = [f"image {i:03}" for i in range(100)]


@pytest.mark.parametrize(
    ("text", "count"), [("1/20", 5), ("0.05", 5), ("50", 50), ("1", 1), ("1/1", 100), ("1e-1", 10)]
)
def test_ratio_as_fraction_share_or_count(text: str, count: int) -> None:
    assert parse_ratio(text, 100) == count


@pytest.mark.parametrize("text", ["1/0", "0", "-1", "101", "half", "", "1.5", "-1/2", "nan"])
def test_bad_ratio_names_the_option(text: str) -> None:
    with pytest.raises(UserError, match="--ratio"):
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


@given(st.lists(st.sampled_from(IDS), min_size=1, unique=True), st.sampled_from(["\n", "\r\n"]))
def test_lists_are_read_whatever_their_line_ends(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], end: str
) -> None:
    path = tmp_path_factory.mktemp("lists") / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf" + end.join(names).encode())  # no last newline
    assert read_list(path) == names


def test_lists_win_over_the_ratio(tmp_path: Path) -> None:
    write_list(tmp_path / "labeled.txt", IDS[5:8])
    labeled, unlabeled = make_split(IDS, "1/2", 0, tmp_path / "labeled.txt", None)
    assert labeled == IDS[5:8]
    assert unlabeled == IDS[:5] + IDS[8:]
    write_list(tmp_path / "unlabeled.txt", IDS[:2])
    lists = (tmp_path / "labeled.txt", tmp_path / "unlabeled.txt")
    assert make_split(IDS, "1/2", 0, *lists) == (IDS[5:8], IDS[:2])


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "text"),
    [
        ("nobody\n", None, "names nobody"),
        ("\n\n", None, "is empty"),
        (f"{IDS[0]}\n{IDS[0]}\n", None, "more than once"),
        (f"{IDS[0]}\n", f"{IDS[0]}\n{IDS[1]}\n", "stands in"),
        (None, f"{IDS[0]}\n", "needs --split-labeled"),
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
        make_split(IDS, "1/2", 0, *paths)


def test_a_pickle_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "split.pkl").write_bytes(b"\x80\x04\x95\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_list(tmp_path / "split.pkl")
