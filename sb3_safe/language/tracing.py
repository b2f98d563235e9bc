"""What a computation takes in memory, counted without computing it.

A model on the ``meta`` device has shapes and no contents. Put into PyTorch's fake tensors it can be run, forwards and
backwards, in milliseconds whatever its size: what is allocated and freed on the way is what a real run would.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, bytes of all tensors made since it was entered: now, and at most so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # What an operation did in place, or shows a part of, is not new.
        given = {_address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in given | self._storages.keys():
                self._add(_address(tensor), tensor.untyped_storage())
        return result

    def _add(self, address: int, storage: th.UntypedStorage) -> None:
        size = storage.nbytes()

        def free(_: Any) -> None:
            del self._storages[address]
            self.now -= size

        self._storages[address] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def fake(*models: nn.Module) -> Iterator[None]:
    """Within it every tensor is fake, and so are the parameters of models from the ``meta`` device.

    :param models: changed in place. Parameters that are trained get a gradient, as they have after the first step.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in models:
            model.to_empty(device="cpu")
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = th.zeros_like(parameter)
        yield


def saved_bytes(run: Callable[[], Tensor], *models: nn.Module) -> tuple[int, Tensor]:
    """Bytes that a computation keeps for its backward pass, and its result.

    Tensors that share their contents count once, parameters not at all.

    :param run: the computation.
    :param models: whose parameters it uses.
    """
    known = {_address(parameter) for model in models for parameter in model.parameters()}
    kept: dict[int, th.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _address(tensor) not in known:
            kept[_address(tensor)] = tensor.untyped_storage()
        return tensor

    with th.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    size = sum(storage.nbytes() for storage in kept.values())
    kept.clear()  # the graph holds `pack`, which would hold all of it until the end of the backward pass
    return size, result
