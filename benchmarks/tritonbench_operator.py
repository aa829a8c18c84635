"""`info_nce` as an operator of tritonbench, so that its numbers stand beside those of others.

Put this file into a checkout of tritonbench as `tritonbench/operators/ctt_info_nce/operator.py`,
with `from .operator import Operator` in an `__init__.py` beside it, install this package, and:

    python run.py --op ctt_info_nce --mode fwd_bwd --metrics latency,speedup,tflops,accuracy

The sizes are those of the paper; `--classes`, `--capacity` and `--dim` set the bank.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from tritonbench.utils.triton_op import (
    BenchmarkOperator,
    BenchmarkOperatorMetrics,
    register_benchmark,
    register_metric,
    register_x_val,
)

from ctt.ops import info_nce, reference

PIXELS = (4096, 8580, 33_620, 131_220)
TAU = 0.1
Inputs = tuple[Tensor, Tensor, Tensor]  # query (N, D), label (N,), keys (C, V, D)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", type=int, default=21, help="C")
    parser.add_argument("--capacity", type=int, default=128, help="V, keys of a class")
    parser.add_argument("--dim", type=int, default=256, help="D")
    return parser.parse_args(arguments)


class Operator(BenchmarkOperator):
    DEFAULT_METRICS = ("latency", "speedup", "tflops", "accuracy")
    DEFAULT_PRECISION = "bf16"
    FWD_ONLY = False

    def __init__(self, tb_args: argparse.Namespace, extra_args: list[str] | None = None) -> None:
        super().__init__(tb_args, extra_args)
        self.sizes = parse(extra_args or [])

    def get_input_iter(self) -> Iterator[Inputs]:
        g = torch.Generator().manual_seed(0)
        classes, capacity, dim = self.sizes.classes, self.sizes.capacity, self.sizes.dim
        for pixels in PIXELS:
            query = torch.randn(pixels, dim, generator=g).to(self.device, self.dtype)
            label = torch.randint(0, classes, (pixels,), generator=g).to(self.device)
            keys = F.normalize(torch.randn(classes, capacity, dim, generator=g), dim=-1)
            yield query.requires_grad_(), label, keys.to(self.device, self.dtype)

    @register_x_val(label="(N, C, V, D)")
    def get_x_val(self, example_inputs: Inputs) -> tuple[int, ...]:
        query, _, keys = example_inputs
        return len(query), *keys.shape

    @register_benchmark(baseline=True)
    def plain_formula(self, query: Tensor, label: Tensor, keys: Tensor) -> Callable[[], Tensor]:
        return lambda: reference.info_nce(query, label, keys, temperature=TAU)

    @register_benchmark()
    def ctt(self, query: Tensor, label: Tensor, keys: Tensor) -> Callable[[], Tensor]:
        return lambda: info_nce(query, label, keys, temperature=TAU)

    @register_benchmark()
    def ctt_plain_torch(self, query: Tensor, label: Tensor, keys: Tensor) -> Callable[[], Tensor]:
        return lambda: info_nce(query, label, keys, temperature=TAU, backend="torch")

    @register_metric()
    def flops(self, fn_name: str, example_inputs: Inputs, metrics: BenchmarkOperatorMetrics) -> int:
        """Count two matrix products of 2 N C V D each; the gradient is made in the forward pass."""
        query, _, keys = example_inputs
        return 2 * 2 * len(query) * keys.numel()

    def get_bwd_fn(self, fwd_fn: Callable[[], Tensor]) -> Callable[[], None]:
        loss = fwd_fn()
        return lambda: loss.backward(retain_graph=True)
