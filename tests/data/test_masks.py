"""Masks as annotation tools write them: read as they are meant, or refused with the reason."""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ctt.data import open_dataset
from ctt.data.check import check_quickly
from ctt.data.masks import read_mask
from ctt.data.options import DatasetOptions
from ctt.data.pictures import open_picture, read_image
from ctt.data.split import read_list
from ctt.errors import UserError

PALETTE = np.array([[0, 0, 0], [48, 112, 32], [176, 112, 32]], np.uint8)
CLASSES = "classes: [background, cat, dog]\n"
COLOURS = f"{CLASSES}palette: {PALETTE.tolist()}\nignore_color: [255, 0, 255]\n"
VALUES = np.arange(6, dtype=np.uint8).reshape(2, 3) % 3
LABEL = torch.from_numpy(VALUES)


def label_of(root: Path, mask: Image.Image, text: str = COLOURS, file: str = "a.png") -> Tensor:
    """The label of a dataset's image whose mask is saved in a file of that name."""
    (root / "images").mkdir(exist_ok=True)
    (root / "masks").mkdir(exist_ok=True)
    for name in ("a", "b"):
        Image.new("RGB", mask.size).save(root / "images" / f"{name}.png")
    mask.save(root / "masks" / file)
    (root / "dataset.yaml").write_text(text, "utf-8")
    return open_dataset("folder", root, DatasetOptions()).label("images/a.png")


def palette_png(order: list[int]) -> Image.Image:
    """A palette PNG of `VALUES` in which class c has the number that `order` gives it."""
    picture = Image.fromarray(np.argsort(order).astype(np.uint8)[VALUES], mode="P")
    picture.putpalette(PALETTE[order].flatten().tolist())
    return picture


def with_alpha(pixels: np.ndarray, alpha: int) -> Image.Image:
    pixels = pixels.reshape(*VALUES.shape, -1)
    return Image.fromarray(np.dstack([pixels, np.full_like(VALUES, alpha)]))


def grey(kind: type) -> Image.Image:
    return Image.fromarray(VALUES.astype(kind))


FORMS: dict[str, Callable[[], Image.Image]] = {
    "grey": lambda: grey(np.uint8),
    "grey of 16 bits": lambda: grey(np.uint16),
    "three equal channels": lambda: Image.fromarray(np.repeat(VALUES[..., None], 3, 2)),
    "colours": lambda: Image.fromarray(PALETTE[VALUES]),
    "colours and alpha": lambda: with_alpha(PALETTE[VALUES], 255),
    "grey and alpha": lambda: grey(np.uint8).convert("LA"),
    "palette": lambda: palette_png([0, 1, 2]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_mask_gives_the_classes(tmp_path: Path, form: str) -> None:
    assert torch.equal(label_of(tmp_path, FORMS[form]()), LABEL)


@pytest.mark.parametrize("ending", [".tif", ".tiff", ".bmp", ".gif", ".TIF"])
def test_every_format_of_a_mask_gives_the_classes(tmp_path: Path, ending: str) -> None:
    for number, mask in enumerate((palette_png([0, 1, 2]), grey(np.uint8))):
        (tmp_path / str(number)).mkdir()
        assert torch.equal(label_of(tmp_path / str(number), mask, file=f"a{ending}"), LABEL)


def test_fractions_that_are_whole_are_numbers(tmp_path: Path) -> None:
    for kind in (np.float32, np.int32):
        assert torch.equal(label_of(tmp_path, grey(kind), file="a.tif"), LABEL)
    with pytest.raises(UserError, match=r"a\.tif: the mask holds fractions"):
        label_of(tmp_path, Image.fromarray(VALUES / np.float32(2)), file="a.tif")


def test_transparent_black_is_black(tmp_path: Path) -> None:
    drawn = np.array(with_alpha(PALETTE[VALUES], 255))
    drawn[VALUES == 0] = 0
    assert torch.equal(label_of(tmp_path, Image.fromarray(drawn)), LABEL)
    drawn[0, 1, 3] = 128
    with pytest.raises(UserError, match=r"a\.png: the mask has 1 transparent pixels \(mode RGBA\)"):
        label_of(tmp_path, Image.fromarray(drawn))


def test_colours_are_those_of_the_palette_alone(tmp_path: Path) -> None:
    colours = PALETTE[VALUES]
    colours[0, 0] = (255, 0, 255)
    assert label_of(tmp_path, Image.fromarray(colours))[0, 0] == 255
    colours[0, 0] = (1, 2, 3)
    with pytest.raises(UserError, match=r"which class means \[1, 2, 3\]\. Give the colours of"):
        label_of(tmp_path, Image.fromarray(colours))
    smooth = np.random.default_rng(0).integers(0, 255, (20, 20, 3)).astype(np.uint8)
    with pytest.raises(UserError, match=r"400 colours mean, most often \[.* from smooth edges"):
        label_of(tmp_path, Image.fromarray(smooth))
    with pytest.raises(UserError, match=r"3 colours mean.* as `palette` in .*dataset\.yaml"):
        label_of(tmp_path, Image.fromarray(colours[1:]), CLASSES)


def test_greys_of_the_palette_win_over_equal_numbers(tmp_path: Path) -> None:
    """Black and white masks in RGB: 255 is white, not a number to ignore."""
    text = "classes: [a, b]\npalette: [[0, 0, 0], [255, 255, 255]]\n"
    white = np.repeat(VALUES[..., None] // 2 * 255, 3, 2)
    assert torch.equal(label_of(tmp_path, Image.fromarray(white), text), LABEL // 2)
    with pytest.raises(UserError, match="nothing says which class means"):
        label_of(tmp_path, Image.fromarray(white // 255), text)


def test_a_palette_that_contradicts_the_stated_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:  # as Image.quantize orders colours anew
        label_of(tmp_path, palette_png([2, 0, 1]))
    assert "a.png: the number 0 means background, but in the palette of the file" in str(
        caught.value
    )
    assert "it has the colour [176, 112, 32] of dog" in str(caught.value)
    assert torch.equal(label_of(tmp_path, palette_png([2, 0, 1]), CLASSES), (LABEL + 1) % 3)
    other = palette_png([2, 0, 1])
    other.putpalette([1, 1, 1, 2, 2, 2, 176, 112, 32])  # colours of something else
    assert torch.equal(label_of(tmp_path, other), (LABEL + 1) % 3)


def test_masks_that_lost_their_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jpg: .* stored as JPEG, .* --tolerance 20`\."):
        label_of(tmp_path, grey(np.uint8), file="a.jpg")
    grey(np.uint8).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(UserError, match=r"a\.png: the mask is stored as JPEG"):
        read_mask(tmp_path / "a.png")
    for mode in ("CMYK", "LAB"):
        Image.new(mode, (3, 2)).save(tmp_path / "a.tif")
        with pytest.raises(UserError, match=rf"image of colours \(mode {mode}\)"):
            read_mask(tmp_path / "a.tif")
    pages = [grey(np.uint8), grey(np.uint8)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=r"pages\.tif: the mask's file holds 2 pages"):
        read_mask(tmp_path / "pages.tif")


def test_small_copies_in_a_file_are_no_pages(tmp_path: Path) -> None:
    path = tmp_path / "overviews.tif"
    small = grey(np.uint8).resize((2, 1))
    small.encoderinfo = {"tiffinfo": {254: 1}}  # type: ignore[attr-defined]
    grey(np.uint8).save(path, save_all=True, append_images=[small])
    assert read_mask(path).values.tolist() == VALUES.tolist()


def test_a_deep_png_of_colours_is_refused(tmp_path: Path) -> None:
    """Pillow reads the upper bytes alone, of which class numbers have none."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    rows = b"".join(b"\0" + struct.pack(">9H", *np.repeat(row, 3).tolist()) for row in VALUES)
    head = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)
    path = tmp_path / "deep.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(UserError, match=r"deep\.png: the mask has colours of 16 bits"):
        read_mask(path)


def test_a_mask_that_is_turned_with_its_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    grey(np.uint8).save(tmp_path / "a.png", exif=exif)
    assert read_mask(tmp_path / "a.png").values.tolist() == VALUES.tolist()
    turned = read_mask(tmp_path / "a.png", turned=True).values
    assert turned.tolist() == VALUES[::-1, ::-1].tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("palette: [[0, 0, 0], [0, 0, 0], [1, 1, 1]]", "background and cat have the same colour"),
        (
            "palette: [[0, 0, 0], [2, 0, 0], [1, 1, 1]]\nignore_color: [2, 0, 0]",
            "ignore_color have",
        ),
        ("ignore_color: [2, 0, 0]", "beside a palette"),
        ("mask_suffix: 7", "mask_suffix must be a part of a name"),
        ("pairs: ../pairs.txt", "pairs must be a part of a name below the folder"),
        ("pairs: /etc/passwd", "pairs must be a part of a name below the folder"),
    ],
)
def test_bad_descriptions_of_masks(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        label_of(tmp_path, grey(np.uint8), CLASSES + text)


def folder(root: Path, images: list[str], masks: list[str], text: str = CLASSES) -> Path:
    """A dataset whose images and masks have these paths; nothing is told of their pairing."""
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(root / name)
    for number, name in enumerate(masks):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 3), number % 3, np.uint8)).save(root / name)
    (root / "dataset.yaml").write_text(text, "utf-8")
    return root


@pytest.mark.parametrize(
    ("image", "mask", "hint"),
    [
        ("images/im{}.jpg", "masks/im{}_mask.png", "write `mask_suffix: _mask` into dataset.yaml"),
        ("images/im{}_0000.jpg", "masks/im{}.png", "write `image_suffix: _0000` into dataset.yaml"),
        ("images/im{}.jpg", "labels/im{}.png", "Is labels/im2.png meant? Masks are expected in"),
        ("images/img{}.jpg", "masks/imgs{}.bmp", "The nearest name is masks/imgs2.bmp"),
    ],
)
def test_masks_of_other_names_are_told_and_their_suffix_can_be_stated(
    tmp_path: Path, image: str, mask: str, hint: str
) -> None:
    images, masks = ([name.format(i) for i in range(4)] for name in (image, mask))
    root = folder(tmp_path, images, masks)
    dataset = open_dataset("folder", root, DatasetOptions())
    with pytest.raises(UserError) as caught:
        dataset.label(images[2])
    assert hint in str(caught.value)
    with pytest.raises(UserError, match="files are missing in all"):
        check_quickly(dataset, images[1:], [])
    if mask.startswith("masks/"):
        expected = f"4 of the masks belong to no image, such as {masks[0]}."
        assert any(expected in note for note in dataset.notes)
    if "suffix" in hint:
        setting = hint.split("`")[1]
        root = folder(tmp_path, images, masks, f"{CLASSES}{setting}\n")
        dataset = open_dataset("folder", root, DatasetOptions())
        assert [int(dataset.label(name)[0, 0]) for name in images] == [0, 1, 2, 0]
        assert not any("belong to no image" in note for note in dataset.notes)


def test_masks_of_any_names_are_paired_by_a_list(tmp_path: Path) -> None:
    images = [f"images/im{i}.jpg" for i in range(4)]
    masks = [f"drawn/{name}.png" for name in ("d e", "b", "c", "a")]
    root = folder(tmp_path / "set", images, masks, f"{CLASSES}pairs: pairs.txt\n")
    forms = ("{}\t{}", "set/{} /home/me/set/{}", f"{root}/{{}}\t{root}/{{}}", "{} {}")
    lines = [form.format(*pair) for form, *pair in zip(forms, images, masks, strict=True)]
    (root / "pairs.txt").write_text("\n".join(lines).replace("images/im3", "images\\im3"), "utf-8")
    dataset = open_dataset("folder", root, DatasetOptions())
    assert [int(dataset.label(name)[0, 0]) for name in images] == [0, 1, 2, 0]
    held_out = dataset.eval_ids()
    kept = [name for name in images[:3] if name not in held_out]
    (root / "list.txt").write_text(
        "\n".join(line for line, name in zip(lines, images, strict=True) if name in kept), "utf-8"
    )
    assert read_list(root / "list.txt", dataset, labeled=True) == kept
    swapped = f"{kept[0]}\t{masks[images.index(kept[1])]}"
    (root / "list.txt").write_text(swapped, "utf-8")
    with pytest.raises(UserError, match=r"which is not its mask\..* see `pairs` in docs"):
        read_list(root / "list.txt", dataset, labeled=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/a.jpg masks/none.png", "line 2: images/a.jpg masks/none.png is no image and its"),
        ("images/a.jpg ../outside.png", "is no image and its mask"),
        ("images/a.jpg", "is no image and its mask"),
        ("images/b.jpg masks/b.png", "and in a line before it the mask .*a.png"),
    ],
)
def test_bad_pairs(tmp_path: Path, line: str, message: str) -> None:
    root = folder(
        tmp_path / "set",
        ["images/a.jpg", "images/b.jpg"],
        ["masks/a.png", "masks/b.png", "../outside.png"],
        f"{CLASSES}pairs: pairs.txt\n",
    )
    (root / "pairs.txt").write_text(f"images/b.jpg masks/a.png\n{line}\n", "utf-8")
    with pytest.raises(UserError, match=message):
        open_dataset("folder", root, DatasetOptions())


@pytest.mark.parametrize(
    ("images", "setting"),
    [
        (["images/a.jpg", "images/b.jpg"], "pairs: pairs.txt"),
        (["images/a.jpg", "images/a_img.jpg"], "image_suffix: _img"),
    ],
)
def test_one_mask_of_two_images_is_refused(tmp_path: Path, images: list[str], setting: str) -> None:
    masks = ["masks/a.png", "masks/b.png"]
    root = folder(tmp_path, images, masks, f"{CLASSES}{setting}\n")
    (root / "pairs.txt").write_text("images/a.jpg\tmasks/b.png\n", "utf-8")
    with pytest.raises(UserError, match=r"\.png would be the mask of two images") as caught:
        open_dataset("folder", root, DatasetOptions())
    assert all(str(root / name) in str(caught.value) for name in images)
    (root / "pairs.txt").write_text("images/a.jpg\tmasks/b.png\n" + f"{images[1]}\tmasks/a.png\n")
    (root / "dataset.yaml").write_text(f"{CLASSES}pairs: pairs.txt\n", "utf-8")
    dataset = open_dataset("folder", root, DatasetOptions())
    assert [dataset.files(name, labeled=True)[1].name for name in images] == ["b.png", "a.png"]


def test_two_masks_of_one_image_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, ["images/a.jpg", "images/b.jpg"], ["masks/a.png", "masks/a.tif"])
    with pytest.raises(UserError, match="both would be the mask of one image"):
        open_dataset("folder", root, DatasetOptions())
    (root / "masks" / "a.tif").rename(root / "masks" / "a.jpg")
    assert open_dataset("folder", root, DatasetOptions()).label("images/a.jpg").shape == (2, 3)


def test_large_images_are_read_up_to_a_stated_number_of_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")  # twice as large as Pillow takes
    with warnings.catch_warnings(), open_picture(tmp_path / "large.png") as file:
        warnings.simplefilter("error")
        assert file.size == (20_000, 10_000)
    assert Image.MAX_IMAGE_PIXELS is not None  # for everybody else
    monkeypatch.setenv("CTT_MAX_PIXELS", "1e8")
    with pytest.raises(UserError, match=r"100,000,000 are read.*CTT_MAX_PIXELS=200000000"):
        read_image(tmp_path / "large.png")
    monkeypatch.setenv("CTT_MAX_PIXELS", "many")
    with pytest.raises(UserError, match="CTT_MAX_PIXELS=many: this must be a number"):
        read_image(tmp_path / "large.png")


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_the_pixels_of_large_tiffs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (50, 50), "red").save(tmp_path / "a.tif", compression=compression)
    Image.new("L", (50, 50), 1).save(tmp_path / "mask.tif", compression=compression)
    assert read_image(tmp_path / "a.tif").shape == (3, 50, 50)
    assert read_mask(tmp_path / "mask.tif").values.shape == (50, 50)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_the_limit_of_pillow_is_back_after_errors_and_once_no_thread_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (50, 50)).save(tmp_path / "a.tif", compression="tiff_lzw")
    Image.new("RGB", (50, 50)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for _ in range(2):
        with pytest.raises(UserError, match="cannot be read"):
            read_image(tmp_path / "cut.png")
        assert Image.MAX_IMAGE_PIXELS == 1000
    with open_picture(tmp_path / "a.tif"), ThreadPoolExecutor(4) as pool:
        shapes = {image.shape for image in pool.map(read_image, [tmp_path / "a.tif"] * 20)}
        assert shapes == {(3, 50, 50)}
        assert Image.MAX_IMAGE_PIXELS is None  # this thread still has one open
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("file", ["a.png", "a.jpg"])
def test_a_threshold_makes_two_classes_of_smooth_masks(tmp_path: Path, file: str) -> None:
    values = np.zeros((16, 16), np.uint8)
    values[4:12, 4:12] = 255
    picture = Image.fromarray(values).resize((64, 64), Image.Resampling.BILINEAR)
    assert len(np.unique(np.asarray(picture))) > 2
    text = "classes: [ground, thing]\nthreshold: 128\n"
    label = label_of(tmp_path, picture, text, file)
    expected = torch.zeros(64, 64, dtype=torch.uint8)
    expected[16:48, 16:48] = 1
    assert (label != expected).sum() <= 4 * 4  # the smooth corners
    coloured = label_of(tmp_path, picture.convert("RGB"), text, file)
    assert torch.equal(coloured, label)
    border = Image.fromarray(np.array([[0, 127, 128, 200, 255]], np.uint8))
    assert label_of(tmp_path, border, text).tolist() == [[0, 0, 1, 1, 1]]
    ignored = label_of(tmp_path, border, f"{text}ignore_index: 200\n")
    assert ignored.tolist() == [[0, 0, 1, 255, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [a, b, c]\nthreshold: 128", "threshold must be the grey .* 3 classes"),
        ("classes: [a, b]\nthreshold: 0", "threshold must be the grey"),
        ("classes: [a, b]\nthreshold: many", "threshold must be the grey"),
        ("classes: [a, b]\nthreshold: 9\nid_map: {0: 0}", "without an id_map"),
        ("names: [a, b]", "`names:` is called `classes:` here"),
        ("nc: 2\nnames: [a, b]\ntrain: x", "YOLO's data.yaml and its labels/ there is `ctt-data"),
        ("classes: [a, b]\ncolors: []", "`colors:` is called `palette:` here"),
        ("classes: [a, b]\ncolour: []", r"white\.$"),
    ],
)
def test_keys_that_are_not_meant_so(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        label_of(tmp_path, grey(np.uint8), text)


def test_folders_of_nearly_the_right_name_are_told(tmp_path: Path) -> None:
    root = folder(tmp_path, ["Images/a.jpg", "Images/b.jpg"], ["Masks/a.png", "Masks/b.png"])
    with pytest.raises(UserError) as caught:
        open_dataset("folder", root, DatasetOptions())
    assert f"{root / 'Images'} is not read: is it meant as images/? Rename it." in str(caught.value)
    (root / "Images").rename(root / "images")
    (root / "unlabelled").mkdir()
    dataset = open_dataset("folder", root, DatasetOptions())
    with pytest.raises(UserError, match=r"Is Masks/a\.png meant\?"):
        dataset.label("images/a.jpg")
    assert f"Warning: {root / 'unlabelled'} is not read: is it meant as unlabeled/?" in str(
        dataset.notes
    )
