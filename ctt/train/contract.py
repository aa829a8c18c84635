"""Checks of what a method returns, so that its author is told of a mistake where it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ctt.errors import UserError
from ctt.methods.base import Batch, Method, Schedule, Terms
from ctt.settings import Settings

# names beside `terms` and `logged` in metrics.csv and in what a step gives
TAKEN = ("total", "iteration", "lr", "images_per_second", "input_wait")


def check_names(method: Method) -> None:
    """Refuse `terms` and `logged` that are no tuples of names, or in which one name is twice.

    Raises:
        UserError: names the attribute, or the name.
    """
    for attribute in ("terms", "logged"):
        declared = getattr(method, attribute)
        if isinstance(declared, str):
            raise _refusal(method, f'`{attribute}` is a text. Write a tuple: ("{declared}",).')
    names = [*method.terms, *method.logged, *TAKEN]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise _refusal(
            method,
            f"two numbers of metrics.csv would be named {twice!r}. Give another name in `terms` or "
            f"`logged`; also taken are {', '.join(TAKEN)}.",
        )


def checked_optimizers(method: Method, found: Any) -> dict[str, Optimizer]:
    """Return the optimisers that the method made, by name.

    Raises:
        UserError: there are none, or it is no dictionary of optimisers.
    """
    if found is None or found == {}:
        raise _refusal(method, "`optimizers` returns none, so nothing would be trained.")
    if not (isinstance(found, Mapping) and all(isinstance(x, Optimizer) for x in found.values())):
        raise _refusal(
            method,
            f"`optimizers` returns {_kind(found)}. Return a dictionary of optimisers, such as "
            f"{{**super().optimizers(), 'critic': torch.optim.Adam(...)}}.",
        )
    return dict(found)


def checked_schedules(method: Method, found: Any) -> dict[str, Schedule]:
    """Return the schedules that the method made, by name.

    Raises:
        UserError: it is no dictionary of functions, or one takes the name of the learning rate.
    """
    if not (isinstance(found, Mapping) and all(callable(x) for x in found.values())):
        raise _refusal(
            method,
            f"`schedules` returns {_kind(found)}. Return a dictionary of functions of the "
            f"iteration, such as {{'ramp': lambda iteration: min(1.0, iteration / 100)}}.",
        )
    if "rate" in found:
        raise _refusal(
            method,
            "`schedules` returns 'rate', which is the learning rate of the run. Give another name.",
        )
    return dict(found)


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
        if not _is_number(term[0]):
            raise _refusal(
                method, f"`losses` returns {_kind(term[0])} as the weight of {name!r}. {form}."
            )
        if not (isinstance(term[1], Tensor) and term[1].dim() == 0):
            raise _refusal(
                method,
                f"`losses` returns {_kind(term[1])} as the value of {name!r}. Return a tensor of "
                f"shape (), which backward() can go through.",
            )
    refuse_undeclared(method, "terms", found)
    if not any(isinstance(x, Tensor) and x.requires_grad for term in found.values() for x in term):
        raise _refusal(
            method,
            "`losses` returns no term with a gradient, so nothing would be trained. Compute one "
            "from what a student gives, without detach(), argmax or torch.no_grad() on the way.",
        )
    terms: Terms = dict(found)
    return terms


def checked_report(method: Method, found: Any) -> dict[str, float]:
    """Return the numbers that `report` gave.

    Raises:
        UserError: it is no dictionary of numbers, or has one that is not declared.
    """
    if not isinstance(found, Mapping):
        raise _refusal(method, f"`report` returns {_kind(found)}. Return numbers by name, or {{}}.")
    refuse_undeclared(method, "logged", found)
    for name, value in found.items():
        if not _is_number(value):
            raise _refusal(method, f"`report` gives {name!r}, which is {_kind(value)}, no number.")
    return {name: float(value) for name, value in found.items()}


def checked_log(settings: Settings, name: str, value: Any) -> Tensor:
    """Return a number that a method gave to `step.log`.

    Raises:
        UserError: it is no tensor of shape ().
    """
    if not (isinstance(value, Tensor) and value.dim() == 0):
        raise UserError(
            f"`method` {settings.method}: `step.log` is given {_kind(value)} as {name!r}. Give a "
            f"tensor of shape ()."
        )
    return value.detach()


def refuse_undeclared(method: Method, attribute: str, found: Iterable[str]) -> None:
    """Refuse numbers of a step that the method does not declare: metrics.csv has no column for it.

    Args:
        attribute: that of the method which declares them, `terms` or `logged`.
        found: names of the numbers.

    Raises:
        UserError: names the first of them, and where to declare it.
    """
    declared = getattr(method, attribute)
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


def _is_number(x: object) -> bool:
    return x.dim() == 0 if isinstance(x, Tensor) else isinstance(x, Real)


def _kind(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return "nothing (None)" if x is None else f"a {type(x).__name__}"
