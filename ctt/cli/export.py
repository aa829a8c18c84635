"""ctt-export: one network as a file that other programs run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ctt.cli.common import refuse_torchrun, run_program
from ctt.errors import UserError
from ctt.files import is_on_hub
from ctt.text import say


@dataclass(frozen=True)
class Arguments:
    """Write one network as ONNX, as a program of torch.export, or as weights for ctt.load.

    A graph takes RGB images (batch, 3, height, width), float32 in 0..1, as `images`, and gives
    `classes`, (batch, class, height, width); normalisation and upsampling are in it. The file is
    compared with the network before it gets its name. Names and colours of the classes are in its
    metadata, as JSON under `ctt`.
    """

    path: Path
    """Folder of a run, a best.safetensors, or hf:OWNER/NAME on the Hugging Face hub."""
    out: Path | None = None
    """File to write; by default NETWORK.onnx, .pt2 or .safetensors in the folder of PATH, or here
    if PATH is hf:OWNER/NAME."""
    network: str = "best"
    """student_1, teacher_2 and so on, as the run's last checkpoint has them, or `best`, the one
    in its best.safetensors."""
    format: Literal["onnx", "torch-export", "safetensors"] = "onnx"
    """onnx (opset 18), torch-export (.pt2, for torch.export.load), or safetensors (for ctt.load
    and ctt-predict)."""
    output: Literal["probabilities", "logits"] = "probabilities"
    """What a graph gives."""
    normalized: bool = False
    """The graph takes images that are normalised already, by the mean and std in its metadata."""
    size: tuple[int, int] | None = None
    """Height and width of the images; by default any. Some vision transformers, Swins and networks
    with TensorFlow's padding (tf_..., ConvNeXts) need it."""
    overwrite: bool = False
    """Replace a file that is there already."""
    push: str = ""
    """OWNER/NAME: write the weights with a model card to the Hugging Face hub, and no file here;
    ctt.load("hf:OWNER/NAME") reads them. Only --network and --private are read beside it."""
    private: bool = False
    """push: a new repository is seen by its owner alone."""


def main() -> None:
    """Run the program."""
    run_program("ctt-export", lambda: _main(sys.argv[1:]), extra="export")


def _main(arguments: list[str]) -> int:
    import tyro

    parsed = tyro.cli(
        Arguments, prog="ctt-export", args=arguments, config=(tyro.conf.PositionalRequiredArgs,)
    )
    refuse_torchrun("ctt-export")
    if parsed.size is not None and not all(1 <= side < 2**31 for side in parsed.size):
        raise UserError(f"--size must be at least 1 1, and below {2**31}, got {parsed.size}.")
    if parsed.format == "safetensors" and (
        parsed.normalized or parsed.size or parsed.output != "probabilities"
    ):
        raise UserError(
            "--output, --normalized and --size say what a graph computes, and --format safetensors "
            "writes weights alone. Leave them out."
        )
    if parsed.push:
        return push_to_hub(parsed)
    from ctt.inference.export import OPSET, SUFFIXES, export
    from ctt.inference.load import load_trained

    folder = parsed.path if parsed.path.is_dir() else parsed.path.parent
    if is_on_hub(parsed.path):
        folder = Path()
    out = parsed.out or folder / f"{parsed.network}{SUFFIXES[parsed.format]}"
    check_target(out, parsed)
    trained = load_trained(parsed.path, parsed.network)
    difference, smallest = export(
        trained, out, parsed.format, parsed.output, parsed.normalized, parsed.size
    )
    details = f", opset {OPSET}" if parsed.format == "onnx" else ""
    checked = f"; largest difference from the network {difference:.1g}" if difference else ""
    say(f"{out}: {parsed.network} of {trained.origin} as {parsed.format}{details}{checked}")
    if smallest > 1:
        say(
            f"It takes images from {smallest} x {smallest} pixels on. For smaller ones fix their "
            f"size by --size HEIGHT WIDTH, or take --format onnx."
        )
    return 0


def push_to_hub(parsed: Arguments) -> int:
    """Write the network to the hub."""
    from ctt.inference.hub import push
    from ctt.inference.load import load_trained

    owner, slash, name = parsed.push.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise UserError(f"--push {parsed.push}: give OWNER/NAME, a repository of the hub.")
    trained = load_trained(parsed.path, parsed.network)
    folder = parsed.path if parsed.path.is_dir() else parsed.path.parent
    address = push(trained, folder, parsed.push, parsed.private)
    say(f"{parsed.network} of {trained.origin} is at {address}")
    return 0


def check_target(out: Path, parsed: Arguments) -> None:
    """Refuse to write over the network itself, or over anything without --overwrite."""
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}.")
    if out.is_dir():
        raise UserError(f"--out {out}: this is a folder; give the name of a file.")
    weights = parsed.path / "best.safetensors" if parsed.path.is_dir() else parsed.path
    if out.resolve() == weights.resolve():
        raise UserError(f"{out} is the network itself. Give another --out.")
    if out.exists() and not parsed.overwrite:
        raise UserError(f"{out} is there already. Give another --out, or --overwrite.")
