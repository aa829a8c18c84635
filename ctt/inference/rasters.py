"""Predictions of rasters of any size, read and written in windows, with their coordinates."""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctt.data.dataset import IGNORE, DatasetInfo
from ctt.data.pictures import white_of_colours
from ctt.data.pixels import to_rgb
from ctt.data.rasters import Raster, scaled
from ctt.errors import UserError
from ctt.files import atomic_write
from ctt.inference.predict import Predict, best_class
from ctt.models.base import SegmentationModel
from ctt.settings import EvalSettings

MULTIPLE = 16  # of the sides of a GeoTIFF's blocks
COARSEST = 64  # pixels from cell to cell in maps of networks, at most
TILE, MARGIN = 512, 64
SIDECARS = (".ovr", ".aux.xml", ".msk", ".msk.ovr")  # after the name of a GeoTIFF


def windows(
    height: int, width: int, tile: int, margin: int
) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Yield the rows and columns of each tile of an image, and of it with what is around it.

    Args:
        tile: side of a tile; the last ones end at the border.
        margin: pixels around it, as far as the image goes.
    """
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            own = slice(y, min(y + tile, height)), slice(x, min(x + tile, width))
            rows, columns = (
                slice(max(0, side.start - margin), min(end, side.stop + margin))
                for side, end in zip(own, (height, width), strict=True)
            )
            yield own, (rows, columns)


@torch.no_grad()
def cells_of(networks: Iterable[SegmentationModel], settings: EvalSettings) -> int:
    """Return by how many pixels an image can be moved so that all maps of the networks keep their
    values and move by whole cells.

    Args:
        settings: whose scales make images smaller; quarters of their size at most are whole cells.
    """
    factor = math.lcm(
        *(Fraction(scale).limit_denominator(4).denominator for scale in settings.scales)
    )
    steps = []
    for network in networks:
        weight = next(network.parameters())
        side = math.lcm(network.multiple, COARSEST)
        images = weight.new_zeros(1, network.options["channels"], side, side)
        maps = network.encode(images)
        steps.append(math.lcm(network.multiple, *(round(side / x.shape[-1]) for x in maps)))
    return factor * math.lcm(*steps)


def fitted(tile: int, margin: int, cells: int) -> tuple[int, int]:
    """Return tile and margin, rounded up so that each tile and its margin begin where `cells` do.

    The network would otherwise see the pixels of a tile in other cells than in the whole image.
    """
    sides = math.lcm(MULTIPLE, cells)
    return -(-tile // sides) * sides, -(-margin // cells) * cells


@torch.no_grad()
def predict_raster(
    file: Path,
    targets: Mapping[str, Path],
    predict: Predict,
    info: DatasetInfo,
    tile: int = TILE,
    margin: int = MARGIN,
    advance: Callable[[float], object] = lambda share: None,
) -> None:
    """Write the classes of a raster, and how sure they are, as GeoTIFFs that lie where it lies.

    The network sees a tile with a margin around it at a time, so memory does not grow with the
    raster. Values are the classes, shown in the dataset's colours, and 255 where the raster has no
    data; names of the classes are in the file's tags.

    Args:
        file: a TIFF, or another file that rasterio reads.
        targets: files to write: `mask`, and `confidence` if wanted (255 for probability 1).
        tile: side of a tile and of the files' blocks, a multiple of `MULTIPLE`.
        margin: what the network sees around a tile, in pixels; see `fitted`.
        advance: called with the share of the raster that is done since the last call.

    Raises:
        UserError: a raster that cannot be read, or that has other channels than the network.
        UnwritableError: there is no room for a result.
    """
    from rasterio.windows import Window

    with Raster(file) as raster, ExitStack() as stack:
        outputs = {}
        for kind, path in targets.items():
            part = stack.enter_context(atomic_write(path))
            stack.enter_context(_whole(part))
            outputs[kind] = stack.enter_context(_created(part, raster, tile))
        _describe(outputs["mask"], info)
        size = raster.height * raster.width
        for own, around in windows(raster.height, raster.width, tile, margin):
            image = for_network(raster, Window.from_slices(*around), info)
            probability = predict(image[None])[0]  # (C, h, w)
            inner = tuple(
                slice(o.start - a.start, o.stop - a.start) for o, a in zip(own, around, strict=True)
            )
            confidence, label = best_class(probability[:, *inner], image[:, *inner])
            results = {"mask": label, "confidence": (255 * confidence).round()}
            for kind, output in outputs.items():
                values = results[kind].to(torch.uint8).cpu().numpy()
                output.write(values, 1, window=Window.from_slices(*own))
            advance(values.size / size)
    for path in targets.values():
        remove_sidecars(path)


def remove_sidecars(path: Path) -> None:
    """Remove what GDAL and QGIS have written beside an earlier file of this name and would take for
    the new one's: overviews, which are what a map shows of it from afar, statistics and a mask."""
    for ending in SIDECARS:
        path.with_name(f"{path.name}{ending}").unlink(missing_ok=True)


def _created(path: Path, raster: Raster, tile: int) -> Any:
    """Return a new GeoTIFF of one channel, open to be written, with a raster's size and place."""
    import rasterio

    first = raster.first
    points, system = first.gcps
    place = {"transform": first.transform, "crs": first.crs} if not points else {}
    with warnings.catch_warnings():  # of rasters without coordinates
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        output = rasterio.open(
            path,
            "w",
            driver="GTiff",
            height=raster.height,
            width=raster.width,
            count=1,
            dtype="uint8",
            compress="deflate",
            tiled=True,
            blockxsize=tile,
            blockysize=tile,
            bigtiff="if_safer",
            **place,
        )
    if points:
        output.gcps = (points, system)
    if first.rpcs:
        output.rpcs = first.rpcs
    return output


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Raise OSError if a GeoTIFF that was written within the context cannot be read after it.

    GDAL writes the last blocks when a file is closed, and says nothing then of a full disk.
    """
    import rasterio

    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            with rasterio.open(path) as written:
                for _, window in written.block_windows(1):
                    written.read(1, window=window)
        except rasterio.errors.RasterioError:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def _describe(mask: Any, info: DatasetInfo) -> None:
    """Say in a GeoTIFF of classes what its values mean."""
    mask.nodata = IGNORE
    mask.write_colormap(1, dict(enumerate(info.palette)))
    mask.update_tags(classes=json.dumps(info.classes, ensure_ascii=False))


def for_network(raster: Raster, window: Any, info: DatasetInfo) -> Tensor:
    """Return a part of a raster as `ctt.data.rasters.read_as` returns the whole, but RGB as float32
    in 0..1 with NaN where there is no data.

    Raises:
        UserError: the raster has other channels than the network's images.
    """
    if info.bands:
        return scaled(*raster.read(info.bands, window), info, raster.path)
    kind = np.dtype(raster.first.dtypes[0])
    if kind not in (np.uint8, np.uint16):
        raise UserError(
            f"{raster.path}: the raster holds {kind}, and the network was trained on 8-bit RGB "
            f"images. Train one on such rasters: `ctt-data stats` describes their channels."
        )
    if info.white is not None and kind == np.uint16 and raster.first.count > 1:
        raise white_of_colours(raster.path)
    picture, missing = raster.picture(window)
    pixels = torch.from_numpy(to_rgb(picture, info.white)).permute(2, 0, 1) / 255
    return pixels.masked_fill(torch.from_numpy(missing), torch.nan)
