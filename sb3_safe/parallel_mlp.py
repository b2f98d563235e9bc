"""Networks of one architecture side by side."""

from collections.abc import Sequence
from typing import Any

import torch as th
from torch import Tensor, nn

# What has no parameters and treats every number alike, whatever the axes around it.
ELEMENTWISE = (
    nn.Tanh, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Identity,
)  # fmt: skip


class ParallelMlp(nn.Module):
    """N networks of one architecture as batched matrix products.

    On small networks time goes into dispatching operations, not into arithmetic: actor and critics side by side
    cost little more than one of them.

    :param networks: Sequentials of alternating Linear and activation layers, all of one shape.
    """

    def __init__(self, networks: Sequence[nn.Sequential]) -> None:
        super().__init__()
        linear = [[layer for layer in network if isinstance(layer, nn.Linear)] for network in networks]
        layers = list(zip(*linear, strict=True))
        self.weights = nn.ParameterList(
            [nn.Parameter(th.stack([layer.weight.detach().t() for layer in group])) for group in layers]
        )
        self.biases = nn.ParameterList(
            [nn.Parameter(th.stack([layer.bias.detach()[None] for layer in group])) for group in layers]
        )
        self.activations = nn.ModuleList(
            [] if not networks else [layer for layer in networks[0] if not isinstance(layer, nn.Linear)]
        )
        self.n_networks = len(networks)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply every network to the same inputs.

        :param inputs: ``[B, in]``
        :return: ``[N, B, out]``
        """
        latent = inputs.expand(self.n_networks, *inputs.shape)
        for weight, bias, activation in zip(self.weights, self.biases, self.activations, strict=True):
            latent = activation(th.baddbmm(bias, latent, weight))
        return latent


class SerialMlp(nn.ModuleList):
    """N networks evaluated one after the other: for layers that are not elementwise, or have parameters."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply every network to the same inputs.

        :param inputs: ``[B, in]``
        :return: ``[N, B, out]``
        """
        return th.stack([network(inputs) for network in self])


def side_by_side(networks: Sequence[nn.Sequential]) -> ParallelMlp | SerialMlp:
    """Networks of one architecture as one module, from ``[B, in]`` to ``[N, B, out]``."""
    plain = all(isinstance(layer, nn.Linear) or type(layer) in ELEMENTWISE for layer in networks[0])
    return ParallelMlp(networks) if plain else SerialMlp(networks)


def architecture(network: nn.Sequential) -> list[tuple[Any, ...]]:
    """What must be equal for two networks to be evaluated side by side."""
    return [
        (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (type(layer),) for layer in network
    ]
