"""The part of the page that orders the images of a folder: which to label next."""

from __future__ import annotations

import contextlib
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from ctt.data import IMAGE_SUFFIXES
from ctt.data.rasters import read_as
from ctt.errors import UserError
from ctt.inference.rank import Committee, Rating, order
from ctt.inference.render import overlay
from ctt.text import printable

if TYPE_CHECKING:
    from ctt.cli.page import Viewer

MOST = 500  # images of a folder that are looked at
SHOWN = 12  # of them, in the order
SIDE = 320  # of a picture, in pixels


def ranking(viewer: Viewer) -> None:
    """Add to a page where a folder is dropped, and its first images in the order."""
    with gr.Accordion("Which images of a folder to label next", open=False, elem_id="ranking"):
        files = gr.File(
            file_count="directory", type="filepath", label="folder of images", elem_id="folder"
        )
        gallery = gr.Gallery(
            label="overlay, and where the networks disagree",
            columns=3,
            object_fit="contain",
            interactive=False,
            elem_id="order",
        )
        table = gr.HTML()

        def show(paths: list[str] | None) -> tuple[list[Any], str]:
            return ranked(viewer, paths or [])

        files.change(show, [files], [gallery, table], show_progress="minimal")


def ranked(viewer: Viewer, paths: list[str]) -> tuple[list[tuple[Image.Image, str]], str]:
    """Return pictures of the first images with their captions, and HTML of the whole order.

    Args:
        paths: files; those that are no images are left out, and those that cannot be read named.
    """
    committee = Committee(viewer.trained, viewer.device, viewer.settings)
    files = sorted(Path(p) for p in paths if Path(p).suffix.lower() in IMAGE_SUFFIXES)
    kept: list[Path] = []
    ratings: list[Rating] = []
    failures: list[str] = []
    for file in files[:MOST]:
        try:
            ratings.append(committee.rate(read_as(file, viewer.info)))
            kept.append(file)
        except UserError as error:
            failures.append(printable(str(error).replace(str(file), file.name)))
    places = order(ratings)
    pictures, rows = [], []
    for number, place in enumerate(places, 1):
        file, rating = kept[place.image], ratings[place.image]
        if number <= SHOWN:
            with contextlib.suppress(UserError):  # its file has gone, or memory has become less
                picture = beside(viewer, committee, read_as(file, viewer.info))
                pictures.append((picture, f"{number}. {file.name}"))
        cells = (f"{rating.disagreement:.3f}", f"{rating.entropy:.3f}")
        rows.append(
            f"<tr><td>{number}. {html.escape(file.name)}</td>"
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    if len(files) > MOST:
        failures.append(f"Only the first {MOST} of {len(files)} images are looked at.")
    told = "".join(f"<p>{html.escape(text)}</p>" for text in failures)
    if not rows:
        return [], told
    head = "<tr><th>image</th><th>disagreement</th><th>entropy</th></tr>"
    return pictures, f"{told}<table>{head}{''.join(rows)}</table>"


def beside(viewer: Viewer, committee: Committee, image: Tensor) -> Image.Image:
    """Return the overlay of an image beside a map of the disagreement, bright where it is large."""
    label, disagreement, _ = committee.look(image)
    largest = max(float(disagreement.max()), 1e-6)
    colours = matplotlib.colormaps["magma"]((disagreement / largest).numpy(), bytes=True)
    halves = (overlay(image, label, viewer.info), Image.fromarray(colours[..., :3].copy()))
    both = Image.fromarray(np.concatenate([np.asarray(half) for half in halves], axis=1))
    if (factor := -(-SIDE // max(halves[0].size))) > 1:
        return both.resize((both.width * factor, both.height * factor), Image.Resampling.NEAREST)
    both.thumbnail((4 * SIDE, 2 * SIDE))
    return both
