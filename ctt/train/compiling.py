"""torch.compile of networks: each as a whole, or only the blocks that are repeated in it.

Blocks of one kind and shape share what is compiled once, in all networks that train or all that do
not: a ResNet-101 has eight kinds of blocks instead of 33. On two CPU cores the first step of two
pairs of DeepLabV2 on it then takes 72 s instead of 95 s, and later ones 4.7 s instead of 4.0 s.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
T = TypeVar("T")

# Forms of one piece of code that torch.compile keeps before it gives up on it and runs it as
# plain Python: kinds of blocks of all networks, training and evaluating.
FORMS = 256
COMPILER = re.compile(r"\bC(\+\+)? compiler\b")  # in PyTorch's message on a CPU, and Triton's


def compile_networks(networks: list[nn.Module], how: str) -> None:
    """Compile networks in place, for inputs of one size each.

    Args:
        how: `network`, or `blocks` for the repeated blocks alone; networks that repeat none are
            compiled as a whole.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, FORMS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, FORMS)
    for network in networks:
        for part in (repeated_blocks(network) if how == "blocks" else []) or [network]:
            part.compile(dynamic=False)


def of_networks(function: Callable[P, T], how: str) -> Callable[P, T]:
    """Return a function that takes a network and runs parts of it, compiled as networks are.

    Args:
        how: as for `compile_networks`; with `blocks`, the blocks are compiled already.
    """
    return torch.compile(function, dynamic=False) if how == "network" else function


def missing_compiler(error: RuntimeError) -> str | None:
    """Return what to do if torch.compile found no compiler of C or C++; None for other errors."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    if not isinstance(error, torch._dynamo.exc.TorchDynamoException) or not COMPILER.search(text):
        return None
    return (
        f"`train.compile`: torch.compile builds programs, and found no compiler ({text}). Install "
        f"one, on Debian and Ubuntu the package g++, or train without `train.compile`."
    )


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the innermost modules that follow one another in a list of their own class alone.

    Layers of PyTorch itself, such as a row of convolutions, are no blocks.
    """
    found: list[nn.Module] = []
    for child in network.children():
        inner = repeated_blocks(child)
        members = list(child.children())
        kinds = {type(member) for member in members}
        is_list = isinstance(child, nn.Sequential | nn.ModuleList)
        if inner or not is_list or len(members) < 2 or len(kinds) > 1:
            found += inner
        elif not kinds.pop().__module__.startswith("torch.nn."):
            found += members
    return found


@contextlib.contextmanager
def uncompiled(how: str) -> Iterator[None]:
    """Run networks uncompiled within the context: each new image size would compile them again.

    Args:
        how: `train.compile`; nothing is done if it is `off`.
    """
    if how == "off":
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
