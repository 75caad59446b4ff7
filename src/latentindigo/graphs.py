"""A function recorded once on an NVIDIA GPU and played back: a step of LatentINN is hundreds of tiny kernels.

Starting a kernel costs a processor several microseconds, and the INN's finish faster than that. Played back as a CUDA
graph, all of them start at once.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Replay"]

_RECORDING = threading.Lock()  # PyTorch records one graph at a time in a process.


class Replay:
    """Calls a function of one tensor; the first call runs it, the second records it, further ones play it back.

    What the function reads beside its argument (weights, targets) must stay where it is, though its values may change.
    It must not wait for the GPU, once it has run before. Off NVIDIA's GPUs, and if recording fails, every call runs it.

    """

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input = self._output = torch.empty(0)
        self._calls = 0

    def __call__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The function of `x`.

        Args:
            function: Takes a tensor, returns one; the same in every call.
            x: A tensor; where shape, dtype or device are not those that were recorded, the function runs.

        Returns:
            What the function returns.
        """
        self._calls += 1
        if x.device.type != "cuda" or self._calls == 1:
            return function(x)
        if self._calls == 2:
            self._record(function, x)
        told = (x.shape, x.dtype, x.device)
        if self._graph is None or told != (self._input.shape, self._input.dtype, self._input.device):
            return function(x)
        self._input.copy_(x)
        self._graph.replay()
        return self._output.clone()

    def _record(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        graph, self._input = torch.cuda.CUDAGraph(), x.detach().clone()
        # A stream of this very device: by default it is one of the device that was current at first.
        before, stream = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
        try:
            # Other threads may use the GPU meanwhile.
            with (
                _RECORDING,
                torch.cuda.device(x.device),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._output = function(self._input)
        except RuntimeError as error:
            with torch.cuda.device(x.device):
                torch.cuda.set_stream(before)  # A capture that failed may not have left its stream.
            warnings.warn(f"a step could not be recorded and is computed each time ({error})", stacklevel=4)
            return
        self._graph = graph
