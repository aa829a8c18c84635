"""The batch that a method gets: made of what the loader gives, and cut into parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ctt.data.dataset import IGNORE
from ctt.data.packed import unpack
from ctt.data.views import to_unit
from ctt.errors import UserError
from ctt.methods.base import Batch, Round


def batch_of(inputs: Sequence[Tensor], kind: Round, external: bool = False) -> Batch:
    """Return the batch that a method gets from what the loader gives.

    That is images and label and, if the method takes unlabelled images, those images and a second
    map: 255 in the padding, or packed labels (see `ctt.data.packed`): kept ones or external masks.

    Args:
        external: the label is a mask that another model made, see `ctt.methods.mask_teacher`.
    """
    b: Batch = {"images": to_unit(inputs[0]), "label": inputs[1].long()}
    if len(inputs) > 2:
        b |= {"unlabeled": to_unit(inputs[2]), "padding": inputs[3] == IGNORE}
    if len(inputs) > 2 and kind.images == "kept":
        b["kept"], b["kept confidence"] = unpack(inputs[3])
        b["padding"] = b["kept"] == IGNORE
    elif len(inputs) > 2 and external:
        b["external"], b["external confidence"] = unpack(inputs[3])
        b["padding"] = inputs[3] < 0
    return b


def split_batch(b: Batch, parts: int) -> Iterator[Batch]:
    """Return parts of a batch, in order; what belongs to the whole goes to each.

    Raises:
        UserError: an entry has not as many rows for each part.
    """
    for name, x in b.items():
        if x.dim() and len(x) % parts:
            raise UserError(
                f"`train.accumulate` {parts}: {name!r} of the batch has shape {tuple(x.shape)}, "
                f"whose first dimension cannot be cut into {parts} parts. Let `prepare` give one "
                f"row for each image, or keep in the method what belongs to the whole batch."
            )
    whole = {name: [x] * parts for name, x in b.items() if not x.dim()}
    cut = {name: x.chunk(parts) for name, x in b.items() if x.dim()}
    for i in range(parts):
        yield {name: some[i] for name, some in (whole | cut).items()}
