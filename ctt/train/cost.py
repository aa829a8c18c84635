"""What a run costs, worked out before it begins: operations of a step, and hours on a card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ctt.data.dataset import DatasetInfo
from ctt.errors import UserError
from ctt.methods import About
from ctt.methods.base import Method, round_starts
from ctt.settings import Settings
from ctt.train.memory import prepared, step_without_data
from ctt.train.recomputing import recomputed
from ctt.train.rounds import stretches

TERA = 1e12
USED = 0.35  # share of a card's peak that a step is taken to reach; large ViTs reach 0.3 to 0.5
HOUR = 3600


class Card(NamedTuple):
    """A GPU.

    Attributes:
        name: in full.
        memory: GB.
        single: peak of float32, in 10^12 operations a second.
        half: that of dense float16 and bfloat16 matrices with sums in float32.
        source: where the numbers are printed.
        bfloat16: whether it has units for bfloat16; without them, half is of float16 alone.
    """

    name: str
    memory: int
    single: float
    half: float
    source: str
    bfloat16: bool = True


CARDS = {
    "t4": Card("Tesla T4", 16, 8.1, 65, "NVIDIA T4 datasheet, 2019", False),
    "v100": Card("Tesla V100 SXM2 32 GB", 32, 15.7, 125, "NVIDIA V100 datasheet, 2020", False),
    "rtx3090": Card("GeForce RTX 3090", 24, 35.6, 71, "NVIDIA GA102 whitepaper, 2020"),
    "rtx4090": Card("GeForce RTX 4090", 24, 82.6, 165.2, "NVIDIA Ada GPU whitepaper, 2022"),
    "a100": Card("A100 SXM 80 GB", 80, 19.5, 312, "NVIDIA A100 datasheet, 2021"),
    "l40s": Card("L40S", 48, 91.6, 362, "NVIDIA L40S datasheet, 2023"),
    "h100": Card("H100 SXM 80 GB", 80, 67, 989, "NVIDIA H100 datasheet, 2023"),
    "h200": Card("H200 SXM", 141, 67, 989, "NVIDIA H200 datasheet, 2024"),
}


def card_of(name: str) -> Card:
    """Return a card by its short name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in CARDS:
        raise UserError(f"`card` {name}: no such card. Cards: {', '.join(CARDS)}.")
    return CARDS[name]


def step_operations(
    settings: Settings, method: Method, info: DatasetInfo, about: About, *, last: bool = False
) -> float | None:
    """Return the floating-point operations of a step of one process, a mean over the run.

    Matrix products, convolutions and attention count, forward and backward, those of the teachers
    too, and twice where blocks are computed again.

    Args:
        method: with its networks on the CPU; not to be trained afterwards, as its counters move.
        last: return those of the last step, when all that the method does has begun.

    Returns:
        None if a step cannot be run without data.
    """
    rounds, total = method.rounds(), settings.train.iterations
    found, steps = dict[Hashable, float](), Counter[Hashable]()
    parts = list(stretches(round_starts(rounds, total), method.stage))
    try:
        for number, first, end in parts[-1:] if last else parts:
            kind = (rounds[number].images, method.stage(first))  # of which steps cost alike
            steps[kind] += end - first
            if kind not in found:
                found[kind] = _of_step(settings, method, info, about, number, first)
    except Exception:  # a method may look at its numbers
        return None
    return sum(found[kind] * count for kind, count in steps.items()) / steps.total()


def _of_step(
    settings: Settings,
    method: Method,
    info: DatasetInfo,
    about: About,
    number: int,
    iteration: int,
) -> float:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    again = settings.train.gradient_checkpointing
    trained = [p for p in method.parameters() if p.requires_grad]
    with (
        step_without_data(settings, method, info, about, number, mode, iteration) as (b, step),
        recomputed(method.students, again),
    ):
        with _counter() as before:
            whole, part = prepared(settings, method, b, step)
        with _counter() as learnt:
            terms = method.losses(part, step).values()
            total = torch.stack([weight * value for weight, value in terms]).sum()
            torch.autograd.grad(total, trained, allow_unused=True)
        step.whole = True
        with _counter() as after, torch.no_grad():
            method.after_step(whole, step)
    parts = settings.train.accumulate
    once = before.get_total_flops() + after.get_total_flops()
    return float(once + parts * learnt.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
    counted: Any = sdpa_flop_count
    return int(counted(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **o: Any) -> int:
    counted: Any = sdpa_backward_flop_count
    return int(counted(grad, query, key, value))


def _counter() -> FlopCounterMode:
    aten: Any = torch.ops.aten
    attention = {  # what PyTorch's own list lacks: the attention that it takes on a CPU
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=attention)


def hours(operations: float, iterations: int, card: Card, amp: str) -> float:
    """Return the hours of so many steps on a card that reaches `USED` of its peak."""
    peak = card.single if amp == "off" else card.half
    return operations * iterations / (USED * peak * TERA) / HOUR


def cost_table(
    operations: float, needed: dict[int, int], settings: Settings, left: int, names: list[str]
) -> Table:
    """Return hours on one card and on several.

    Args:
        operations: of a step of one process.
        needed: bytes of a process, by the number of processes.
        left: iterations to be done.
        names: of the cards, see `CARDS`.
    """
    amp, many = settings.train.amp, max(needed)
    chosen = [card_of(name) for name in names]
    caption = (
        f"Hours at {USED:.0%} of the peak in {'float32' if amp == 'off' else amp}, without "
        f"evaluation. Peaks: {'; '.join(dict.fromkeys(card.source for card in chosen))}."
    )
    if amp == "off":
        caption += (
            " From the RTX 3090 and A100 on, PyTorch computes convolutions in TF32 by default, "
            "which takes less time."
        )
    if many > 1:
        caption += (
            f" {many} cards see {many} times the images a step; their hours are those of as many "
            f"images in all, 1/{many} of the steps."
        )
    table = Table(
        title=f"{operations / TERA:,.2f} TFLOP a step and process, {left:,} steps", caption=caption
    )
    table.add_column("card", no_wrap=True)
    for column in ("GB", "fits", "hours", *([f"on {many} cards"] if many > 1 else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for card in chosen:
        room = card.memory * 10**9
        fits = [str(n) for n, size in needed.items() if size <= room]
        row = [card.name, str(card.memory), f"on {' and '.join(fits)}" if fits else "no"]
        time = hours(operations, left, card, amp)
        usable = amp != "bf16" or card.bfloat16
        row += [f"{time / n:,.1f}" if usable else "use fp16" for n in dict.fromkeys((1, many))]
        table.add_row(*row)
    return table
