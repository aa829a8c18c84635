"""VOC, Cityscapes and plain folders, in their true layouts; and everything that can be wrong."""

import pickle
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctt import data
from ctt.cli.data import _main as data_program
from ctt.data.check import check_quickly
from ctt.data.cityscapes import CLASSES as CITY_CLASSES
from ctt.data.cityscapes import COUNTS
from ctt.data.dataset import Dataset
from ctt.data.folder import find_images
from ctt.data.labels import ranges
from ctt.data.loader import DrawSampler, ViewDataset, load
from ctt.data.masks import read_mask
from ctt.data.options import DatasetOptions
from ctt.data.pictures import read_image
from ctt.data.split import make_split, parse_ratio
from ctt.data.views import GeometricView
from ctt.data.voc import AUG_COUNTS, bit_palette
from ctt.errors import UserError
from tests.data import trees


def opened(name: str, root: Path, **options: object) -> Dataset:
    return data.open_dataset(name, root, DatasetOptions(**options))  # type: ignore[arg-type]


def test_colours_of_voc() -> None:
    colours = ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert bit_palette(21)[:5] == colours
    assert bit_palette(21)[20] == (0, 64, 128)


@pytest.mark.parametrize("below", ["VOCdevkit/VOC2012", "VOCdevkit", ""])
def test_voc_is_found_from_every_level(tmp_path: Path, below: str) -> None:
    trees.write_voc(tmp_path)
    dataset = opened("voc", tmp_path / below)
    assert len(dataset.train_ids()) == 8
    assert dataset.train_ids() == sorted(dataset.train_ids())
    assert "mit Leer zeichen" in dataset.train_ids()
    assert (len(dataset.eval_ids()), dataset.unlabeled_ids()) == (2, [])
    for name in dataset.train_ids():
        image, label = dataset.pair(name)
        assert (image.shape, label.shape) == ((3, 40, 50), (40, 50))
        assert label.max() == 255
        assert len(label.unique()) == 4  # background, two classes and the border


@pytest.mark.parametrize("name", ["voc", "coco", "ade20k"])
def test_jpeg_files_may_have_a_name_in_capitals(tmp_path: Path, name: str) -> None:
    if name == "coco":
        pytest.importorskip("pycocotools")
        root = trees.write_coco(tmp_path)
        assert data_program(["coco-masks", "--data-root", str(root)]) == 0
    else:
        root = (trees.write_voc if name == "voc" else trees.write_ade20k)(tmp_path)
    for path in root.rglob("*.jpg"):
        path.rename(path.with_suffix(".JPG"))
    dataset = opened(name, root)
    first = dataset.train_ids()[0]
    image, label = dataset.pair(first)
    assert image.shape[1:] == label.shape
    assert (dataset.find(f"{first}.JPG"), dataset.find(f"{first}.jpg")) == (first, first)


def test_classic_voc_labels_fewer_images(tmp_path: Path) -> None:
    trees.write_voc(tmp_path)
    dataset = opened("voc", tmp_path, voc_set="classic")
    assert (len(dataset.train_ids()), len(dataset.unlabeled_ids())) == (3, 5)
    assert dataset.files(dataset.train_ids()[0], True)[1].parent.name == "SegmentationClass"
    labeled, unlabeled = make_split(dataset, "1/3", 0, None, None)
    assert (len(labeled), len(unlabeled)) == (1, 7)


@pytest.mark.parametrize("list_form", ["{0}", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"])
def test_augmented_masks_may_lie_in_the_classic_folder(tmp_path: Path, list_form: str) -> None:
    folder = trees.write_voc(tmp_path, aug_folder="SegmentationClass")
    names = opened("voc", tmp_path).train_ids()
    assert len(names) == 8
    text = "".join(f"{list_form.format(name)}\n" for name in names[2:])
    (folder / "ImageSets" / "Segmentation" / "train_aug.txt").write_text(text, "utf-8")
    assert opened("voc", tmp_path).train_ids() == names[2:]


def test_voc_without_augmented_masks_says_where_they_belong(tmp_path: Path) -> None:
    folder = trees.write_voc(tmp_path, aug_folder="")
    where = f"{folder}/SegmentationClassAug, or make them with"
    with pytest.raises(UserError, match=where):
        make_split(opened("voc", tmp_path), "1/2", 0, None, None)
    with pytest.raises(UserError, match=where):
        opened("voc", tmp_path, eval_split="tune")
    dataset = opened("voc", tmp_path, voc_set="classic")
    assert dataset.unlabeled_ids() == []
    assert "only those of train.txt" in dataset.notes[0]
    assert "3 images for training and 2 for evaluation; the published" in dataset.notes[1]
    assert "has 1,464 and 1,449" in dataset.notes[1]


def test_palette_grey_and_colour_masks_hold_the_same(tmp_path: Path) -> None:
    trees.write_voc(tmp_path / "P")
    trees.write_voc(tmp_path / "L", mask_mode="L")
    trees.write_voc(tmp_path / "RGB", mask_mode="RGB")
    palette, grey, colours = (opened("voc", tmp_path / mode) for mode in ("P", "L", "RGB"))
    for name in palette.train_ids():
        assert torch.equal(palette.label(name), grey.label(name))
        assert torch.equal(palette.label(name), colours.label(name))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_masks_of_few_bits_are_not_spread(tmp_path: Path, bits: int) -> None:
    import struct
    import zlib

    values = np.arange(8 // bits * 2).reshape(2, -1) % 2**bits
    rows = [int("".join(f"{v:0{bits}b}" for v in row), 2).to_bytes(1, "big") for row in values]

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", values.shape[1], 2, bits, 0, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    path = tmp_path / "mask.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )
    assert read_mask(path).values.tolist() == values.tolist()


@pytest.mark.parametrize("below", ["", "leftImg8bit"])
def test_cityscapes_ids_become_classes(tmp_path: Path, below: str) -> None:
    trees.write_cityscapes(tmp_path / "ids")
    trees.write_cityscapes(tmp_path / "train ids", train_ids=True)
    mapped, stored = (opened("cityscapes", tmp_path / n / below) for n in ("ids", "train ids"))
    assert mapped.train_ids() == stored.train_ids()
    assert (len(mapped.train_ids()), len(mapped.eval_ids())) == (4, 2)
    assert "zürich west_000001_000019" in mapped.train_ids()
    for name in [*mapped.train_ids(), *mapped.eval_ids()]:
        image, label = mapped.pair(name)
        assert image.shape == (3, 32, 64)
        assert torch.equal(label, stored.label(name))
        assert mapped.files(name, True)[1].name.endswith("labelIds.png")
        assert stored.files(name, True)[1].name.endswith("labelTrainIds.png")
    assert len(CITY_CLASSES) == len(mapped.info.classes) == 19


def test_cityscapes_as_its_archives_unpack(tmp_path: Path) -> None:
    trees.write_cityscapes(tmp_path)
    for name in ("leftImg8bit", "gtFine"):
        (tmp_path / f"{name}_trainvaltest").mkdir()
        (tmp_path / name).rename(tmp_path / f"{name}_trainvaltest" / name)
    assert len(opened("cityscapes", tmp_path).train_ids()) == 4


def test_further_cityscapes_images_only_where_a_list_names_them(tmp_path: Path) -> None:
    trees.write_cityscapes(tmp_path, extra=2)
    dataset = opened("cityscapes", tmp_path)
    assert not any("bamberg" in name for name in dataset.train_ids() + dataset.unlabeled_ids())
    labeled, extra = tmp_path / "labeled.txt", tmp_path / "extra.txt"
    place = "leftImg8bit/train_extra/bamberg/bamberg_000001_000019_leftImg8bit.png"
    labeled.write_text(dataset.train_ids()[0], "utf-8")
    extra.write_text(place, "utf-8")
    assert make_split(dataset, "1/2", 0, labeled, extra)[1] == ["bamberg_000001_000019"]
    with pytest.raises(UserError, match="is to be labelled"):
        make_split(dataset, "1/2", 0, extra, None)


def test_test_images_of_cityscapes_are_not_trained_on(tmp_path: Path) -> None:
    trees.write_cityscapes(tmp_path, test=1)
    dataset = opened("cityscapes", tmp_path)
    labeled, unlabeled = tmp_path / "labeled.txt", tmp_path / "unlabeled.txt"
    labeled.write_text(dataset.train_ids()[0], "utf-8")
    unlabeled.write_text("berlin_000000_000019", "utf-8")
    with pytest.raises(UserError, match="berlin_000000_000019 is a test image of the benchmark"):
        make_split(dataset, "1/2", 0, labeled, unlabeled)


def test_ratios_of_the_paper() -> None:
    def counts(total: int, table: dict[Fraction, int], *ratios: str) -> list[int]:
        return [parse_ratio(ratio, total, table) for ratio in ratios]

    assert counts(10_582, AUG_COUNTS, "1/50", "1/20", "1/8", "1/4") == [212, 529, 1322, 2645]
    assert counts(1464, {}, "1/16", "1/8", "1/4", "1/2") == [92, 183, 366, 732]
    assert counts(2975, COUNTS, "1/30", "1/16", "1/8", "1/4", "1/2") == [100, 186, 372, 744, 1487]


def test_paper_counts_belong_to_the_whole_set(tmp_path: Path) -> None:
    trees.write_voc(tmp_path / "voc", augmented=13)
    trees.write_cityscapes(tmp_path / "city")
    assert not opened("voc", tmp_path / "voc").paper_counts
    dataset = opened("cityscapes", tmp_path / "city")
    assert not dataset.paper_counts
    dataset._train = ["x"] * 2975  # type: ignore[attr-defined]
    assert dataset.paper_counts == COUNTS


def test_folder_with_unlabelled_images_and_val(tmp_path: Path) -> None:
    root = trees.write_folder(tmp_path / "my data ü")
    dataset = opened("folder", root)
    assert dataset.train_ids()[0] == "images/größer/photo 1.jpg"
    assert (len(dataset.train_ids()), len(dataset.eval_ids())) == (6, 2)
    assert dataset.unlabeled_ids()[-1] == "unlabeled/photo 2.JPG"
    assert dataset.info.classes == trees.CLASSES
    for name in dataset.train_ids() + dataset.eval_ids():
        assert set(dataset.pair(name)[1].unique().tolist()) <= {0, 1, 2, 3, 255}
    for entry in (
        "images/photo 2.jpg masks/photo 2.png",
        "/images/photo 2.jpg",
        "photo 2",
        "images/photo 2",
        "photo 2.jpg",
        "./images/photo 2.jpg",
        "images\\photo 2.jpg",
        f"{root}/images/photo 2.jpg\t{root}/masks/photo 2.png",
        f"{root.name}/images/photo 2.jpg",
        f"/elsewhere/{root.name}/images/photo 2.jpg",
        f"C:\\data\\{root.name}\\images\\photo 2.jpg",
    ):
        (tmp_path / "list.txt").write_text(f"{entry}\r\n", "utf-8")
        labeled, unlabeled = make_split(dataset, "1", 0, tmp_path / "list.txt", None)
        assert labeled == ["images/photo 2.jpg"]
        assert len(unlabeled) == 5 + 4
    (tmp_path / "list.txt").write_text("/elsewhere/images/photo 2.jpg", "utf-8")
    with pytest.raises(UserError, match=r"have names such as images/größer/photo 1\.jpg"):
        make_split(dataset, "1", 0, tmp_path / "list.txt", None)


def test_whole_names_win_over_shortened_ones(tmp_path: Path) -> None:
    root = trees.write_folder(tmp_path)
    image, label = trees.picture((40, 48), (1,), 0)
    trees.save_image(root / "images" / "unlabeled" / "photo 0.JPG", image)
    trees.save_mask(root / "masks" / "unlabeled" / "photo 0.png", label)
    dataset = opened("folder", root)
    assert dataset.find("unlabeled/photo 0.JPG") == "unlabeled/photo 0.JPG"
    assert dataset.find("unlabeled/photo 0") == "unlabeled/photo 0.JPG"
    assert dataset.find("images/unlabeled/photo 0") == "images/unlabeled/photo 0.JPG"
    assert all(dataset.find(name) == name for name in dataset.train_ids() + dataset.unlabeled_ids())


def test_folder_without_val_holds_images_out(tmp_path: Path) -> None:
    root = trees.write_folder(tmp_path, labeled=10, evaluation=0)
    dataset = opened("folder", root, holdout=0.3)
    assert (len(dataset.train_ids()), len(dataset.eval_ids())) == (7, 3)
    assert "3 of the images with masks, which are held out" in dataset.notes[0]
    assert opened("folder", root, holdout=0.3).eval_ids() == dataset.eval_ids()


@pytest.mark.parametrize("holdout", [0.1, 0.99])
def test_something_is_left_to_learn_and_to_evaluate(tmp_path: Path, holdout: float) -> None:
    two = opened("folder", trees.write_folder(tmp_path / "2", labeled=2, evaluation=0))
    assert (len(two.train_ids()), len(two.eval_ids())) == (1, 1)
    one = trees.write_folder(tmp_path / "1", labeled=1, evaluation=0)
    with pytest.raises(UserError, match="one image with a mask cannot be both learned"):
        opened("folder", one, holdout=holdout)


def test_tuning_leaves_the_validation_images_alone(tmp_path: Path) -> None:
    trees.write_voc(tmp_path)
    whole, tuned = opened("voc", tmp_path), opened("voc", tmp_path, eval_split="tune", holdout=0.25)
    assert sorted(tuned.train_ids() + tuned.eval_ids()) == whole.train_ids()
    assert len(tuned.eval_ids()) == 2


def test_id_map_and_ignore_index_of_a_folder(tmp_path: Path) -> None:
    text = """
    classes: {1: thing, 0: ground}
    palette: [[1, 2, 3], [4, 5, 6]]
    ignore_index: 3
    id_map: {0: ground, 1: 1, 2: thing, 255: ignore}
    mean: [0.5, 0.5, 0.5]
    """
    plain = opened("folder", trees.write_folder(tmp_path / "a"))
    mapped = opened("folder", trees.write_folder(tmp_path / "b", description=text))
    assert mapped.info.classes == ("ground", "thing")
    assert (mapped.info.palette[1], mapped.info.mean[0]) == ((4, 5, 6), 0.5)
    for name in plain.train_ids():
        before, after = plain.label(name).long(), mapped.label(name).long()
        table = torch.full((256,), 255)
        table[:3] = torch.tensor([0, 1, 1])
        assert torch.equal(after, table[before])


def test_numbers_beyond_a_byte_can_be_mapped(tmp_path: Path) -> None:
    text = "classes: [a, b]\nid_map: {0: a, 1000: b}\n"
    root = trees.write_folder(tmp_path, description=text)
    name = "images/photo 0.jpg"
    wide = np.zeros((40, 48), np.uint16)
    wide[:20] = 1000
    Image.fromarray(wide).save(root / "masks" / "photo 0.png")
    assert opened("folder", root).label(name).unique().tolist() == [0, 1]
    wide[0] = 1001
    Image.fromarray(wide).save(root / "masks" / "photo 0.png")
    with pytest.raises(UserError, match=r"photo 0.png: .* no class: 1001. .* 0, 255 and 1000"):
        opened("folder", root).label(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [a", "no valid YAML"),
        ("- a", "must hold `name: value` lines"),
        ("labels: [a, b]", "labels is none of the known keys"),
        ("classes: a", "classes must be a list"),
        ("classes: {1: a, 2: b}", "classes must be a list"),
        ("classes: [a, a]", "same name"),
        ("classes: [no, yes]", "as False. Put it in quotes"),
        ("classes: [a, b]\npalette: [[0, 0, 0]]", "palette must be a list of 2 colours"),
        ("classes: [a, b]\npalette: [[0, 0, 0], [0, 0, 300]]", "palette must be"),
        ("classes: [a, b]\nignore_index: none", "ignore_index must be a number"),
        (
            "classes: [a, b, c]\nignore_index: 1",
            "Take b out of the classes and write `id_map: {0: 0",
        ),
        ("classes: [a, b]\nignore_index: 3\nid_map: {3: b, 0: a}", "Take one of the two out"),
        ("classes: [a, b]\nwhite: [1]", "white must be the value of white"),
        ("classes: [a, b]\nid_map: {0: c}", "id_map maps 0 to 'c'"),
        ("classes: [a, b]\nid_map: {-1: 0}", "id_map maps -1 to 0"),
        ("classes: [a, b]\nid_map: [0]", "id_map must hold"),
        ("classes: [a, b]\nstd: [0, 1, 1]", "std must be three numbers"),
    ],
)
def test_bad_descriptions(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=r"dataset\.yaml") as caught:
        opened("folder", trees.write_folder(tmp_path, description=text))
    assert message in str(caught.value)


def test_two_images_cannot_share_a_mask(tmp_path: Path) -> None:
    root = trees.write_folder(tmp_path)
    (root / "images" / "photo 0.png").write_bytes((root / "images" / "photo 0.jpg").read_bytes())
    with pytest.raises(UserError, match="differ in their endings only"):
        opened("folder", root)


@pytest.mark.parametrize("name", ["voc", "cityscapes", "folder"])
def test_wrong_roots(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"`data_root`: the dataset \w+ needs the folder that"):
        data.open_dataset(name, None, DatasetOptions())
    with pytest.raises(UserError, match="there is no such folder"):
        opened(name, tmp_path / "nowhere")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        opened(name, tmp_path)


def broken(kind: str, root: Path) -> tuple[Dataset, str]:
    """A VOC tree with one mistake in a training image, and what is to be said of it."""
    folder = trees.write_voc(root)
    image = folder / "JPEGImages" / "2007_000032.jpg"
    mask = folder / "SegmentationClassAug" / "2007_000032.png"
    _, label = trees.picture((40, 50), (1, 2), 0)
    if kind == "truncated":
        image.write_bytes(image.read_bytes()[:-300])
        text = f"{image} cannot be read as an image"
    elif kind == "size":
        trees.save_mask(mask, label[:-1])
        text = f"{mask}: the mask has 50x39 pixels, but its image {image} has 50x40"
    elif kind == "label":
        label[3, 4] = 37
        trees.save_mask(mask, label)
        text = f"{mask}: the mask holds numbers that are no class: 37. Expected are 0..20 and 255"
    elif kind == "colours":
        Image.open(image).save(mask)
        text = f"{mask}: the mask is an image of colours (mode RGB)"
    elif kind == "no image":
        image.unlink()
        text = f"{image}: there is no such"
    elif kind == "no mask":
        mask.unlink()
        (folder / "SegmentationClass" / "2007_000032.png").unlink()
        names = "".join(f"{file.stem}\n" for file in (folder / "JPEGImages").iterdir())
        (folder / "ImageSets" / "Segmentation" / "trainaug.txt").write_text(names, "utf-8")
        text = "2007_000032.png: there is no such"
    else:
        raise ValueError(kind)
    return opened("voc", root), text


BROKEN = ("truncated", "size", "label", "colours", "no image", "no mask")


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_files_are_named_before_training(tmp_path: Path, kind: str) -> None:
    dataset, text = broken(kind, tmp_path)
    with pytest.raises(UserError) as caught:
        check_quickly(dataset, ["2007_000032"], [])
    assert text in str(caught.value)


def test_no_list_is_advised_for_a_missing_image_to_evaluate_on(tmp_path: Path) -> None:
    folder = trees.write_voc(tmp_path)
    dataset = opened("voc", tmp_path)
    (folder / "JPEGImages" / f"{dataset.eval_ids()[0]}.jpg").unlink()
    with pytest.raises(UserError, match="Complete the dataset: every run is evaluated on this"):
        check_quickly(dataset, dataset.train_ids(), [])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", BROKEN)
def test_bad_files_are_named_from_any_process(tmp_path: Path, kind: str, workers: int) -> None:
    dataset, text = broken(kind, tmp_path)
    view = GeometricView((8, 8), (1, 1), False, 0, 0, dataset.info.mean)
    views = ViewDataset(dataset, ["2007_000032"], view, True, 0, "test")
    with pytest.raises(UserError) as caught:
        list(load(views, DrawSampler(1, 2, 0, 2, 0, "test"), workers, False))
    assert str(caught.value).startswith(str(tmp_path))
    assert text in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_unlabelled_images_need_no_mask(tmp_path: Path) -> None:
    folder = trees.write_voc(tmp_path)
    dataset = opened("voc", tmp_path)
    labeled, unlabeled = make_split(dataset, "1/4", 0, None, None)
    for name in unlabeled:
        for masks in ("SegmentationClass", "SegmentationClassAug"):
            (folder / masks / f"{name}.png").unlink(missing_ok=True)
    check_quickly(dataset, labeled, unlabeled)
    view = GeometricView((8, 8), (1, 1), False, 0, 0, dataset.info.mean)
    views = ViewDataset(dataset, unlabeled, view, False, 0, "test")
    assert len(list(load(views, DrawSampler(6, 3, 0, 2, 0, "test"), 0, False))) == 2


@pytest.mark.parametrize("name", ["voc", "cityscapes", "folder"])
def test_datasets_travel_to_processes_that_are_started_anew(tmp_path: Path, name: str) -> None:
    write = {"voc": trees.write_voc, "cityscapes": trees.write_cityscapes}
    write.get(name, trees.write_folder)(tmp_path)
    dataset = opened(name, tmp_path)
    there = pickle.loads(pickle.dumps(dataset))
    for one, other in zip(
        dataset.pair(dataset.train_ids()[0]), there.pair(dataset.train_ids()[0]), strict=True
    ):
        assert torch.equal(one, other)


def test_images_of_any_mode_are_read_in_colour(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, (5, 4)).save(path)
        assert read_image(path).shape == (3, 4, 5)


def test_numbers_as_ranges() -> None:
    assert ranges([0, 1, 2, 7, 255]) == "0..2, 7 and 255"
    assert ranges([4]) == "4"


def test_links_show_each_image_once(tmp_path: Path) -> None:
    (tmp_path / "images" / "b").mkdir(parents=True)
    for name in ("x.jpg", "b/y.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "again").symlink_to(".")
    (tmp_path / "images" / "a").symlink_to("b")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "z.jpg")
    (tmp_path / "images" / "linked").symlink_to("../elsewhere")
    found = find_images(tmp_path, "images")
    assert found == ["images/b/y.jpg", "images/linked/z.jpg", "images/x.jpg"]


@pytest.mark.parametrize(("kind", "white"), [(np.float32, 1), (np.int32, 255)])
def test_grey_images_without_a_known_white_are_refused(
    tmp_path: Path, kind: type, white: int
) -> None:
    """One value above a step would give an image another scale than the others have."""
    root = trees.write_folder(tmp_path)
    name = opened("folder", root).train_ids()[0]
    grey = np.full((40, 48), white, kind)
    grey[0, 0] *= 2
    Image.fromarray(grey).save((root / name).with_suffix(".tif"))
    (root / name).unlink()
    name = str(Path(name).with_suffix(".tif"))
    with pytest.raises(UserError, match=r"\.tif: this grey image holds .* `white: ") as refused:
        opened("folder", root).image(name)
    assert "ctt-data stats" in str(refused.value)
    with (root / "dataset.yaml").open("a", encoding="utf-8") as file:
        file.write(f"white: {white}\n")
    assert (opened("folder", root).image(name) == 255).all()


@pytest.mark.parametrize("orientation", [1, 3])
def test_a_fourth_band_of_a_tiff_is_no_transparency(tmp_path: Path, orientation: int) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (5, 4, 3), np.uint8)
    infrared = np.full((5, 4, 1), 10, np.uint8)
    bands = Image.fromarray(np.concatenate([colours, infrared], axis=2), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = orientation
    bands.save(tmp_path / "bands.tif", exif=exif)  # ExtraSamples 2, as GDAL writes four bands
    bands.save(tmp_path / "photo.png")
    expected = colours if orientation == 1 else colours[::-1, ::-1]
    found = read_image(tmp_path / "bands.tif").permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected)
    assert read_image(tmp_path / "photo.png").float().mean() > 240  # over white


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a/../../b"])
def test_lists_of_voc_do_not_lead_elsewhere(tmp_path: Path, name: str) -> None:
    folder = trees.write_voc(tmp_path)
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text(f"{name}\n", "utf-8")
    with pytest.raises(UserError, match=r"train\.txt: .* leads to another folder"):
        opened("voc", tmp_path)


@pytest.mark.parametrize("line", ["../outside.jpg", "images/../../outside.jpg", "/outside.jpg"])
def test_lists_of_a_folder_do_not_lead_elsewhere(tmp_path: Path, line: str) -> None:
    root = trees.write_folder(tmp_path / "set")
    trees.save_image(tmp_path / "outside.jpg", np.zeros((4, 4, 3), np.uint8))
    (root / "list.txt").write_text(line.replace("/outside", f"{tmp_path}/outside", 1), "utf-8")
    with pytest.raises(UserError, match="is no training image of this dataset"):
        make_split(opened("folder", root), "1", 0, root / "list.txt", None)
