"""Actor and K critics for vector, image and Dict observations.

The action distribution, features extractors and initialisation are Stable-Baselines3's. New are the critics: K of
them, evaluated together with the actor as one batched product, and used through their soft-min.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    kl_divergence,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import polyak_update
from torch import Tensor, nn

from sb3_safe import arguments, functional
from sb3_safe.buffers import SafeSamples
from sb3_safe.fast_loss import Objective
from sb3_safe.fast_mlp import FastMlp, fast_path
from sb3_safe.parallel_mlp import Part, architecture, parts, side_by_side

MEAN_ALPHA = 1e8
"""Temperature from which on the soft-min is the mean to single precision, in standard deviations of the return."""


class Evaluation(NamedTuple):
    """What the loss needs to know of a policy at given observations and actions."""

    values: Tensor
    """``[B, K]``, one column per critic."""
    log_prob: Tensor
    """``[B]``, nats."""
    entropy: Tensor | None
    """``[B]``, nats; ``None`` where the distribution has no closed form (squashed gSDE)."""
    latents: Tensor | None = None
    """``[B, h]``, what the policy's other methods can go on from, where a pass of their own would cost much."""


class PessimisticCritics(nn.Module):
    """State and rule of the soft-min that every SAFE policy shares.

    The temperature is in units of the returns' running standard deviation, kept in ``return_scale``, so that one
    default serves rewards of 0.7 and of 500.
    """

    n_critics: int
    soft_min_alpha: float
    return_scale: Tensor
    rollout_is_approximate: bool = False
    """True if log-probabilities of the rollout are inexact (bfloat16) and must be recomputed before training."""
    copies: ClassVar[Mapping[str, str]] = {}
    """Name prefix of a copy's parameters -> prefix of their originals: reference and target critics."""

    @classmethod
    def check_algorithm(cls, algorithm: Any) -> None:
        """Refuse to be built for an algorithm whose run is known to fail.

        :param algorithm: what will build the policy.
        :raises ValueError: the message names the arguments to change.
        """

    @abstractmethod
    def evaluate(self, obs: PyTorchObs, actions: Tensor) -> Evaluation:
        """Values of every critic, log-probability and entropy of actions, with gradient: what training calls.

        :param obs: a minibatch of observations.
        :param actions: ``[B, ...]``, as the rollout buffer yields them.
        """

    @abstractmethod
    def freeze_reference(self) -> None:
        """Make the policy as it is now the reference of the KL penalty. Saved with the parameters."""

    @abstractmethod
    def make_target_critics(self) -> None:
        """Add lagging copies of the critics, which then supply the values that advantages are made of."""

    def fitting_state(self, state_dict: Mapping[str, Any], strict: bool = True) -> Mapping[str, Any]:
        """Adapt a saved state: create reference and target critics that only the file has; initialise those that only
        the policy has from the loaded weights.

        :param state_dict: what :meth:`state_dict` of this or a like policy gave.
        :param strict: whether the state should be whole; what part of one leaves out stays as it is.
        :return: the state with what was missing.
        """
        for beginning, make in (("reference.", self.freeze_reference), ("target_", self.make_target_critics)):
            if _any_begins(state_dict, beginning) and not _any_begins(self.state_dict(), beginning):
                make()
        if not strict:
            return state_dict
        originals = {
            name: original + name.removeprefix(copy)
            for copy, original in self.copies.items()
            for name in self.state_dict()
            if name.startswith(copy) and name not in state_dict
        }
        copied = {name: state_dict[original] for name, original in originals.items() if original in state_dict}
        return {**state_dict, **copied}

    def collecting(self, ended: Callable[[], np.ndarray | None]) -> AbstractContextManager[None]:
        """Entered while a rollout is collected, in which weights do not change; most policies make no use of it.

        :param ended: when the values after the last step are asked for, says after which rows ``[B]`` an episode
            ended: their values are multiplied by 0. Gives ``None`` at any other time.
        """
        return nullcontext()

    def _init_critics(self, n_critics: int, soft_min_alpha: float) -> None:
        arguments.checked({"n_critics": n_critics, "soft_min_alpha": soft_min_alpha}, arguments.POLICY)
        self.n_critics = n_critics
        self.soft_min_alpha = soft_min_alpha
        self.register_buffer("return_scale", th.ones(()))

    def fast_gradient(self, samples: SafeSamples, objective: Objective) -> dict[str, float] | None:
        """Add the gradient of the loss of a minibatch to that of the parameters, where there is a way without a graph.

        :return: means over the actions for the log; ``None``: there is no such way, and nothing has been done.
        """
        return None

    def log_others(self, obs: PyTorchObs, actions: Tensor, evaluation: Evaluation, rows: Tensor) -> Tensor:
        """``log(1 - pi)`` ``[n]`` of some discrete actions, nats, with gradient.

        Here it is had from the log-probability alone, which cannot tell how certain a policy is that is very certain.

        :param obs: a minibatch of observations.
        :param actions: ``[B, ...]``, as the rollout buffer yields them.
        :param evaluation: what :meth:`evaluate` gave for them.
        :param rows: ``[n]``, which of them.
        """
        return functional.log_complement(evaluation.log_prob[rows])

    def aggregate(self, values: Tensor) -> Tensor:
        """Soft-min of the critics.

        :param values: ``[B, K]``, in units of the return.
        :return: ``[B, 1]``, likewise.
        """
        if self.n_critics == 1:
            return values
        return (functional.soft_min(values / self.return_scale, self.soft_min_alpha) * self.return_scale).unsqueeze(-1)


class TwinCriticPolicy(PessimisticCritics, ActorCriticPolicy):
    """Actor with ``n_critics`` value networks, used through their soft-min.

    With ``n_critics=1`` it is SB3's ``ActorCriticPolicy``: same initial parameters, same actions. A subclass may
    override what SB3's may, but for one: training calls :meth:`evaluate`, not ``evaluate_actions``. An
    ``mlp_extractor`` of its own has SB3's ``forward_actor`` and ``forward_critic``, and is built anew for each further
    critic. Neither ``mlp_extractor`` nor ``value_net`` is there after building: the critics are ``bodies``,
    ``value_weight`` and ``value_bias``. Where SB3's own ``forward`` calls those two, one of yours calls ``_latents``
    and ``_used_value``.

    LayerNorm on the critics' input, which the paper puts on hidden states of a language model, is left out here:
    on the three numbers of a pendulum it would discard two of them.

    :param n_critics: number of value networks.
    :param soft_min_alpha: temperature of the soft-min, in running standard deviations of the return.
    :param kwargs: those of :class:`stable_baselines3.common.policies.ActorCriticPolicy`.
    :raises ValueError: no critic, a negative temperature, or an ``mlp_extractor`` without the two methods.
    """

    copies: ClassVar[Mapping[str, str]] = {
        "reference.": "",
        "target_bodies.": "bodies.",
        "target_weight": "value_weight",
        "target_bias": "value_bias",
    }
    optimizer: th.optim.Optimizer
    target_weight: Tensor
    target_bias: Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *args: Any,
        n_critics: int = 2,
        soft_min_alpha: float = 0.3,
        **kwargs: Any,
    ) -> None:
        # Read by _build, which the base class calls from its constructor.
        self._critic_arguments: dict[str, Any] = {"n_critics": n_critics, "soft_min_alpha": soft_min_alpha}
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self._critic_arguments

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self._init_critics(**self._critic_arguments)
        if not hasattr(self.mlp_extractor, "forward_actor") or not hasattr(self.mlp_extractor, "forward_critic"):
            raise ValueError(
                f"policy: mlp_extractor is a {type(self.mlp_extractor).__name__} without forward_actor and "
                "forward_critic, which take features [B, f] to latents; give it both"
            )
        # SB3's own critic is the first; the others are drawn after it, so that one critic means SB3's parameters.
        actor, critic = parts(self.mlp_extractor)
        extra = [self._make_critic(critic) for _ in range(self.n_critics - 1)]
        critics = [critic, *(body for body, _ in extra)]
        heads = [self.value_net, *(head for _, head in extra)]
        self.joint = self.share_features_extractor and architecture(actor) == architecture(critic)
        self.bodies = side_by_side([actor, *critics] if self.joint else critics)
        self.actor_body = nn.Identity() if self.joint else actor
        self.value_weight = nn.Parameter(th.stack([head.weight.detach().t() for head in heads]))
        self.value_bias = nn.Parameter(th.stack([head.bias.detach()[None] for head in heads]))
        del self.mlp_extractor, self.value_net

        self._fast: FastMlp | None = None
        self._distribution = self._known_distribution()
        self._takes_vectors = False
        self.reference: TwinCriticPolicy | None = None
        self.target_bodies: nn.Module | None = None
        self.register_buffer("target_weight", None)
        self.register_buffer("target_bias", None)
        kwargs = dict(self.optimizer_kwargs)
        if self.optimizer_class is th.optim.Adam and not {"foreach", "fused"} & set(kwargs):
            kwargs["fused"] = True  # one kernel a step instead of a dozen per parameter
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def _make_critic(self, first: nn.Module) -> tuple[nn.Module, nn.Linear]:
        """Another value network like the first, initialised as SB3 initialises its own."""
        extractor = self.mlp_extractor
        if isinstance(first, Part):
            self._build_mlp_extractor()
            _, body = parts(self.mlp_extractor)
            self.mlp_extractor = extractor
        else:
            body = copy.deepcopy(first).cpu()  # where SB3 draws its own
            for layer in body.modules():
                if reset := getattr(layer, "reset_parameters", None):
                    reset()
        head = nn.Linear(extractor.latent_dim_vf, 1)
        if self.ortho_init:
            body.apply(lambda module: self.init_weights(module, gain=math.sqrt(2)))
            self.init_weights(head, gain=1)
        return body.to(self.device), head.to(self.device)

    # -- forward passes --------------------------------------------------------------------------------------------

    def _latents(self, obs: PyTorchObs) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of the actor ``[B, h]`` and the critics ``[K, B, h]``, and the critics' features ``[B, f]``."""
        features = self.extract_features(obs)
        pi_features, vf_features = (features, features) if isinstance(features, Tensor) else features
        latents = self.bodies(vf_features)
        if self.joint:
            return latents[0], latents[1:], vf_features
        return self.actor_body(pi_features), latents, vf_features

    def _features(self, obs: PyTorchObs) -> Tensor:
        """Features ``[B, f]`` of actor and critics alike; vectors of numbers are their own."""
        if self._takes_vectors and isinstance(obs, Tensor) and obs.dtype == th.float32:
            return obs
        return cast(Tensor, self.extract_features(obs))

    def _values(self, latents: Tensor) -> Tensor:
        """Values ``[B, K]`` from critic latents ``[K, B, h]``."""
        return th.baddbmm(self.value_bias, latents, self.value_weight).squeeze(-1).t()

    def _target_values(self, vf_features: Tensor) -> Tensor:
        """Values ``[B, K]`` of the lagging critics, on the current features."""
        assert self.target_bodies is not None
        latents = self.target_bodies(vf_features)[int(self.joint) :]
        return th.baddbmm(self.target_bias, latents, self.target_weight).squeeze(-1).t()

    def _used_value(self, latents: Tensor, vf_features: Tensor) -> Tensor:
        """The value ``[B, 1]`` that advantages and bootstraps are made of."""
        values = self._values(latents) if self.target_bodies is None else self._target_values(vf_features)
        return self.aggregate(values)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Act: ``(actions [B, ...], soft-min values [B, 1], log-probabilities [B])``."""
        if self.target_bodies is None and (result := self._fast_forward(obs, deterministic)) is not None:
            return result
        latent_pi, latent_vf, vf_features = self._latents(obs)
        actions, log_prob = self._act(latent_pi, deterministic)
        return actions.reshape((-1, *self.action_space.shape)), self._used_value(latent_vf, vf_features), log_prob  # type: ignore[misc]

    def _fast_forward(self, obs: PyTorchObs, deterministic: bool) -> tuple[Tensor, Tensor, Tensor] | None:
        if self._fast is None or th.is_grad_enabled() or not self._fast.applies():
            return None
        # The fast soft-min's rounding grows with the temperature, and would be seen beyond.
        alpha = self.soft_min_alpha if self.soft_min_alpha < MEAN_ALPHA else math.inf
        temperature = alpha * self.return_scale.item()
        actions, values, log_prob = self._fast.act(self._features(obs), deterministic, temperature)
        return actions.reshape((-1, *self.action_space.shape)), values, log_prob  # type: ignore[misc]

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        result = self._fast_forward(observation, deterministic)
        return super()._predict(observation, deterministic) if result is None else result[0]

    def evaluate(self, obs: PyTorchObs, actions: Tensor) -> Evaluation:
        """Values of every critic, log-probability and entropy; see :class:`Evaluation`.

        :param obs: a minibatch of observations.
        :param actions: ``[B, ...]``, as the rollout buffer yields them.
        """
        if self._fast is not None and self._fast.applies() and not actions.requires_grad:
            return Evaluation(*self._fast.evaluate(self._features(obs), actions))
        latent_pi, latent_vf, _ = self._latents(obs)
        log_prob, entropy = self._score(latent_pi, actions)
        return Evaluation(self._values(latent_vf), log_prob, entropy)

    def fast_gradient(self, samples: SafeSamples, objective: Objective) -> dict[str, float] | None:
        """See :meth:`PessimisticCritics.fast_gradient`."""
        if self._fast is None or objective.kl_estimator == "exact" or not self._fast.applies():
            return None
        if not self._takes_vectors and any(p.requires_grad for p in self.features_extractor.parameters()):
            return None  # their gradient needs a graph
        features = self._features(samples.observations)
        if features.requires_grad:
            return None  # a subclass makes them of parameters of its own
        with th.no_grad():
            return self._fast.accumulate_gradient(features, samples, objective)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """SB3's interface: ``(soft-min values [B, 1], log-probabilities [B], entropies [B])``."""
        evaluation = self.evaluate(obs, actions)
        return self.aggregate(evaluation.values), evaluation.log_prob, evaluation.entropy

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Soft-min values ``[B, 1]``, of the target critics where there are any."""
        _, latent_vf, vf_features = self._latents(obs)
        return self._used_value(latent_vf, vf_features)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """The action distribution; one shared object, as in SB3: use it before asking for the next."""
        return self._get_action_dist_from_latent(self._latents(obs)[0])

    # -- distributions ---------------------------------------------------------------------------------------------
    # Written out for the two common ones: building, validating and tearing down torch Distributions takes more
    # time than the networks do. The arithmetic and the random numbers are the same as theirs.

    def _known_distribution(self) -> type[Distribution] | None:
        """Which one is used; ``None``: what a subclass makes of it, nobody else can write out."""
        own = type(self)._get_action_dist_from_latent is not ActorCriticPolicy._get_action_dist_from_latent
        return None if own else type(self.action_dist)

    def _act(self, latent_pi: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
        if self._distribution is CategoricalDistribution:
            log_probs = th.log_softmax(self.action_net(latent_pi), dim=-1)
            choice = log_probs.argmax(-1, keepdim=True) if deterministic else th.multinomial(log_probs.exp(), 1)
            return choice.squeeze(-1), log_probs.gather(-1, choice).squeeze(-1)
        if self._distribution is DiagGaussianDistribution:
            mean = self.action_net(latent_pi)
            actions = mean if deterministic else mean + self.log_std.exp() * th.randn_like(mean)
            return actions, _gaussian_log_prob(actions, mean, self.log_std)
        distribution = self._get_action_dist_from_latent(latent_pi)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, distribution.log_prob(actions)

    def _score(self, latent_pi: Tensor, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._distribution is CategoricalDistribution:
            log_probs = th.log_softmax(self.action_net(latent_pi), dim=-1)
            log_prob = log_probs.gather(-1, actions.long().reshape(-1, 1)).squeeze(-1)
            return log_prob, -(log_probs.exp() * log_probs).sum(-1)
        if self._distribution is DiagGaussianDistribution:
            mean = self.action_net(latent_pi)
            entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).expand(len(mean))
            return _gaussian_log_prob(actions, mean, self.log_std), entropy
        distribution = self._get_action_dist_from_latent(latent_pi)
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long().flatten()  # in a buffer they are ``[B, 1]``
        return distribution.log_prob(actions), distribution.entropy()

    # -- reference policy and target critics -----------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode; the reference stays in the latter."""
        super().train(mode)
        if self.reference is not None:
            self.reference.train(False)
        # At each rollout and update, so that what has been replaced gets a fast path of its own.
        self._distribution = self._known_distribution()
        self._takes_vectors = (
            isinstance(self.observation_space, spaces.Box)
            and len(self.observation_space.shape) == 1
            and type(self.features_extractor) is FlattenExtractor
            and type(self).extract_features is ActorCriticPolicy.extract_features
        )
        self._fast = fast_path(self, TwinCriticPolicy)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``; see :meth:`fitting_state`."""
        return super().load_state_dict(self.fitting_state(state_dict, strict), strict, assign)

    def freeze_reference(self) -> None:
        """See :meth:`PessimisticCritics.freeze_reference`."""
        left_out = (self.optimizer, self.reference, self.target_bodies, self.target_weight, self.target_bias)
        memo: dict[int, Any] = dict.fromkeys(map(id, left_out))
        # Distributions keep tensors of the last forward pass, which have a gradient and cannot be copied deeply.
        memo[id(self.action_dist)] = copy.copy(self.action_dist)
        reference = copy.deepcopy(self, memo).requires_grad_(False)
        self.reference = reference.train(False)

    @th.no_grad()
    def reference_log_prob(self, obs: PyTorchObs, actions: Tensor) -> Tensor:
        """Log-probability ``[B]`` of actions under the reference policy, nats."""
        assert self.reference is not None, "freeze_reference() has not been called"
        return self.reference.evaluate(obs, actions).log_prob

    def exact_kl(self, obs: PyTorchObs, latents: Tensor | None = None) -> Tensor:
        """Closed-form ``KL(policy || reference)`` ``[B]``, nats per action.

        :param obs: a minibatch of observations.
        :param latents: of its evaluation; not used: a pass through small networks costs little.
        """
        assert self.reference is not None, "freeze_reference() has not been called"
        with th.no_grad():
            reference = self.reference.get_distribution(obs)
        divergence = kl_divergence(self.get_distribution(obs), reference)
        return divergence.sum(-1) if divergence.dim() > 1 else divergence

    def log_others(self, obs: PyTorchObs, actions: Tensor, evaluation: Evaluation, rows: Tensor) -> Tensor:
        """See :meth:`PessimisticCritics.log_others`. Exact for categorical and binary actions of any dimension."""
        distribution = self._get_action_dist_from_latent(self._latents(obs)[0][rows])
        whole = getattr(distribution, "distribution", None)
        parts = whole if isinstance(whole, list) else [whole]
        taken = actions[rows].reshape(len(rows), -1)
        if isinstance(whole, th.distributions.Bernoulli):
            log_probs, others = (whole.log_prob(bits) for bits in (taken, 1 - taken))  # type: ignore[no-untyped-call]
            return functional.log_any_other(log_probs, others)
        if not all(isinstance(part, th.distributions.Categorical) for part in parts):
            return super().log_others(obs, actions, evaluation, rows)
        pairs = list(zip(parts, taken.long().unbind(dim=-1), strict=True))
        log_probs = th.stack([part.logits.gather(-1, chosen[:, None])[:, 0] for part, chosen in pairs], dim=-1)
        others = th.stack([functional.log_others(part.logits, chosen) for part, chosen in pairs], dim=-1)
        return functional.log_any_other(log_probs, others)

    def make_target_critics(self) -> None:
        """See :meth:`PessimisticCritics.make_target_critics`."""
        self.target_bodies = copy.deepcopy(self.bodies).requires_grad_(False)
        self.register_buffer("target_weight", self.value_weight.detach().clone())
        self.register_buffer("target_bias", self.value_bias.detach().clone())

    def drop_target_critics(self) -> None:
        """The critics themselves supply the values again."""
        self.target_bodies = self.target_weight = self.target_bias = None  # type: ignore[assignment]

    def update_target_critics(self, tau: float) -> None:
        """Move the target critics towards the critics by ``tau`` in (0, 1]."""
        if self.target_bodies is not None:
            polyak_update(self.bodies.parameters(), self.target_bodies.parameters(), tau)
            polyak_update([self.value_weight, self.value_bias], [self.target_weight, self.target_bias], tau)


class TwinCriticCnnPolicy(TwinCriticPolicy):
    """:class:`TwinCriticPolicy` for images, with SB3's ``NatureCNN``.

    :raises ValueError: observations that are no images.
    """

    def __init__(self, observation_space: spaces.Space[Any], *args: Any, **kwargs: Any) -> None:
        extractor = kwargs.setdefault("features_extractor_class", NatureCNN)
        normalized = not kwargs.get("normalize_images", True)
        if extractor is NatureCNN and not is_image_space(observation_space, normalized_image=normalized):
            raise ValueError(
                f"policy=CnnPolicy needs images, got {observation_space}; use MlpPolicy, or MultiInputPolicy for a Dict"
            )
        super().__init__(observation_space, *args, **kwargs)


class TwinCriticMultiInputPolicy(TwinCriticPolicy):
    """:class:`TwinCriticPolicy` for Dict observations, with SB3's ``CombinedExtractor``.

    :raises ValueError: observations that are no Dict.
    """

    def __init__(self, observation_space: spaces.Space[Any], *args: Any, **kwargs: Any) -> None:
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(
                f"policy=MultiInputPolicy needs Dict observations, got {observation_space}; use MlpPolicy, or "
                "CnnPolicy for images"
            )
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(observation_space, *args, **kwargs)


def check_policy_class(policy: type, known: Iterable[str]) -> None:
    """Refuse a class of policies that could not be trained.

    :param policy: the class.
    :param known: names of policies to use instead.
    :raises ValueError: with what to derive from, or to override, instead.
    """
    if not issubclass(policy, PessimisticCritics):
        raise ValueError(
            f"policy={policy.__name__} has no twin critics: derive it from TwinCriticPolicy, or use one of "
            f"{', '.join(known)}"
        )
    missing = [name for name in dir(policy) if getattr(getattr(policy, name, None), "__isabstractmethod__", False)]
    if missing:
        raise ValueError(f"policy={policy.__name__} lacks what training calls: override {', '.join(missing)}")
    nearest = next(ancestor for ancestor in policy.__mro__ if {"evaluate", "evaluate_actions"} & vars(ancestor).keys())
    if "evaluate" not in vars(nearest):
        raise ValueError(
            f"policy={policy.__name__} overrides evaluate_actions, which training does not call: override "
            "evaluate, which tells the critics apart"
        )


def _any_begins(names: Iterable[str], beginning: str) -> bool:
    return any(name.startswith(beginning) for name in names)


def _gaussian_log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density ``[B]`` of diagonal Gaussians; ``actions`` and ``mean`` ``[B, D]``, ``log_std`` ``[D]``."""
    deviation = (actions - mean) * th.exp(-log_std)
    return (-0.5 * deviation.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
