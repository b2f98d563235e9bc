"""One token of every row through the model."""

from collections.abc import Callable
from typing import Any

import torch as th
from torch import Tensor

from sb3_safe.language.slots import SlotCache

WARM_UP_STEPS = 3

Body = Callable[[Tensor, Any, SlotCache, Tensor], Tensor]


class DecodeStep:
    """The model on one token of every row; on a GPU recorded once as a CUDA graph, then replayed.

    A step is a thousand small kernels, which take longer to launch than to run. What is recorded are addresses: of the
    weights, which are only ever changed in place, and of the slots, to which a recording belongs.

    :param body: gives hidden states ``[rows, 1, h]`` of tokens ``[rows, 1]``, mask, slots and positions ``[rows, 1]``.
    :param slots: keys and values of every row.
    :param graphs: whether to record.
    :raises RuntimeError: in the first step, if the model cannot be recorded.
    """

    def __init__(self, body: Body, slots: SlotCache, graphs: bool) -> None:
        self._body, self._slots = body, slots
        self._graphs = graphs and slots.ids.device.type == "cuda"
        self._graph: Any = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._hidden: Tensor | None = None

    def __call__(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """Hidden states ``[rows, h]``; those of a recording are overwritten by the next call.

        :param tokens: ``[rows]``
        :param positions: ``[rows]``, where each token stands in its text.
        :param width: positions of the slots to attend to, at least the largest position and one.
        """
        if not self._graphs or th.is_grad_enabled():
            return self._run(tokens, positions, width)
        with th.cuda.device(self._slots.ids.device):  # which need not be the one that PyTorch uses by default
            if self._graph is None:
                self._record(tokens, positions)
            assert self._inputs is not None and self._hidden is not None
            for recorded, given in zip(self._inputs, (tokens, positions), strict=True):
                recorded.copy_(given)
            self._graph.replay()
        return self._hidden

    def _run(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        mask = self._slots.begin_decode(positions, width)
        return self._body(tokens.unsqueeze(1), mask, self._slots, positions.unsqueeze(1))[:, 0]

    def _record(self, tokens: Tensor, positions: Tensor) -> None:
        self._inputs = tokens.clone(), positions.clone()
        capacity = self._slots.ids.shape[1]
        # Kernels are chosen and slots allocated before the recording. What these steps store, it stores again.
        stream = th.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._run(*self._inputs, capacity)
        th.cuda.current_stream().wait_stream(stream)
        graph = th.cuda.CUDAGraph()
        try:
            # A stream of this device: PyTorch's own for recordings belongs to the device of the first one.
            with th.cuda.graph(graph, stream=stream):
                self._hidden = self._run(*self._inputs, capacity)
        except RuntimeError as error:  # a mixture of experts, for instance, asks the processor where tokens go
            raise RuntimeError(
                "the step that writes a token cannot be recorded as a CUDA graph with this model; pass "
                'policy_kwargs={"cuda_graphs": False}'
            ) from error
        self._graph = graph
