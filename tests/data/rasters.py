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
        **options,
    }
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=values.shape[1],
        width=values.shape[2],
        count=len(values),
        dtype=values.dtype,
        **options,
    ) as file:
        file.write(values)


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
