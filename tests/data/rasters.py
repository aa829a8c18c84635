"""Made-up rasters, and folders of them."""

from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
ORIGIN = (500_000.0, 4_649_000.0)
PIXEL = 10.0  # metres


def scene(size: tuple[int, int], seed: int, bands: int = 4) -> tuple[Array, Array]:
    """Image (bands, H, W) uint16 of 0..3000 and mask (H, W): class 1 is bright in the last band."""
    rng = np.random.default_rng(seed)
    height, width = size
    mask = np.zeros(size, np.uint8)
    y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
    mask[y : y + height // 2, x : x + width // 2] = 1
    image = rng.integers(200, 1200, (bands, *size)).astype(np.uint16)
    image[-1, mask == 1] += 1800
    return image, mask


def save(path: Path, values: Array, place: tuple[int, int] = (0, 0), **options: Any) -> None:
    """Write channels (C, H, W) as a GeoTIFF of UTM zone 33 whose corner lies `place` pixels off."""
    import rasterio

    path.parent.mkdir(parents=True, exist_ok=True)
    row, column = place
    left, top = ORIGIN[0] + column * PIXEL, ORIGIN[1] - row * PIXEL
    options = {
        "crs": "EPSG:32633",
        "transform": rasterio.Affine(PIXEL, 0, left, 0, -PIXEL, top),
        "driver": "GTiff",
        **options,
    }
    with rasterio.open(
        path,
        "w",
        height=values.shape[1],
        width=values.shape[2],
        count=len(values),
        dtype=values.dtype,
        **options,
    ) as file:
        file.write(values)


LAYOUTS = {  # of TIFF files: channels, bits of each, and what says how they are to be understood
    "grey of 2 bits": (1, 2, {}),
    "grey of 4 bits": (1, 4, {}),
    "white first": (1, 8, {"photometric": "MINISWHITE"}),
    "white first of 1 bit": (1, 1, {"photometric": "MINISWHITE"}),
    "white first of 4 bits": (1, 4, {"photometric": "MINISWHITE"}),
    "multiplied by opacity": (4, 8, {"photometric": "RGB", "alpha": "PREMULTIPLIED"}),
}


def save_layout(path: Path, layout: str) -> None:
    """Write random channels of 20 x 30 pixels as one of the `LAYOUTS`."""
    count, bits, options = LAYOUTS[layout]
    values = np.random.default_rng(0).integers(0, 2**bits, (count, 20, 30)).astype(np.uint8)
    save(path, values, nbits=bits, **options)


def write_rasters(root: Path, labeled: int = 4, unlabeled: int = 3, side: int = 48) -> Path:
    """A folder of 4-band 16-bit GeoTIFFs with GeoTIFF masks, without statistics."""
    for i in range(labeled + unlabeled):
        image, mask = scene((side, side), i)
        folder = "images" if i < labeled else "unlabeled"
        save(root / folder / f"tile {i}.tif", image, (0, side * i))
        if i < labeled:
            save(root / "masks" / f"tile {i}.tif", mask[None], (0, side * i))
    (root / "dataset.yaml").write_text("classes: [background, field]\n", "utf-8")
    return root
