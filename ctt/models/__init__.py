"""Networks by name; each gives logits and features from one forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctt.errors import UserError

if TYPE_CHECKING:
    from ctt.models.base import SegmentationModel


def names() -> list[str]:
    """The architectures that `build` knows."""
    return ["small"]


def build(name: str, num_classes: int, features: int, width: int) -> SegmentationModel:
    """A network with fresh random weights from torch's global generator.

    Args:
        num_classes: C. features: D. width: channels of the first stage (small).

    Raises:
        UserError: no such architecture.
    """
    if name == "small":
        from ctt.models.small import Small

        return Small(num_classes, features, width)
    raise UserError(f"--model.name {name}: no such architecture. Known: {', '.join(names())}.")
