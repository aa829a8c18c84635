"""Checks of what a method returns, so that its author is told of a mistake where it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ctt.errors import UserError
from ctt.methods.base import Batch, Method, Terms


def checked_batch(method: Method, found: Any) -> Batch:
    """Return the batch that `prepare` gave, as a dictionary.

    Raises:
        UserError: it is no batch.
    """
    if not isinstance(found, Mapping):
        raise _refusal(
            method,
            f"`prepare` returns {_kind(found)}. Return the batch, such as b | {{'pixels': ...}}.",
        )
    for name, x in found.items():
        if not isinstance(x, Tensor):
            raise _refusal(
                method,
                f"`prepare` gives the batch {name!r}, which is {_kind(x)}. Give tensors alone; "
                f"keep anything else in the method.",
            )
    batch: Batch = dict(found)
    return batch


def checked_terms(method: Method, found: Any) -> Terms:
    """Return the weights and values of the terms that `losses` gave, as a dictionary.

    Raises:
        UserError: it is no dictionary of weights and values, or has a term that is not declared.
    """
    form = 'Return a dictionary of weight and value, such as {"sup": (1.0, loss)}'
    if not isinstance(found, Mapping):
        raise _refusal(method, f"`losses` returns {_kind(found)}. {form}.")
    for name, term in found.items():
        if not (isinstance(term, (tuple, list)) and len(term) == 2):
            raise _refusal(method, f"`losses` returns {_kind(term)} for {name!r}. {form}.")
        if not (isinstance(term[1], Tensor) and term[1].dim() == 0):
            raise _refusal(
                method,
                f"`losses` returns {_kind(term[1])} as the value of {name!r}. Return a tensor of "
                f"shape (), which backward() can go through.",
            )
    refuse_undeclared(method, "terms", found)
    terms: Terms = dict(found)
    return terms


def refuse_undeclared(method: Method, attribute: str, found: Iterable[str]) -> None:
    """Refuse numbers of a step that the method does not declare: metrics.csv has no column for it.

    Args:
        attribute: that of the method which declares them, `terms` or `logged`.
        found: names of the numbers.

    Raises:
        UserError: names the first of them, and where to declare it.
    """
    declared = getattr(method, attribute)
    if isinstance(declared, str):
        raise _refusal(method, f'`{attribute}` is a text. Write a tuple: ("{declared}",).')
    for name in found:
        if name not in declared:
            giver = "`losses` returns" if attribute == "terms" else "`step.log` or `report` gives"
            raise _refusal(
                method,
                f"{giver} {name!r}, which `{attribute}` of {type(method).__name__} does not name, "
                f"so metrics.csv has no column for it. Add it there: {attribute} = "
                f"{(*declared, name)}.",
            )


def _refusal(method: Method, what: str) -> UserError:
    return UserError(f"`method` {method.settings.method}: {what}")


def _kind(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return "nothing (None)" if x is None else f"a {type(x).__name__}"
