"""Linear layers by oneDNN, on processors where PyTorch's default is half as fast.

PyTorch multiplies float32 matrices on CPUs by MKL, which leaves the AVX-512 units of AMD's processors alone; oneDNN,
which PyTorch ships as well, uses them.
"""

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch as th
from torch import Tensor, nn
from torch.nn.functional import linear

CPUINFO = Path("/proc/cpuinfo")
# What weights are packed for, the rows of a step of writing; for any number it is no slower than not packed.
ROWS = 32


class Packed(NamedTuple):
    """A weight in the order in which oneDNN reads it, which it would otherwise be brought into for every product."""

    weight: Tensor
    version: tuple[int, int]
    """Address and version of what it was made of."""


# Layers that may pack their weight, and what they packed last. Not in the layers: such a tensor cannot be copied.
_packed: WeakKeyDictionary[nn.Module, Packed | None] = WeakKeyDictionary()


def is_available() -> bool:
    """Whether this PyTorch was built with oneDNN, and has its linear layer."""
    return th.backends.mkldnn.is_available() and hasattr(th.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


@functools.cache
def is_faster() -> bool:
    """Whether this is such a processor, and this PyTorch has both libraries.

    Told by the vendor's name, not by a race: the same seed must give the same bits in every run.
    """
    name = CPUINFO.read_text() if CPUINFO.exists() else platform.processor()
    return "AuthenticAMD" in name and th.backends.mkl.is_available() and is_available()  # type: ignore[no-untyped-call]


def accelerate(module: nn.Module) -> None:
    """Let linear layers compute by oneDNN where that is faster: in float32, on the CPU.

    :param module: its layers are changed in place; parameters and names stay.
    """
    if is_faster():
        for layer in module.modules():
            if type(layer) is nn.Linear:
                # Not a method, which pickle would look for in the layer.
                layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]


@contextmanager
def packing(module: nn.Module) -> Iterator[None]:
    """Within it layers keep a packed copy of their weight for products that need no gradient: up to a third faster.

    It is made when it is first needed, and again when the weight has changed as PyTorch sees it. Not every change is
    one (fused optimizers, ``.data``), which is why copies do not outlive this.

    :param module: accelerated by :func:`accelerate`; other layers are left as they are.
    """
    layers = [layer for layer in module.modules() if getattr(layer.forward, "func", None) is _forward]
    _packed.update(dict.fromkeys(layers))
    try:
        yield
    finally:
        for layer in layers:
            _packed.pop(layer, None)


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    fits = inputs.device.type == "cpu" and inputs.dtype == weight.dtype == th.float32
    if not fits or inputs.dim() < 2 or inputs.numel() == 0 or th.is_autocast_enabled("cpu"):
        return linear(inputs, weight, bias)
    if th.is_grad_enabled():
        # As rows: of more dimensions the product is a view, which a custom function's caller may not change in place.
        rows = _Linear.apply(inputs.flatten(0, -2), weight, bias)  # type: ignore[no-untyped-call]
        return rows.unflatten(0, inputs.shape[:-1])  # type: ignore[no-any-return]
    return _product(inputs, _pack(layer) if layer in _packed else weight, bias)


def _pack(layer: nn.Linear) -> Tensor:
    version = layer.weight.data_ptr(), layer.weight._version
    packed = _packed[layer]
    if packed is None or packed.version != version:
        packed = Packed(th.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS), version)
        _packed[layer] = packed
    return packed.weight


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``inputs weight' + bias``."""
    return th.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Linear(th.autograd.Function):
    """The same of rows ``[n, in]`` with a gradient, whose two products are by oneDNN too."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t()) if of_inputs else None,
            _product(gradient.t(), inputs.t()) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )
