"""Plain MLP policies on the CPU: acting in NumPy, and training by a gradient that is written out.

Networks of a few thousand weights spend their time in dispatching operations, not in arithmetic. A call of NumPy costs
a third of one of torch and its tanh a tenth, and a written-out gradient replaces thirty nodes of autograd's graph.
Training adds it to the parameters without a graph (``accumulate_gradient``); for whatever else differentiates,
``evaluate`` is one node of the graph. NumPy arrays share memory with the torch parameters; results and random numbers
are those of the general path, to rounding.

Shapes: ``B`` actions, ``K`` critics, ``N = K + 1`` networks side by side with the actor first, ``A`` outputs of the
actor. The batch comes last where a reduction is over another axis, for which NumPy is fast in this order only.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from threadpoolctl import LibController, ThreadpoolController
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from sb3_safe.buffers import SafeSamples
from sb3_safe.fast_loss import Objective
from sb3_safe.parallel_mlp import ParallelMlp

Array = NDArray[np.float32]
ScoreGradient = Callable[[Array, Array | None], list[Array]]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Registered = tuple[Mapping[str, Any], str, Any]
"""A module's register of its parameters or modules, a name in it, and what has that name."""


class Activation(NamedTuple):
    """An activation function and its derivative."""

    apply: Callable[[Array], Array]
    """In place."""
    derivative: Callable[[Array], NDArray[Any]]
    """As a function of the output."""


# Looked up by type, so that objects can be pickled.
ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: Activation(lambda z: np.tanh(z, out=z), lambda y: 1 - y * y),
    nn.ReLU: Activation(lambda z: np.maximum(z, 0, out=z), lambda y: y > 0),
}

GENERAL_PATH = (
    "evaluate", "get_distribution", "aggregate", "_latents", "_values", "_used_value", "_act", "_score",
    "_get_action_dist_from_latent",
)  # fmt: skip
MAX_WEIGHTS = 1_000_000
"""Of all hidden layers. Beyond it products are large enough to be worth several threads, which torch's path has."""


@functools.cache
def _openblas() -> list[LibController]:
    """What NumPy multiplies matrices with, unless it was built with something else."""
    return [library for library in ThreadpoolController().lib_controllers if library.internal_api == "openblas"]


def on_one_thread(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Products of NumPy in a function are computed by one thread; afterwards by as many as before.

    For matrices of these sizes OpenBLAS's threads wait for one another longer than they compute.
    """

    @functools.wraps(function)
    def limited(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        several = [(library, number) for library in _openblas() if (number := library.get_num_threads()) > 1]
        for library, _ in several:
            library.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            for library, number in several:
                library.set_num_threads(number)

    return limited


class FastMlp:
    """Acting and training of an actor and K critics of one architecture.

    :param weights: of the hidden layers, ``[N, in, out]`` each.
    :param biases: likewise, ``[N, 1, out]`` each.
    :param activation: of every layer, a key of :data:`ACTIVATIONS`.
    :param critic_head: weight ``[K, h, 1]`` and bias ``[K, 1, 1]``.
    :param actor_head: weight ``[A, h]`` and bias ``[A]``.
    :param log_std: ``[A]``, of a diagonal Gaussian; ``None``: the actor's outputs are logits.
    :param registered: modules and parameters that it stands in for as long as they are where they were registered.
    :param hooks: registers that are to be empty.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        activation: type[nn.Module],
        critic_head: tuple[Tensor, Tensor],
        actor_head: tuple[Tensor, Tensor],
        log_std: Tensor | None,
        registered: Sequence[Registered],
        hooks: Sequence[Mapping[int, Any]],
    ) -> None:
        self.depth = len(weights)
        self.activation = activation
        self.parameters = (*weights, *biases, *critic_head, *actor_head, *(() if log_std is None else (log_std,)))
        self.registered, self.hooks = registered, hooks

    def applies(self) -> bool:
        """Whether nothing has been replaced or has hooks, and the parameters can be had as arrays.

        The latter is so if they are on the CPU and no operations are being recorded.
        """
        for register, name, part in self.registered:  # attributes of modules would take many times as long
            if register.get(name) is not part:
                return False
        recording = th.jit.is_tracing() or th.compiler.is_compiling()  # type: ignore[attr-defined, no-untyped-call]
        recording = recording or th._C._are_functorch_transforms_active()  # grad, vmap and the like of torch.func
        return self.parameters[0].is_cpu and not recording and not any(self.hooks)

    @on_one_thread
    @np.errstate(all="ignore")
    def act(self, features: Tensor, deterministic: bool, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Act: ``(actions [B] or [B, A], soft-min values [B, 1], log-probabilities [B])``; with gradients disabled.

        :param features: ``[B, f]``
        :param deterministic: take the most likely actions.
        :param temperature: of the soft-min, units of the return.
        :raises RuntimeError: probabilities that are NaN, as :func:`torch.multinomial` does.
        """
        arrays = [parameter.numpy() for parameter in self.parameters]
        latents = self._layers(features.numpy(), arrays)[-1]
        values, output, log_std = self._heads(latents, arrays)
        if log_std is None:
            actions, log_prob = _draw_categorical(output, deterministic)
        else:
            actions, log_prob = _draw_gaussian(output, log_std, deterministic)
        return th.from_numpy(actions), th.from_numpy(soft_min(values, temperature)[:, None]), th.from_numpy(log_prob)

    def evaluate(self, features: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(values [B, K], log-probabilities [B], entropies [B])``.

        :param features: ``[B, f]``
        :param actions: ``[B, ...]``
        """
        return _Evaluation.apply(self, features, actions, *self.parameters)  # type: ignore[no-any-return, no-untyped-call]

    @on_one_thread
    @np.errstate(all="ignore")
    def accumulate_gradient(self, features: Tensor, samples: SafeSamples, objective: Objective) -> dict[str, float]:
        """Add the gradient of the loss of a minibatch to that of the parameters, without a graph; gradients disabled.

        :param features: ``[B, f]``, constants.
        :return: means over the actions for the log.
        """
        arrays = [parameter.numpy() for parameter in self.parameters]
        evaluation, gradient = self._evaluate(features.numpy(), samples.actions.numpy(), arrays)
        means, slopes = objective.slopes(samples, *evaluation)
        _, *gradients = gradient(*slopes, with_features=False)
        # Where the policy is not trained its head has no gradient, as in the general path. The zeros of its hidden
        # layers an optimizer does count: a slice of tensors that the critics train.
        trained = self.parameters if objective.trains_policy else self.parameters[: 2 * self.depth + 2]
        for parameter, array in zip(trained, gradients, strict=False):
            if parameter.requires_grad:
                new = th.from_numpy(array)
                parameter.grad = new if parameter.grad is None else parameter.grad.add_(new)
        return means

    def _layers(self, features: Array, arrays: list[Array]) -> list[Array]:
        """The features ``[B, f]``, and the output of each layer ``[N, B, h]``."""
        layers, apply = [features], ACTIVATIONS[self.activation].apply
        for weight, bias in zip(arrays[: self.depth], arrays[self.depth : 2 * self.depth], strict=True):
            z = np.matmul(layers[-1], weight)
            z += bias
            layers.append(apply(z))
        return layers

    def _heads(self, latents: Array, arrays: list[Array]) -> tuple[Array, Array, Array | None]:
        """Values ``[K, B]``, outputs of the actor ``[A, B]``, and the logarithm of their spread ``[A, 1]``."""
        critic_weight, critic_bias, actor_weight, actor_bias, *log_std = arrays[2 * self.depth :]
        values = np.matmul(latents[1:], critic_weight)
        values += critic_bias
        output = np.matmul(actor_weight, latents[0].T)
        output += actor_bias[:, None]
        return values[..., 0], output, log_std[0][:, None] if log_std else None

    def _evaluate_tensors(self, features: Tensor, actions: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`evaluate` computes, in torch: slower, but its gradient has a gradient."""
        latents = features.expand(len(parameters[0]), *features.shape)
        for weight, bias in zip(parameters[: self.depth], parameters[self.depth : 2 * self.depth], strict=True):
            latents = self.activation()(th.baddbmm(bias, latents, weight))
        critic_weight, critic_bias, actor_weight, actor_bias, *log_std = parameters[2 * self.depth :]
        values = th.baddbmm(critic_bias, latents[1:], critic_weight)[..., 0].T
        output = nn.functional.linear(latents[0], actor_weight, actor_bias)
        if log_std:
            distribution: Any = Independent(Normal(output, th.exp(log_std[0]), validate_args=False), 1, False)
        else:
            distribution, actions = Categorical(logits=output, validate_args=False), actions.flatten()
        return values, distribution.log_prob(actions), distribution.entropy()

    def _evaluate(
        self, features: Array, actions: NDArray[Any], arrays: list[Array]
    ) -> tuple[tuple[Array, Array, Array], Callable[..., list[Array]]]:
        """Values ``[K, B]``, log-probabilities and entropies ``[B]``; from their gradients those of the parameters."""
        layers = self._layers(features, arrays)
        latents = layers[-1]
        values, output, log_std = self._heads(latents, arrays)
        if log_std is None:
            log_prob, entropy, score_gradient = _score_categorical(output, actions)
        else:
            log_prob, entropy, score_gradient = _score_gaussian(output, log_std, actions)

        def gradient(d_values: Array, d_log_prob: Array, d_entropy: Array | None, with_features: bool) -> list[Any]:
            critic_weight, _, actor_weight, *_ = arrays[2 * self.depth :]
            ones = np.ones((1, len(features)), np.float32)  # the product with it is a sum over the batch, only faster
            d_output, *d_log_std = score_gradient(d_log_prob, d_entropy)
            d_critics = np.ascontiguousarray(d_values)[..., None]
            d_heads = [
                np.matmul(latents[1:].swapaxes(1, 2), d_critics),
                np.matmul(ones, d_critics),
                np.matmul(d_output, latents[0]),
                np.add.reduce(d_output, axis=1),
            ]
            d_layer = np.empty_like(latents)
            np.matmul(d_output.T, actor_weight, out=d_layer[0])
            np.multiply(d_critics, critic_weight.swapaxes(1, 2), out=d_layer[1:])
            d_weights, d_biases = [], []
            derivative = ACTIVATIONS[self.activation].derivative
            for i in reversed(range(self.depth)):
                d_layer *= derivative(layers[i + 1])
                d_weights.append(np.matmul(layers[i].swapaxes(-1, -2), d_layer))
                d_biases.append(np.matmul(ones, d_layer))
                if i > 0 or with_features:
                    d_layer = np.matmul(d_layer, arrays[i].swapaxes(1, 2))
            d_features = np.add.reduce(d_layer) if with_features else None
            return [d_features, *d_weights[::-1], *d_biases[::-1], *d_heads, *d_log_std]

        return (values, log_prob, entropy), gradient


def fast_path(policy: Any, general: type) -> FastMlp | None:
    """The fast path of a policy; ``None`` where there is anything that only the general one can do.

    :param policy: a :class:`~sb3_safe.policies.TwinCriticPolicy`.
    :param general: the class whose methods :class:`FastMlp` stands in for, unless a subclass overrides one of them.
    """
    if any(getattr(type(policy), name) is not getattr(general, name) for name in GENERAL_PATH):
        return None
    distribution, bodies, head = type(policy.action_dist), policy.bodies, policy.action_net
    if distribution not in (CategoricalDistribution, DiagGaussianDistribution) or type(head) is not nn.Linear:
        return None
    if not policy.joint or not isinstance(bodies, ParallelMlp) or len(bodies.weights) == 0:
        return None
    if sum(weight.numel() for weight in bodies.weights) > MAX_WEIGHTS:
        return None
    layers = [head, *bodies.modules(), *(policy.features_extractor.modules() if policy._takes_vectors else ())]
    hooks = [register for layer in layers for register in _hooks(layer)]
    if any(hooks):
        return None
    activations = {type(activation) for activation in bodies.activations}
    if not activations <= ACTIVATIONS.keys():
        return None
    fast = FastMlp(
        list(bodies.weights),
        list(bodies.biases),
        activations.pop(),
        critic_head=(policy.value_weight, policy.value_bias),
        actor_head=(head.weight, head.bias),
        log_std=policy.log_std if distribution is DiagGaussianDistribution else None,
        registered=[
            (register, name, part)
            for module in (policy, *layers)
            for register in (module._parameters, module._modules)
            for name, part in register.items()
        ],
        hooks=hooks,
    )
    return fast if all(map(_is_plain, fast.parameters)) else None


def _hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """The registers of what is to be called when a module is, or when its gradient is computed."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _is_plain(parameter: Tensor) -> bool:
    hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return type(parameter) is nn.Parameter and parameter.dtype == th.float32 and not hooks


class _Evaluation(th.autograd.Function):
    """:meth:`FastMlp.evaluate`."""

    @staticmethod
    @on_one_thread
    @np.errstate(all="ignore")
    def forward(ctx: Any, mlp: FastMlp, features: Tensor, actions: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        arrays = [parameter.numpy() for parameter in parameters]
        (values, log_prob, entropy), ctx.gradient = mlp._evaluate(features.numpy(), actions.numpy(), arrays)
        ctx.parameters, ctx.versions, ctx.shape = parameters, [p._version for p in parameters], values.shape
        ctx.mlp = mlp
        ctx.save_for_backward(features, actions)
        ctx.set_materialize_grads(False)
        return th.from_numpy(values.T), th.from_numpy(log_prob), th.from_numpy(entropy)

    @staticmethod
    @on_one_thread
    @np.errstate(all="ignore")
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.versions != [parameter._version for parameter in ctx.parameters]:
            raise RuntimeError("parameters were changed between the evaluation of actions and its gradient")
        if th.is_grad_enabled():  # the gradient is to have one itself
            return _differentiable_gradient(ctx, slopes)
        d_values, d_log_prob, d_entropy = slopes
        d_features, *d_parameters = ctx.gradient(
            np.zeros(ctx.shape, np.float32) if d_values is None else d_values.numpy().T,
            np.zeros(ctx.shape[1], np.float32) if d_log_prob is None else d_log_prob.numpy(),
            None if d_entropy is None else d_entropy.numpy(),
            with_features=ctx.needs_input_grad[1],
        )
        # As in autograd, a head that is in no loss has no gradient, not even zeros, which an optimizer would count.
        heads = 2 * ctx.mlp.depth
        if d_values is None:
            d_parameters[heads : heads + 2] = [None, None]
        if d_log_prob is None and d_entropy is None:
            d_parameters[heads + 2 :] = [None] * len(d_parameters[heads + 2 :])
        gradients = (None if array is None else th.from_numpy(array) for array in (d_features, *d_parameters))
        return None, next(gradients), None, *gradients


def _differentiable_gradient(ctx: Any, slopes: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """As :meth:`_Evaluation.backward`, with a graph, which arrays do not have."""
    features, actions = ctx.saved_tensors
    # Features and slopes may depend on the parameters. vjp, unlike autograd.grad, takes the partial derivatives.
    outputs, gradient = th.func.vjp(  # type: ignore[misc]
        lambda features, *parameters: ctx.mlp._evaluate_tensors(features, actions, *parameters),
        features,
        *ctx.parameters,
    )
    of_features, *of_parameters = gradient(
        tuple(th.zeros_like(o) if slope is None else slope for o, slope in zip(outputs, slopes, strict=True))
    )
    return None, of_features, None, *of_parameters


def soft_min(values: Array, temperature: float) -> Array:
    """:func:`sb3_safe.functional.soft_min` in double precision, for few observations in half the time.

    Rounding, about 1e-16 of the temperature, is below that of single precision up to 1e8 times the size of the values.

    :param values: ``[K, B]``
    :param temperature: at least 0, in the units of the values.
    :return: ``[B]``
    """
    if temperature == 0 or len(values) == 1:
        return np.minimum.reduce(values)  # type: ignore[no-any-return]
    if temperature == math.inf:
        return np.mean(values, axis=0)  # type: ignore[no-any-return]
    pooled = np.logaddexp.reduce(values.astype(np.float64) / -temperature)
    return (-temperature * (pooled - math.log(len(values)))).astype(np.float32)  # type: ignore[no-any-return]


def _log_softmax(logits: Array) -> Array:
    """Over the first axis of ``[A, B]``."""
    shifted = logits - np.maximum.reduce(logits)
    shifted -= np.log(np.add.reduce(np.exp(shifted)))
    return shifted  # type: ignore[no-any-return]


def _draw_categorical(logits: Array, deterministic: bool) -> tuple[NDArray[Any], Array]:
    """Actions ``[B]`` and log-probabilities ``[B]``, from ``[A, B]``."""
    log_probs = _log_softmax(logits)
    scores = log_probs.T
    if not deterministic:  # as torch.multinomial draws
        scores = np.exp(scores) / th.empty(scores.shape, dtype=th.float32).exponential_().numpy()
    actions = scores.argmax(axis=1)
    log_prob = log_probs[actions, np.arange(len(actions))]
    if np.isnan(log_prob).any():
        raise RuntimeError("probabilities of actions are NaN")
    return actions, log_prob


def _score_categorical(logits: Array, actions: NDArray[Any]) -> tuple[Array, Array, ScoreGradient]:
    """Log-probabilities ``[B]``, entropies ``[B]``, and from their gradients that of the logits."""
    log_probs = _log_softmax(logits)
    probs = np.exp(log_probs)
    taken = actions.astype(np.int64).reshape(-1), np.arange(len(actions))
    negative_entropy = np.add.reduce(probs * log_probs)

    def gradient(d_log_prob: Array, d_entropy: Array | None) -> list[Array]:
        d_logits = probs * -d_log_prob
        d_logits[taken] += d_log_prob
        if d_entropy is not None:
            d_logits -= probs * (log_probs - negative_entropy) * d_entropy
        return [d_logits]

    return log_probs[taken], -negative_entropy, gradient


def _draw_gaussian(mean: Array, log_std: Array, deterministic: bool) -> tuple[NDArray[Any], Array]:
    """Actions ``[B, A]`` and log-densities ``[B]``, from ``[A, B]`` and ``[A, 1]``."""
    actions = mean
    if not deterministic:
        actions = mean + np.exp(log_std) * th.randn(mean.T.shape, dtype=th.float32).numpy().T
    # Environments written in C may count on rows in one piece.
    return np.ascontiguousarray(actions.T), _gaussian_log_prob((actions - mean) * np.exp(-log_std), log_std)


def _score_gaussian(mean: Array, log_std: Array, actions: NDArray[Any]) -> tuple[Array, Array, ScoreGradient]:
    """Log-densities ``[B]``, entropies ``[B]``, and from their gradients those of mean and ``log_std``."""
    precision = np.exp(-log_std)
    deviation = (actions.T - mean) * precision
    entropy = np.full(len(actions), (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(), np.float32)

    def gradient(d_log_prob: Array, d_entropy: Array | None) -> list[Array]:
        d_log_std = np.matmul(deviation * deviation - 1, d_log_prob)
        if d_entropy is not None:
            d_log_std += d_entropy.sum()
        return [d_log_prob * deviation * precision, d_log_std]

    return _gaussian_log_prob(deviation, log_std), entropy, gradient


def _gaussian_log_prob(deviation: Array, log_std: Array) -> Array:
    """Log-densities ``[B]`` from the deviations ``[A, B]`` in standard deviations."""
    log_density = -0.5 * deviation * deviation - (log_std + 0.5 * math.log(2 * math.pi))
    return np.add.reduce(log_density)  # type: ignore[no-any-return]
