"""Which mask belongs to which image, by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath

from ctt.data.exports.base import Export, why_unclear
from ctt.data.folder import JOINTS, JPEG_SUFFIXES, MASK_SUFFIXES, walk


def pairs_of(masks: Path, export: Export) -> list[tuple[str, Path]]:
    """Return each image that has a mask, whose name may be longer by a suffix as in `a_mask`.

    All masks have one suffix: the one by which most of them belong to an image. What no image has,
    and what may be of two, becomes a fault, and so do images of which one has a mask.

    Args:
        masks: the folder of the masks, which may be that of the images.
    """
    images = export.images
    stems: dict[str, list[str]] = {}
    for name in images.names:
        stems.setdefault(_stem(name), []).append(name)
    names = [n for n in walk(masks, "") if n.lower().endswith((*MASK_SUFFIXES, *JPEG_SUFFIXES))]
    found = {name: _stem(name) for name in names}
    together = masks == images.root
    suffix = _suffix(found.values(), stems, together)
    if suffix is None:
        return []
    own = {
        name: image
        for name, stem in found.items()
        if stem.endswith(suffix) and (image := stem.removesuffix(suffix)) in stems
    }
    without = {name: found[name] for name in found if name not in own}
    if together:
        known = {*images.names}  # not what was converted before
        without = {name: stem for name, stem in without.items() if name in known}
        strays = _strays(without, stems, {*own.values()}, suffix)
    else:
        strays = dict.fromkeys(without, f"there is no image of this name in {images.root}.")
    export.faults += [f"{masks / name}: {reason}" for name, reason in strays.items()]
    unclear = {stem for stem in own.values() if len(stems[stem]) > 1}
    export.faults += [
        why_unclear(masks / name, images, stems[stem])
        for name, stem in own.items()
        if stem in unclear
    ]
    used = {masks / name for name in (*own, *strays)}
    images.names = [
        name
        for name in images.names
        if images.root / name not in used and _stem(name) not in unclear
    ]
    return [(stems[stem][0], masks / name) for name, stem in own.items() if stem not in unclear]


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _suffix(masks: Iterable[str], images: Collection[str], together: bool) -> str | None:
    """Return by what most names of masks are longer than those of images; None: none belongs.

    Args:
        together: masks are in the folder of the images, and must have a suffix.
    """
    suffixes = Counter(
        stem[cut:]
        for stem in masks
        for cut in (i for i in range(len(stem) + (not together)) if stem[i : i + 1] in JOINTS)
        if stem[:cut] in images
    )
    return max(suffixes, key=lambda s: (suffixes[s], -len(s)), default=None)


def _strays(
    files: Mapping[str, str], images: Collection[str], masked: set[str], suffix: str
) -> dict[str, str]:
    """Return which files beside the images are masks of none by their names, and why.

    Args:
        files: stems of files of which none is the mask of an image.
        images: stems of all files.
        masked: of those, the images that have a mask.
    """
    strays = {}
    for name, stem in files.items():
        if stem in masked:  # an image, as face_mask.jpg with its face_mask_mask.png
            continue
        if stem.endswith(suffix):
            strays[name] = (
                f"by its end {suffix} it is a mask, and there is no image "
                f"{stem.removesuffix(suffix)}. Bring the image, or take the mask out; if it is an "
                f"image, rename it."
            )
            continue
        ends = [joint + suffix[1:] for joint in JOINTS]
        image = next((stem.removesuffix(end) for end in ends if stem.endswith(end)), None)
        if image in images and image not in masked:
            strays[name] = (
                f"it seems to be the mask of {image}, but the others end in {suffix}. Name it like "
                f"these; if it is an image, rename it."
            )
    return strays
