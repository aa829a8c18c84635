"""One trained network as a file that other programs run."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from timm.layers import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from ctt.checkpoint import description, save_network
from ctt.errors import UserError
from ctt.files import atomic_write
from ctt.inference.load import TrainedNetworks
from ctt.inference.predict import is_out_of_memory, out_of_memory_as
from ctt.models.segmenter import Segmenter

OPSET = 18  # of ONNX: the first whose resizing knows all that PyTorch's does
TOLERANCE = 1e-4  # of the outputs of the file, against those of the network
EXAMPLE = (2, 161, 190)  # batch, height and width that open sizes are traced with
TRIED = ((1, 129, 160), (3, 144, 205))  # and that they are checked with

# modules that need one size, as the tracer's expressions of sizes grow with each of them
OF_ONE_SIZE = {
    "convolutions that pad as TensorFlow does, by the size of the image": (
        Conv2dSame,
        MaxPool2dSame,
    ),
    "windows of attention (Swin)": (SwinTransformerBlock, SwinTransformerV2Block),
}

Format = Literal["onnx", "torch-export", "safetensors"]
Result = Literal["probabilities", "logits"]
SUFFIXES: dict[Format, str] = {
    "onnx": ".onnx",
    "torch-export": ".pt2",
    "safetensors": ".safetensors",
}


class Exported(NamedTuple):
    """What is known of a file.

    Attributes:
        difference: the largest one of its outputs from the network's, relative to the largest
            output where that is over 1; 0 for safetensors, which holds the weights themselves.
        smallest: pixels that the sides of its images have at least.
    """

    difference: float = 0.0
    smallest: int = 1


class Graph(nn.Module):
    """What a file computes: images (B, channels, H, W) -> (B, C, H, W)."""

    def __init__(self, segmenter: Segmenter, result: Result, normalized: bool) -> None:
        super().__init__()
        self.segmenter, self.result, self.normalized = segmenter, result, normalized
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits = self.segmenter.logits(
            images if self.normalized else self.segmenter.normalize(images)
        )
        return logits.softmax(dim=1) if self.result == "probabilities" else logits


def export(
    trained: TrainedNetworks,
    out: Path,
    file_format: Format,
    result: Result = "probabilities",
    normalized: bool = False,
    size: tuple[int, int] | None = None,
) -> Exported:
    """Write the one network of `trained` to `out`; whoever reads it sees the whole file or none.

    Args:
        result: what a graph gives.
        normalized: its images are, else they are in 0..1.
        size: height and width of its images; None leaves them open.

    Raises:
        UserError: the network cannot be put into a graph, or the graph computes something else.
        UnwritableError: there is no room for the file.
    """
    network = trained.only()
    if file_format == "safetensors":
        save_network(out, network, trained.info, trained.origin, protocol=trained.settings.eval)
        return Exported()
    graph = Graph(Segmenter(network, trained.info), result, normalized)
    batch, height, width = EXAMPLE
    channels = trained.info.channels
    shape = (batch, channels, *((height, width) if size is None else size))
    with _as_lack_of_memory(shape):
        program = trace(graph, torch.rand(shape), size is None)
    smallest = 1
    if file_format == "torch-export" and size is None:
        smallest = smallest_side(program.module(), channels)
    meta = {
        **description(network, trained.info, trained.origin, trained.settings.eval),
        "input": "normalised" if normalized else "0..1",
        "output": result,
        **({"smallest_side": smallest} if smallest > 1 else {}),
    }
    with atomic_write(out) as part, _as_lack_of_memory(shape):
        write = write_onnx if file_format == "onnx" else write_torch_export
        try:
            run = write(program, part, json.dumps(meta))
        except (ModuleNotFoundError, OSError):
            raise
        except Exception as error:  # operations that a format does not know: of many kinds
            raise _not_exportable(error, size is None) from None
        tried = TRIED if size is None else ((1, *size), (3, *size))
        difference = max(
            largest_difference(graph, run, torch.rand(n, channels, *sides)) for n, *sides in tried
        )
        if not difference <= TOLERANCE:
            how = f"the outputs differ by {difference:.2g}"
            raise UserError(
                f"The file would not compute what the network computes "
                f"({how if math.isfinite(difference) else 'it refuses images of other sizes'}), "
                f"and is not written.{_mend(size is None)}"
            )
    return Exported(difference, smallest)


def _as_lack_of_memory(shape: tuple[int, ...]) -> contextlib.AbstractContextManager[None]:
    height, width = shape[-2:]
    return out_of_memory_as(
        f"There is not enough memory to try the network on images of {height} x {width}. Give a "
        f"smaller `size`."
    )


def trace(graph: Graph, images: Tensor, open_sizes: bool) -> torch.export.ExportedProgram:
    """Return the graph with an open batch, and with open height and width or those of `images`."""
    for what, kinds in OF_ONE_SIZE.items():
        if open_sizes and any(isinstance(module, kinds) for module in graph.modules()):
            raise UserError(
                f"The network has {what}, and putting them into a graph of open sizes takes too "
                f"long.{_mend(open_sizes)}"
            )
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {0: dynamic, 2: dynamic, 3: dynamic} if open_sizes else {0: dynamic}
    try:
        return torch.export.export(graph, (images,), dynamic_shapes={"images": shapes})
    except Exception as error:  # of the network's code, or of the tracer: of many kinds
        raise _not_exportable(error, open_sizes) from None


def write_onnx(
    program: torch.export.ExportedProgram, path: Path, meta: str
) -> Callable[[Tensor], Tensor]:
    """Write an ONNX file, and return a function that runs it with onnxruntime."""
    import onnxruntime

    with warnings.catch_warnings(action="ignore"):  # about the exporter's own insides
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["classes"],
            verbose=False,
        )
    assert converted is not None
    converted.model.metadata_props["ctt"] = meta
    converted.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (found,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(found)

    return run


def write_torch_export(
    program: torch.export.ExportedProgram, path: Path, meta: str
) -> Callable[[Tensor], Tensor]:
    """Write a `torch.export` program, and return a function that runs it."""
    file = io.BytesIO()  # of its own, torch's writer does not say that a disk is full
    torch.export.save(program, file, extra_files={"ctt.json": meta})
    path.write_bytes(file.getbuffer())
    file.seek(0)  # from memory, as torch warns of names that do not end in .pt2
    run: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    return run


@torch.no_grad()
def smallest_side(run: Callable[[Tensor], Tensor], channels: int) -> int:
    """Return the side from which on a program of open sizes takes images.

    What `torch.export` finds true of the sizes of `EXAMPLE`, such as that a map has several rows,
    becomes a condition of the program, though the network needs none.
    """
    refused, taken = 0, TRIED[0][1]
    while taken - refused > 1:
        side = (refused + taken) // 2
        try:
            run(torch.zeros(1, channels, side, side))
            taken = side
        except Exception:  # of many kinds, as in `largest_difference`
            refused = side
    return taken


@torch.no_grad()
def largest_difference(graph: Graph, run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Return the largest difference of the outputs for `images`; infinite if the file refuses
    them."""
    expected = graph(images)
    try:
        found = run(images)
    except Exception as error:  # a runtime has errors of its own for sizes that were traced away
        if is_out_of_memory(error):
            raise
        return float("inf")
    if found.shape != expected.shape:
        return float("inf")
    scale = max(1.0, float(expected.abs().max()))
    return float((found - expected).abs().max()) / scale


def _not_exportable(error: Exception, open_sizes: bool) -> UserError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return UserError(f"The network cannot be put into a graph ({reason}).{_mend(open_sizes)}")


def _mend(open_sizes: bool) -> str:
    return " Fix the size of the images by `size` HEIGHT WIDTH." if open_sizes else ""
