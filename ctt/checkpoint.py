"""Checkpoints of a run and weights of one network; both written atomically."""

import dataclasses
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctt import models
from ctt.data.dataset import DatasetInfo
from ctt.errors import UserError
from ctt.files import atomic_write
from ctt.models.base import SegmentationModel
from ctt.settings import EvalSettings, Settings, to_dict, update, validate_eval

FORMAT = "ctt-checkpoint-2"
FORMER_FORMAT = "ctt-checkpoint-1"
WEIGHTS_FORMAT = "ctt-weights-1"
# of the settings of evaluation, all on which predictions depend
OF_PROTOCOL = ("protocol", "window", "stride", "fit", "flip", "scales", "amp")


def save(path: Path, state: dict[str, Any], keep: bool = True) -> None:
    """Write a checkpoint; whoever reads `path` sees the old file or the new one, never a part.

    Args:
        keep: leave the old one beside it, see `previous`.

    Raises:
        UnwritableError: there is no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        # through a Python file: torch's own writer hides why a write failed
        with part.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
        if keep and path.is_file():
            with atomic_write(previous(path)) as kept:
                kept.unlink()
                try:
                    os.link(path, kept)  # takes no room
                except OSError:  # a file system without links
                    shutil.copyfile(path, kept)


def previous(path: Path) -> Path:
    """Return where the checkpoint before `path` is kept."""
    return path.with_name("previous.pt")


def load_last(path: Path) -> tuple[dict[str, Any], str]:
    """Read a checkpoint, or the one before it where it is broken or missing.

    Returns:
        the checkpoint, and a sentence on what is wrong with the last one, empty if nothing is.

    Raises:
        UserError: neither is there and whole.
    """
    try:
        return load(path), ""
    except UserError as error:
        try:
            state = load(previous(path))
        except UserError:
            raise error from None
        reason = str(error).split(". Give")[0].removesuffix(".")
        return state, (
            f"{reason}. The checkpoint before it, after iteration {state['iteration']}, is whole "
            f"and is used instead."
        )


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors, numbers and strings are ever unpickled.

    Raises:
        UserError: there is no such file, or it is no checkpoint of this program, or one of its
            checksums is not that of what it holds.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint.")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # which torch.load would read without a word
        if broken is not None:
            raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint can raise anything
        raise UserError(
            f"{path} is no checkpoint that can be read ({_reason(error)}). Give the folder of a "
            f"run, or the checkpoints/last.pt in it."
        ) from None
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, FORMER_FORMAT):
        raise UserError(f"{path} is a file of tensors, but no checkpoint of ctt-train.")
    return state if state["format"] == FORMAT else converted(state)


def converted(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a checkpoint of the former format, which knew one method, as it is now.

    It held the networks and banks as lists, and one optimiser.
    """
    kept = {
        name: value
        for name, value in state.items()
        if name not in ("students", "teachers", "banks", "optimizer")
    }
    tensors = {
        f"{kind}.{k}.{name}": value
        for kind in ("students", "teachers", "banks")
        for k, own in enumerate(state[kind])
        for name, value in own.items()
        if kind != "banks" or state["settings"]["method"] == "cross-teacher"
    }
    taught = state["settings"]["method"] != "supervised"
    return {
        **kept,
        "format": FORMAT,
        "method": tensors,
        "optimizers": {"students": state["optimizer"]},
        "drawn_unlabeled": state["drawn"] if taught else 0,
    }


def weights_of(state: dict[str, Any], network: str) -> dict[str, Tensor]:
    """Return the tensors of a network of a checkpoint, by their names in it.

    Args:
        network: student_1, teacher_2 and so on.

    Raises:
        KeyError: there is no such network.
    """
    kind, _, number = network.partition("_")
    prefix = f"{kind}s.{int(number) - 1}."
    named = {
        name.removeprefix(prefix): value
        for name, value in state["method"].items()
        if name.startswith(prefix)
    }
    if not named:
        raise KeyError(network)
    return named


def networks_in(state: dict[str, Any]) -> list[str]:
    """Return the names of the networks of a checkpoint: student_1.., teacher_1..."""
    kinds = ("students.", "teachers.")
    names = [name for name in state["method"] if name.startswith(kinds)]
    places = dict.fromkeys(tuple(name.split(".")[:2]) for name in names)
    return [f"{kind[:-1]}_{int(k) + 1}" for kind, k in places]


def facts(info: DatasetInfo) -> dict[str, Any]:
    """Return the facts of a dataset as a checkpoint holds them."""
    return dataclasses.asdict(info)


def info_of(state: dict[str, Any]) -> DatasetInfo | None:
    """Return the facts of the dataset that a run was trained on; None: an old checkpoint."""
    return DatasetInfo(**state["info"]) if "info" in state else None


def save_network(
    path: Path,
    network: SegmentationModel,
    info: DatasetInfo,
    note: str,
    best: dict[str, Any] | None = None,
    protocol: EvalSettings | None = None,
) -> None:
    """Write one network, ready for inference: weights, and how to build it and read its output.

    Args:
        best: what is known of it as the best network of a run, which `best_in` returns.
        protocol: how the run showed images to it, which `protocol_of` returns; by default whole.

    Raises:
        UnwritableError: there is no room for it.
    """
    meta = description(network, info, note, protocol) | ({"best": best} if best else {})
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        try:
            save_file(tensors, part, metadata={"ctt": json.dumps(meta)})
        except SafetensorError as error:
            raise OSError(str(error)) from None


def description(
    network: SegmentationModel, info: DatasetInfo, note: str, protocol: EvalSettings | None = None
) -> dict[str, Any]:
    """Return how to build the network, show images to it and read its output, as JSON takes it."""
    shown = to_dict(protocol or EvalSettings())
    return {
        "format": WEIGHTS_FORMAT,
        "model": network.options,
        "dataset": info.name,
        "classes": info.classes,
        "palette": info.palette,
        "mean": info.mean,
        "std": info.std,
        "white": info.white,
        "bands": info.bands,
        "ranges": info.ranges,
        "shown": info.shown,
        "note": note,
        "protocol": {name: shown[name] for name in OF_PROTOCOL},
    }


def best_in(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return what `save_network` wrote of the best network of a run, and its `description`.

    Returns:
        None if there is no such file, or it cannot be read, or is of a version that wrote neither.
    """
    try:
        meta = _meta_of(path)
    except (SafetensorError, OSError, ValueError, RecursionError):
        return None
    best = meta.pop("best", None)
    return (best, meta) if isinstance(best, dict) else None


def _meta_of(path: Path) -> dict[str, Any]:
    """Return what a file of weights says of its network; an empty dict if it says nothing."""
    with safe_open(path, framework="pt") as file:
        meta = json.loads((file.metadata() or {}).get("ctt", "{}"))
    return meta if isinstance(meta, dict) else {}


def load_network(path: Path) -> tuple[SegmentationModel, DatasetInfo, str]:
    """Return the network in a file that `save_network` wrote, in evaluation mode, on the CPU.

    Returns:
        the network, the facts of the dataset it was trained on, and the note on its origin.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of weights.")
    try:
        meta = _meta_of(path)
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no safetensors file that can be read ({error}). Give the best.safetensors "
            f"of a run."
        ) from None
    if meta.get("format") != WEIGHTS_FORMAT:
        raise UserError(
            f"{path} holds tensors but does not say which network they belong to. Give the "
            f"best.safetensors that ctt-train writes."
        )
    try:
        network, info, note = _network_of(meta, tensors)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{path}: its tensors do not fit the network that it describes ({_reason(error)}). "
            f"Give the best.safetensors of a run."
        ) from None
    return network.eval(), info, note


def protocol_of(path: Path) -> EvalSettings:
    """Return how the run showed images to the network in a file that `save_network` wrote; of a
    version that did not write it, whole images.

    Raises:
        UserError: what the file says is no protocol of this version.
    """
    values = _meta_of(path).get("protocol", {})
    protocol = update(Settings(), {"eval": values}, str(path)).eval
    validate_eval(protocol)
    return protocol


def _network_of(
    meta: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[SegmentationModel, DatasetInfo, str]:
    info = DatasetInfo(
        name=meta["dataset"],
        classes=tuple(meta["classes"]),
        palette=tuple((r, g, b) for r, g, b in meta["palette"]),
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        white=meta.get("white"),
        bands=tuple(meta.get("bands", ())),
        ranges=tuple((low, high) for low, high in meta.get("ranges", ())),
        shown=tuple(meta.get("shown", (0, 1, 2))),
    )
    network = models.build(num_classes=len(info.classes), **{"grid": "legacy", **meta["model"]})
    network.load_state_dict(tensors)
    return network, info, str(meta["note"])


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
