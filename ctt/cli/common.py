"""What the programs share: one paragraph for a mistake, exit code 2, no traceback."""

from __future__ import annotations

import dataclasses
import errno
import functools
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctt.errors import AlreadyReportedError, UserError
from ctt.files import expanded
from ctt.processes import rank, world_size
from ctt.text import (
    drop_closed_streams,
    fields_shown_by,
    printable,
    replace_what_cannot_be_shown,
)

if TYPE_CHECKING:
    from ctt.settings import EvalSettings

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
CLOSED_PIPE = 141  # 128 + SIGPIPE
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a share of it, or a file
# libraries of one option, and their extras
OPTIONAL = {
    "pycocotools": "convert",
    "rasterio": "geo",
    "segmentation_models_pytorch": "smp",
    "submitit": "cluster",
}

# parameters of library functions that programs take as options of the same name
PARAMETERS = (
    "auto_resume",
    "card",
    "classes",
    "config",
    "form",
    "images",
    "network",
    "only",
    "out",
    "push",
    "recipe",
    "resume",
    "show",
    "size",
    "submission",
    "table",
    "threads",
    "to",
    "tolerance",
    "unlabeled",
)


def run_program(name: str, body: Callable[[], int], extra: str = "train") -> None:
    """Exit with what `body` returns; mistakes of the user become one paragraph on stderr.

    Args:
        extra: of the package, that holds what the program needs.
    """
    replace_what_cannot_be_shown()
    try:
        try:
            with fields_shown_by(as_option):
                _run(name, body, extra)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not drop_closed_streams():
            raise
        sys.exit(CLOSED_PIPE)


def refuse_without_effect(parsed: Any, beside: str, reasons: Mapping[str, str]) -> None:
    """Refuse options that were given and would change nothing.

    Args:
        parsed: the arguments, a dataclass.
        beside: what leaves them without effect, such as `beside --rank`.
        reasons: why, by the names of the fields.

    Raises:
        UserError: names the first one.
    """
    for field in dataclasses.fields(parsed):
        value = getattr(parsed, field.name)
        if field.name in reasons and value != field.default:
            option = f"{'no-' * (value is False)}{field.name.replace('_', '-')}"
            raise UserError(f"--{option} has no effect {beside}: {reasons[field.name]}.")


def check_protocol(protocol: EvalSettings, before: EvalSettings) -> None:
    """Refuse a protocol that cannot be used, or of which something was given that changes nothing.

    Args:
        before: what stands where the command line gives nothing.
    """
    from ctt.configure import refuse_unused
    from ctt.settings import Settings, validate_eval

    validate_eval(protocol)
    names = [field.name for field in dataclasses.fields(protocol)]
    given = [f"eval.{name}" for name in names if getattr(protocol, name) != getattr(before, name)]
    refuse_unused(dataclasses.replace(Settings(), eval=protocol), given)


def refuse_torchrun(program: str, instead: str = "") -> None:
    """Refuse to be one of several processes, which would all do and write the same.

    Args:
        program: its name.
        instead: a sentence on what several processes are started for.

    Raises:
        UserError: in the first process. AlreadyReportedError: in the others.
    """
    if world_size() == 1:
        return
    if rank() > 0:
        raise AlreadyReportedError
    raise UserError(
        f"{program} is to run once, and torchrun has started {world_size()} of it (or the "
        f"environment has WORLD_SIZE). Start it without torchrun, or unset WORLD_SIZE.{instead}"
    )


def check_whole(protocol: EvalSettings) -> None:
    """Refuse a protocol that shows the middle of an image alone."""
    if protocol.protocol == "center-crop":
        raise UserError("--eval.protocol center-crop: a mask is made of the whole image.")


def as_option(name: str) -> str:
    """Return `data.batch_size` of a message as --data.batch-size; other words keep backticks."""
    if name in _options() or name.startswith("options."):
        return f"--{name.replace('_', '-')}"
    return f"`{name}`"


@functools.cache
def _options() -> frozenset[str]:
    """Return the fields and parameters that are options of programs."""
    from ctt.settings import Settings, field_names

    return frozenset([*field_names(Settings), *PARAMETERS])


def with_home(argument: str) -> str:
    """Return an argument with the home folder in `--to=~/x` and `'~/x'`, where shells leave `~`.

    Raises:
        UserError: it is not known which folder that is.
    """
    option, _, value = argument.partition("=")
    if option.startswith("--") and value.startswith("~"):
        return f"{option}={expanded(Path(value), option)}"
    return str(expanded(Path(argument), "the path")) if argument.startswith("~/") else argument


def _run(name: str, body: Callable[[], int], extra: str) -> None:
    try:
        sys.argv[1:] = map(with_home, sys.argv[1:])
        code = body()
    except AlreadyReportedError:
        sys.exit(BAD_INPUT)
    except UserError as error:
        fail(name, str(error))
    except OSError as error:
        if error.filename is None and error.errno not in NO_ROOM:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        fail(name, f"{where}{error.strerror}.")
    except RuntimeError as error:
        from ctt.data.loader import lost_worker

        if not (text := lost_worker(error)):
            raise
        fail(name, text)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == "ctt" or missing.startswith("ctt."):
            raise
        needed = OPTIONAL.get(missing, extra)
        fail(name, f"needs the package {missing}. Install it with: pip install 'ctt[{needed}]'")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(code)


def fail(name: str, text: str) -> None:
    # a path stays in one piece, so that it can be copied
    text = printable(f"{name}: {text}")
    lines = textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
    print(lines, file=sys.stderr)
    sys.exit(BAD_INPUT)
