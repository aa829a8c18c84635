"""Made-up exports in the true forms of annotation tools, all of the same images and shapes.

Four images hold a cat of columns 8 to 23 in rows 4 to 19 and, on top of it, a smaller dog of
columns 16 to 23 in rows 12 to 19; two more images have no annotation.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

H, W = 48, 64
ANNOTATED, OTHERS = 4, 2
CAT, DOG = (8, 4, 24, 20), (16, 12, 24, 20)  # left, top, right, bottom
COLOURS = {"background": (0, 0, 0), "cat": (250, 50, 50), "dog": (30, 120, 250)}
Array = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def label() -> Array:
    found = np.zeros((H, W), np.uint8)
    for number, (left, top, right, bottom) in ((1, CAT), (2, DOG)):
        found[top:bottom, left:right] = number
    return found


def write_images(folder: Path, start: int = 0, count: int = ANNOTATED + OTHERS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(0, 60, (H, W, 3), np.uint8)
        for c, colour in enumerate(COLOURS.values()):
            pixels[label() == c] += np.array(colour, np.uint8) // 2
        Image.fromarray(pixels).save(folder / f"photo {i}.jpg", quality=95)


def corners(box: tuple[int, int, int, int]) -> list[float]:
    left, top, right, bottom = map(float, box)
    return [left, top, right, top, right, bottom, left, bottom]


def region(box: tuple[int, int, int, int]) -> Array:
    found = np.zeros((H, W), np.uint8)
    found[box[1] : box[3], box[0] : box[2]] = 1
    return found


def runs(flat: Array) -> list[int]:
    """The lengths of alternating runs of 0 and 1."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.ravel(), [2]])))
    return np.diff(np.concatenate([[0], edges])).tolist()


def compressed(mask: Array) -> dict[str, Any]:
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask))
    return {"size": code["size"], "counts": code["counts"].decode()}


def coco(root: Path) -> Path:
    """As CVAT and COCO have it: annotations/ beside images/; polygons and both run-length codes."""
    write_images(root / "images")
    forms: list[Callable[[Any], Any]] = [
        lambda box: [corners(box)],
        lambda box: {"size": [H, W], "counts": runs(region(box).T)},
        lambda box: compressed(region(box)),
    ]
    annotations = []
    for i in range(ANNOTATED):
        for category, box in ((9, DOG), (4, CAT)):
            drawn, area = forms[i % 3](box), (box[2] - box[0]) * (box[3] - box[1])
            one = {
                "id": len(annotations) + 1,
                "image_id": i + 1,
                "category_id": category,
                "segmentation": drawn,
                "area": area,
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "iscrowd": int(isinstance(drawn, dict) and category == 4),
            }
            annotations.append(one)
    values = {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": {"contributor": "", "version": ""},
        "categories": [
            {"id": 4, "name": "cat", "supercategory": ""},
            {"id": 9, "name": "dog", "supercategory": ""},
        ],
        "images": [
            {"id": i + 1, "width": W, "height": H, "file_name": f"photo {i}.jpg", "license": 0}
            for i in range(ANNOTATED + OTHERS)
        ],
        "annotations": annotations,
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_default.json").write_text(json.dumps(values))
    return root


def yolo(root: Path) -> Path:
    """As Ultralytics has it: data.yaml, images/train and labels/train."""
    write_images(root / "images" / "train")
    (root / "labels" / "train").mkdir(parents=True)
    for i in range(ANNOTATED):
        lines = []
        for number, box in ((1, DOG), (0, CAT)):
            shares = np.array(corners(box)).reshape(-1, 2) / (W, H)
            lines.append(f"{number} {' '.join(f'{share:.6f}' for share in shares.ravel())}\n")
        (root / "labels" / "train" / f"photo {i}.txt").write_text("".join(lines))
    text = "path: ../datasets/pets\ntrain: images/train\nval: images/train\nnames:\n  0: cat\n"
    (root / "data.yaml").write_text(f"{text}  1: dog\n")
    return root


def labelme(root: Path) -> Path:
    """As LabelMe has it: a JSON file beside each image, with polygons, rectangles and bitmaps."""
    write_images(root)
    for i in range(ANNOTATED):
        shapes = []
        for name, (left, top, right, bottom) in (("cat", CAT), ("dog", DOG)):
            kind = ("polygon", "rectangle", "mask")[i % 3]
            box = [[left, top], [right, bottom]]
            one: dict[str, Any] = {
                "label": name,
                "points": box
                if kind != "polygon"
                else np.reshape(corners((left, top, right, bottom)), (-1, 2)).tolist(),
                "group_id": None,
                "description": "",
                "shape_type": kind,
                "flags": {},
                "mask": None,
            }
            if kind == "mask":
                file = io.BytesIO()
                Image.fromarray(np.ones((bottom - top, right - left), np.bool_)).save(file, "PNG")
                one["mask"] = base64.b64encode(file.getvalue()).decode()
            shapes.append(one)
        values = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"..\\photos\\photo {i}.jpg",
            "imageData": base64.b64encode((root / f"photo {i}.jpg").read_bytes()).decode(),
            "imageHeight": H,
            "imageWidth": W,
        }
        (root / f"photo {i}.json").write_text(json.dumps(values))
    return root


def cvat(root: Path) -> Path:
    """As CVAT for images 1.1 has it: annotations.xml and images/; outlines, boxes and masks."""
    write_images(root / "images")
    images = []
    for i in range(ANNOTATED + OTHERS):
        shapes = []
        for z, name, box in ((1, "dog", DOG), (0, "cat", CAT)):
            left, top, right, bottom = box
            common = f'label="{name}" source="manual" occluded="0" z_order="{z}"'
            pairs = np.reshape(corners(box), (-1, 2))
            drawn = (
                f'<polygon {common} points="{";".join(f"{x:.2f},{y:.2f}" for x, y in pairs)}"/>',
                f'<box {common} xtl="{left}.0" ytl="{top}.0" xbr="{right}.0" ybr="{bottom}.0"/>',
                f'<mask {common} rle="0, {(right - left) * (bottom - top)}" left="{left}" '
                f'top="{top}" width="{right - left}" height="{bottom - top}"/>',
            )
            shapes.append(drawn[i % 3])
        body = "\n    ".join(shapes if i < ANNOTATED else [])
        size = f'width="{W}" height="{H}"'
        images.append(f'  <image id="{i}" name="photo {i}.jpg" {size}>\n    {body}\n  </image>\n')
    labels = "".join(
        f"<label><name>{name}</name><color>#c06060</color><type>any</type></label>"
        for name in ("cat", "dog")
    )
    (root / "annotations.xml").write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
        f"  <meta><task><labels>{labels}</labels></task></meta>\n{''.join(images)}</annotations>\n"
    )
    return root


def masks(root: Path) -> Path:
    """As CVAT's Segmentation mask 1.1 has it: labelmap.txt, JPEGImages/ and SegmentationClass/."""
    write_images(root / "JPEGImages")
    table = np.array([*COLOURS.values()], np.uint8)
    for folder in ("SegmentationClass", "SegmentationObject"):
        (root / folder).mkdir()
        for i in range(ANNOTATED):
            colours = table if folder == "SegmentationClass" else table[::-1]
            Image.fromarray(colours[label()]).save(root / folder / f"photo {i}.png")
    lines = [f"{name}:{r},{g},{b}::\n" for name, (r, g, b) in COLOURS.items()]
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "".join(lines))
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "default.txt").write_text("photo 0\n")
    return root


def berries(
    root: Path, labeled: int = 30, unlabeled: int = 200, size: tuple[int, int] = (120, 160)
) -> None:
    """A COCO export in export/, and photos/: round berries and long leaves on photographs."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    images, annotations = [], []
    for i in range(labeled + unlabeled):
        rng = np.random.default_rng(i)
        photograph = photographs[i % len(photographs)]
        y, x = (rng.integers(0, s - n) for s, n in zip(photograph.shape, size, strict=False))
        pixels = photograph[y : y + size[0], x : x + size[1]] // 2
        rows, columns = np.mgrid[: size[0], : size[1]]
        for category, tint in ((1, (220, 40, 70)), (2, (60, 200, 60))):
            for _ in range(rng.integers(1, 3)):
                centre = np.array([rng.uniform(15, size[1] - 15), rng.uniform(15, size[0] - 15)])
                turn = np.arange(24) * np.pi / 12
                axes = rng.uniform(8, 14) * np.array([1, 1] if category == 1 else [1.8, 0.6])
                angle = rng.uniform(0, np.pi)
                turning = np.array(
                    [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
                )
                ring = np.stack([np.cos(turn), np.sin(turn)], 1) * axes @ turning + centre
                there = (np.stack([columns, rows], -1) + 0.5 - centre) @ turning.T / axes
                inside = (there**2).sum(-1) < 1
                shade = rng.uniform(0.6, 1.0) * np.array(tint)
                pixels[inside] = (0.25 * pixels[inside] + 0.75 * shade).astype(np.uint8)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i + 1,
                        "category_id": category,
                        "segmentation": [ring.clip(0).ravel().round(2).tolist()],
                        "iscrowd": 0,
                    }
                )
        noise = rng.integers(0, 12, (*size, 3), np.uint8)
        name = f"img_{i:04}.jpg"
        folder = root / "export" / "images" if i < labeled else root / "photos"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + noise).save(folder / name, quality=92)
        images.append({"id": i + 1, "file_name": name, "width": size[1], "height": size[0]})
    values = {
        "images": images[:labeled],
        "annotations": [a for a in annotations if a["image_id"] <= labeled],
        "categories": [{"id": 1, "name": "berry"}, {"id": 2, "name": "leaf"}],
    }
    (root / "export" / "annotations").mkdir()
    (root / "export" / "annotations" / "instances_default.json").write_text(json.dumps(values))
    # of the photos too, to compare with
    values |= {"images": images, "annotations": annotations}
    (root / "truth.json").write_text(json.dumps(values))


FORMS = {"coco": coco, "yolo": yolo, "labelme": labelme, "cvat": cvat, "masks": masks}
