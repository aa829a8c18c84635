"""ctt-predict: masks and overlays of images."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ctt.cli.common import run_program
from ctt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ctt.data.source import DatasetInfo

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
OVERLAY = 0.55  # opacity of the mask's colours over the image


@dataclass(frozen=True)
class Arguments:
    """Segment images: for each NAME.jpg, NAME_mask.png (palette PNG) and NAME_overlay.png."""

    weights: Path
    """A best.safetensors, or the folder of a run that holds one."""
    images: tuple[Path, ...]
    """Images, or folders of images."""
    out: Path = Path("predictions")
    """Folder for the results."""
    overwrite: bool = False
    """Replace results that are there already."""
    device: str = "auto"


def main() -> None:
    """The program."""
    run_program("ctt-predict", lambda: _main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    import tyro

    parsed = tyro.cli(
        Arguments, prog="ctt-predict", args=arguments, config=(tyro.conf.PositionalRequiredArgs,)
    )
    files = find_images(parsed.images)
    check_targets(files, parsed.out, parsed.overwrite)
    from rich.progress import track

    from ctt.train import run
    from ctt.train.checkpoint import load_network
    from ctt.train.loop import pick_device

    weights = parsed.weights / run.WEIGHTS if parsed.weights.is_dir() else parsed.weights
    device = pick_device(parsed.device)
    network, info, _ = load_network(weights)
    network.to(device)
    import torch

    from ctt.train.inference import predictor
    from ctt.train.settings import EvalSettings

    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {parsed.out} cannot be written ({error.strerror}).") from None
    predict = predictor(network, info, EvalSettings())
    with torch.no_grad():
        for file in track(files, "segmenting", transient=True):
            image = read_image(file)
            probability = predict(image[None].to(device))
            write(parsed.out, file.stem, image, probability[0].argmax(dim=0).cpu(), info)
    print(f"{len(files)} masks and overlays are in {parsed.out}")
    return 0


def find_images(paths: tuple[Path, ...]) -> list[Path]:
    """The files, and the images in the folders, that `paths` name.

    Raises:
        UserError: a path is not there, or no image is found.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: there is no such image or folder.")
    if not files:
        raise UserError(f"No image found in {', '.join(map(str, paths))} ({', '.join(SUFFIXES)}).")
    return files


def check_targets(files: list[Path], out: Path, overwrite: bool) -> None:
    """Refuse to write two results to one name, or over a result.

    Raises:
        UserError: names the files.
    """
    seen: dict[str, Path] = {}
    for file in files:
        if file.stem in seen:
            raise UserError(
                f"{seen[file.stem]} and {file} would both be written as {file.stem}_mask.png. "
                f"Predict them into two folders."
            )
        seen[file.stem] = file
    inputs = {file.resolve() for file in files}
    for file in files:
        for target in (out / f"{file.stem}_mask.png", out / f"{file.stem}_overlay.png"):
            if target.resolve() in inputs:
                raise UserError(f"{target} is one of the images. Give another --out.")
            if target.exists() and not overwrite:
                raise UserError(f"{target} is there already. Give another --out, or --overwrite.")


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8.

    Raises:
        UserError: the file is no image, or a broken one.
    """
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}).") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def write(out: Path, stem: str, image: Tensor, label: Tensor, info: DatasetInfo) -> None:
    """The mask as a palette PNG, and the image under the mask's colours."""
    import torch
    from PIL import Image

    from ctt.train.record import colorize

    mask = Image.fromarray(label.to(torch.uint8).numpy(), mode="P")
    mask.putpalette([channel for colour in info.palette for channel in colour])
    mask.save(out / f"{stem}_mask.png")
    picture = image.permute(1, 2, 0).float()  # (H, W, 3)
    coloured = torch.lerp(picture, colorize(label, info).float(), OVERLAY)
    # class 0 is the background of every data set with one: it stays as it is
    plain = (label == 0)[:, :, None] & (info.classes[0] == "background")
    overlay = torch.where(plain, picture, coloured).round().to(torch.uint8)
    Image.fromarray(overlay.numpy()).save(out / f"{stem}_overlay.png")
