"""Steps of a GPU, recorded once as a CUDA graph and replayed: the host starts one thing a step."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

Body = Callable[[Sequence[Tensor]], dict[str, Tensor]]


class GraphRunner:
    """Calls `body` three times as usual, then captures it as a CUDA graph and replays that.

    The function must do the same work whatever its tensors hold, and must not wait for the device.
    It is recorded anew, after three ordinary calls that warm up, when the key changes. The memory
    of a graph is its own and is kept as long as the graph.
    """

    WARM_UP = 3

    def __init__(self) -> None:
        self._key: Hashable = None
        self._ordinary = 0  # calls until the recording
        self._graph: torch.cuda.CUDAGraph | None = None
        self._side: torch.cuda.Stream | None = None  # of the ordinary calls and the recording
        self._inputs: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}

    def __call__(self, key: Hashable, inputs: Sequence[Tensor], body: Body) -> dict[str, Tensor]:
        """Return what `body` gives. As long as the key is the same, so are the inputs' shapes."""
        if key != self._key:
            self._graph, self._outputs = None, {}  # frees the memory before the next recording
            self._key, self._ordinary = key, self.WARM_UP
        if self._ordinary:
            self._ordinary -= 1
            return self._beside(inputs, body)
        if self._graph is None:
            self._inputs = [x.clone() for x in inputs]
            graph = torch.cuda.CUDAGraph()
            # the loader pins memory in a thread of its own meanwhile, which is no mistake
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                self._outputs = body(self._inputs)
            self._graph = graph
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return {name: value.clone() for name, value in self._outputs.items()}

    def _beside(self, inputs: Sequence[Tensor], body: Body) -> dict[str, Tensor]:
        """Run `body` on the stream of the recording, so that both share one memory pool."""
        current = torch.cuda.current_stream()
        if self._side is None:
            self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side = self._side
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outputs = body(inputs)
        current.wait_stream(side)
        return outputs
