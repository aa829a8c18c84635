"""Made-up datasets in the true layouts of VOC 2012, Cityscapes and a plain folder.

Shapes of a class have that class's hue, so that something can be learnt from a handful of images.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ctt.data import cityscapes, voc

Array = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

NAMES = ("2007_000032", "2007_000039", "mit Leer zeichen", "Straße 12 ü", "2008_000008")
CLASSES = ("background", "red thing", "green thing", "blue thing")


def picture(size: tuple[int, int], classes: Sequence[int], seed: int) -> tuple[Array, Array]:
    """Image (H, W, 3) and labels (H, W): one box of each class on class 0, with a 255 border."""
    rng = np.random.default_rng(seed)
    height, width = size
    label = np.zeros(size, np.uint8)
    for c in classes:
        h, w = height // 3, width // 3
        y, x = rng.integers(1, height - h), rng.integers(1, width - w)
        label[y - 1 : y + h + 1, x - 1 : x + w + 1] = 255
        label[y : y + h, x : x + w] = c
    colours = rng.integers(40, 216, (256, 3), np.uint8) // 4
    colours[list(classes)] += np.array(
        [[(c * 67) % 150, (c * 131) % 150, 90] for c in classes], np.uint8
    )
    noise = rng.integers(0, 12, (*size, 3), np.uint8)
    return colours[label] + noise, label


def save_mask(path: Path, label: Array, mode: str = "P") -> None:
    """`mode` P: palette PNG of VOC's colours; L: grey; RGB: the colours themselves (no mask)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(label, mode="P")
    mask.putpalette([channel for colour in voc.bit_palette(256) for channel in colour])
    if mode == "L":
        mask = Image.fromarray(label, mode="L")
    (mask.convert("RGB") if mode == "RGB" else mask).save(path)


def save_image(path: Path, image: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


def write_voc(
    root: Path,
    *,
    classic: int = 3,
    augmented: int = 5,
    evaluation: int = 2,
    size: tuple[int, int] = (40, 50),
    aug_folder: str = voc.AUG_MASKS,
    mask_mode: str = "P",
) -> Path:
    """VOCdevkit/VOC2012 below `root`, the folder that is returned.

    `classic` images are in train.txt with masks in both folders, `augmented` more have a mask in
    `aug_folder` only; the first names hold spaces and letters beyond ASCII.
    """
    folder = root / "VOCdevkit" / "VOC2012"
    names = [*NAMES, *(f"2009_{i:06}" for i in range(classic + augmented + evaluation))]
    parts = {
        "train": names[:classic],
        "aug": names[classic : classic + augmented],
        "val": names[classic + augmented : classic + augmented + evaluation],
    }
    for part, members in parts.items():
        for name in members:
            seed = names.index(name)
            image, label = picture(size, (1 + seed % 20, 1 + (seed + 7) % 20), seed)
            save_image(folder / "JPEGImages" / f"{name}.jpg", image)
            folders = {aug_folder} if part == "aug" else {aug_folder, voc.CLASSIC_MASKS}
            for masks in folders if aug_folder else folders - {""}:
                save_mask(folder / masks / f"{name}.png", label, mask_mode)
    lists = folder / voc.LISTS
    lists.mkdir(parents=True)
    for file in ("train", "val"):
        (lists / f"{file}.txt").write_text("".join(f"{n}\n" for n in parts[file]), "utf-8")
    both = [*parts["train"], *parts["val"]]
    (lists / "trainval.txt").write_text("".join(f"{n}\n" for n in both), "utf-8")
    return folder


def write_cityscapes(
    root: Path,
    *,
    train: int = 4,
    evaluation: int = 2,
    extra: int = 0,
    test: int = 0,
    size: tuple[int, int] = (32, 64),
    train_ids: bool = False,
) -> Path:
    """leftImg8bit and gtFine in `root`, which is returned; labelTrainIds only if `train_ids`."""
    numbers = [number for number, _ in cityscapes.CLASSES.values()]
    for split, count, cities in (
        ("train", train, ("aachen", "zürich west")),
        ("val", evaluation, ("lindau",)),
        ("train_extra", extra, ("bamberg",)),
        ("test", test, ("berlin",)),
    ):
        for i in range(count):
            city = cities[i % len(cities)]
            name = f"{city}_{i:06}_000019"
            classes = [1 + (i + c) % 18 for c in range(3)]
            image, label = picture(size, classes, i + len(split))
            save_image(
                root / cityscapes.IMAGES / split / city / f"{name}{cityscapes.ENDING}", image
            )
            if split in ("train_extra", "test"):
                continue
            stem = root / cityscapes.MASKS / split / city / f"{name}_gtFine"
            ids = np.full(256, 4, np.uint8)  # 4 is `static`, which is not evaluated
            ids[: len(numbers)] = numbers
            save_mask(stem.with_name(f"{stem.name}_labelIds.png"), ids[label], "L")
            if train_ids:
                save_mask(stem.with_name(f"{stem.name}_labelTrainIds.png"), label, "L")
    return root


def write_folder(
    root: Path,
    *,
    labeled: int = 6,
    unlabeled: int = 4,
    evaluation: int = 2,
    size: tuple[int, int] = (40, 48),
    mask_mode: str = "P",
    description: str | None = None,
) -> Path:
    """images/, masks/, unlabeled/ and val/ in `root`, which is returned, with dataset.yaml.

    Images of odd numbers are in a subfolder; none of `unlabeled` has a mask.
    """
    for folder, count in (("", labeled), ("unlabeled", unlabeled), ("val/", evaluation)):
        for i in range(count):
            name = f"photo {i}" if i % 2 == 0 else f"größer/photo {i}"
            image, label = picture(size, (1 + i % 3, 1 + (i + 1) % 3), 100 * len(folder) + i)
            if folder == "unlabeled":
                save_image(root / folder / f"{name}.JPG", image)
                continue
            save_image(root / f"{folder}images" / f"{name}.jpg", image)
            save_mask(root / f"{folder}masks" / f"{name}.png", label, mask_mode)
    text = description if description is not None else f"classes: [{', '.join(CLASSES)}]\n"
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.yaml").write_text(text, "utf-8")
    return root


def write_ade20k(
    root: Path, *, train: int = 5, evaluation: int = 2, shifted: bool = False, other: bool = True
) -> Path:
    """ADEChallengeData2016 below `root`, which is returned; the second image is grey.

    Args:
        shifted: masks hold class c as c and 255 for other, instead of c + 1 and 0.
        other: whether some pixels are of no class.
    """
    folder = root / "ADEChallengeData2016"
    for part, short, count in (("training", "train", train), ("validation", "val", evaluation)):
        for i in range(count):
            name = f"ADE_{short}_{i + 1:08}"
            image, label = picture((40, 48), (3 + i, 100 + 7 * i), i + len(part))
            if not other:
                label[label == 255] = 0
            path = folder / "images" / part / f"{name}.jpg"
            save_image(path, image)
            if i == 1:
                Image.open(path).convert("L").save(path)
            stored = label if shifted else np.where(label == 255, 0, label + 1).astype(np.uint8)
            save_mask(folder / "annotations" / part / f"{name}.png", stored, "L")
    for file in ("objectInfo150.txt", "sceneCategories.txt"):
        (folder / file).write_text("not read\n")
    return root


def write_coco(root: Path) -> Path:
    """train2017, val2017 and annotations of COCO 2017 in `root`, which is returned.

    Image 1 has a box in a larger one, both polygons; image 2 is grey, and has a crowd (uncompressed
    run lengths) with a person in it (compressed ones); image 3 has no annotation; image 4 a polygon
    of two parts.
    """
    from pycocotools import mask as codes

    from ctt.data import coco

    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    categories = [
        {"id": i, "name": name, "supercategory": "thing"}
        for i, name in zip(ids, coco.CLASSES[1:], strict=True)
    ]
    height, width = 40, 48
    crowd = np.zeros((height, width), np.uint8)
    crowd[10:30, 5:40] = 1
    runs, last = [0], 0
    for value in crowd.T.ravel().tolist():
        if value != last:
            runs.append(0)
            last = value
        runs[-1] += 1
    inner = np.zeros((height, width), np.uint8, order="F")
    inner[15:20, 10:16] = 1
    compressed = codes.encode(inner)
    compressed["counts"] = compressed["counts"].decode()

    def box(left: int, top: int, right: int, bottom: int) -> list[int]:
        return [left, top, right, top, right, bottom, left, bottom]

    drawn = [
        (1, 18, [box(20, 10, 26, 16)], 0),  # the smaller comes first in the file
        (1, 90, [box(10, 5, 40, 30)], 0),
        (2, 62, {"size": [height, width], "counts": runs}, 1),
        (2, 1, dict(compressed), 0),
        (4, 13, [box(2, 2, 8, 8), box(30, 20, 36, 30)], 0),
    ]
    for part, first in (("train2017", 0), ("val2017", 100)):
        images = []
        for i in (1, 2, 3, 4):
            name = f"{first + i:012}.jpg"
            image, _ = picture((height, width), (i,), first + i)
            save_image(root / part / name, image)
            if i == 2:
                Image.open(root / part / name).convert("L").save(root / part / name)
            images.append({"id": first + i, "file_name": name, "height": height, "width": width})
        annotations = [
            {
                "id": k,
                "image_id": first + i,
                "category_id": c,
                "segmentation": s,
                "iscrowd": crowded,
            }
            for k, (i, c, s, crowded) in enumerate(drawn)
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = root / "annotations" / f"instances_{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return root
