"""Networks of one architecture side by side."""

from collections.abc import Sequence
from typing import Any, cast

import torch as th
from stable_baselines3.common.torch_layers import MlpExtractor
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


class Part(nn.Module):
    """The actor's or the critic's part of an ``mlp_extractor`` that is not SB3's; the two may share layers.

    :param extractor: has ``method``.
    :param method: ``"forward_actor"`` or ``"forward_critic"``.
    """

    def __init__(self, extractor: nn.Module, method: str) -> None:
        super().__init__()
        self.extractor = extractor
        self.method = method

    def forward(self, inputs: Tensor) -> Tensor:
        """Latents ``[B, out]`` of features ``[B, in]``."""
        return getattr(self.extractor, self.method)(inputs)  # type: ignore[no-any-return]


def side_by_side(networks: Sequence[nn.Module]) -> ParallelMlp | SerialMlp:
    """Networks of one architecture as one module, from ``[B, in]`` to ``[N, B, out]``."""
    first = networks[0]
    plain = isinstance(first, nn.Sequential) and all(type(layer) in (nn.Linear, *ELEMENTWISE) for layer in first)
    return ParallelMlp(cast(Sequence[nn.Sequential], networks)) if plain else SerialMlp(networks)


def architecture(network: nn.Module) -> list[Any]:
    """What must be equal for two networks to be evaluated side by side."""
    if not isinstance(network, nn.Sequential):
        return [network]  # another's cannot be told
    return [
        (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else type(layer) for layer in network
    ]


def parts(extractor: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The networks of actor and critic in an ``mlp_extractor``, up to their heads.

    :param extractor: with ``forward_actor`` and ``forward_critic``.
    """
    if type(extractor) is MlpExtractor:
        nets = (extractor.policy_net, extractor.value_net)
        actor, critic = (set(map(id, net.parameters())) for net in nets)
        if all(isinstance(net, nn.Sequential) for net in nets) and actor.isdisjoint(critic):
            return nets
    return Part(extractor, "forward_actor"), Part(extractor, "forward_critic")
