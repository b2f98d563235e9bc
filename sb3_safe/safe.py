"""SAFE: stable alignment finetuning with entropy-aware control, as a Stable-Baselines3 on-policy algorithm."""

import functools
import math
from collections import defaultdict
from typing import Any, ClassVar, Literal, Self

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Tensor

from sb3_safe import arguments, environments, functional
from sb3_safe.buffers import AnnotatedRollout, SafeSamples, buffer_class_for, check_buffer_class
from sb3_safe.callbacks import FunctionCallback, ProgressCallback
from sb3_safe.controller import (
    ESTIMATORS,
    Estimator,
    KLController,
    Reference,
    controller_defaults,
    make_controller,
)
from sb3_safe.fast_loss import Objective
from sb3_safe.finite import LastGood, NonFiniteError, check_observations, check_rollout, describe_steps, mean_of_finite
from sb3_safe.policies import (
    Evaluation,
    TwinCriticCnnPolicy,
    TwinCriticMultiInputPolicy,
    TwinCriticPolicy,
    check_policy_class,
)
from sb3_safe.presets import preset, with_presets
from sb3_safe.resumable import ResumableAlgorithm
from sb3_safe.trust_bound import MAX_PREVIEW_KL, TrustBound

RETURN_SCALE_DECAY = 0.9
LARGEST_RETURN = float(np.finfo(np.float32).max)
"""Of an episode that the controller is told of. Rewards that are trained on are in single precision."""
LOSS = ("_loss", "_kl", "_kl_term")
"""Methods of SAFE. The fast path computes what they do; where a subclass overrides one, it is not used."""


class SAFE(ResumableAlgorithm):
    """PPO made stable: pessimistic twin critics, an asymmetric KL penalty, an entropy gate, a moving threshold.

    Four layers on PPO, each with its switch; with all of them off SAFE is SB3's PPO:

    1. **Double soft-min critic**: ``policy_kwargs=dict(n_critics=2, soft_min_alpha=0.3)``, ``huber_delta``,
       ``critic_tau``. Off: ``n_critics=1``, ``huber_delta=None``, ``critic_tau=1``.
    2. **Asymmetric KL penalty** with a gradient: ``kl_controller``, ``kl_reference``, ``kl_estimator``.
       Off: ``kl_controller="none"``.
    3. **Entropy gate**: off with ``kl_controller_kwargs=dict(entropy_gate=False)``.
    4. **Moving threshold and preview**: ``kl_controller_kwargs=dict(threshold="earned" | "paper" | "constant")``,
       ``max_preview_kl``. Off: ``threshold="constant"``, ``max_preview_kl=None``.

    ``SAFE("TextGenEnv-v0")``, an environment id alone, takes the policy that fits the environment and the preset of
    that id; arguments that are given win over the preset.

    Paper: https://arxiv.org/abs/2602.04651. On what is done differently from its published code, see the docs.

    :param policy: a policy name (``MlpPolicy``, ``CnnPolicy``, ``MultiInputPolicy``, ``LanguagePolicy``), a policy
        class, ``"auto"`` for what fits the environment, or an environment id.
    :param env: a gymnasium environment or vector environment, an SB3 ``VecEnv``, or an id.
    :param learning_rate: number, or function of the remaining progress (1 to 0).
    :param n_steps: steps per environment and rollout.
    :param batch_size: actions per minibatch.
    :param n_epochs: passes over a rollout.
    :param gamma: discount factor.
    :param gae_lambda: bias against variance of generalised advantage estimation.
    :param clip_range: PPO's clip of the probability ratio; number or schedule.
    :param clip_range_vf: how far a critic may move from its old value, units of return; ``None``: no clipping.
    :param normalize_advantage: whether advantages are standardised per minibatch.
    :param ent_coef: coefficient of the entropy bonus.
    :param vf_coef: coefficient of the critic loss.
    :param max_grad_norm: the gradient is clipped to this norm; ``float("inf")``: no clipping.
    :param use_sde: generalised state-dependent exploration, for Box actions.
    :param sde_sample_freq: steps between two noise matrices; -1: one a rollout.
    :param rollout_buffer_class: an :class:`~sb3_safe.buffers.AnnotatedRollout`; ``None``: the one that fits.
    :param rollout_buffer_kwargs: its further arguments.
    :param target_kl: stop an update early when the KL of a minibatch to the rollout policy passes 1.5 times this.
    :param huber_delta: where the critic loss turns linear, as a multiple of the root mean square of the critic's error
        on the rollout; ``None``: squared error.
    :param critic_tau: Polyak step of the target critics, which supply the values that advantages are made of, per
        gradient step; 1: the critics themselves.
    :param kl_controller: ``"safe"``, ``"fixed"``, ``"adaptive"``, ``"none"``, or a class of
        :mod:`sb3_safe.controller`.
    :param kl_controller_kwargs: its arguments.
    :param kl_reference: what the KL is measured to: ``"initial"``, the policy as it was built or loaded (default for
        text), or ``"rollout"``, the policy that collected the data (default for control, where the initial policy
        is noise).
    :param kl_estimator: ``"k2"``, ``"k3"`` or ``"exact"`` in the loss, ``"k1"`` in the reward; ``"auto"``: k1 against
        the initial, k3 against the rollout policy.
    :param max_preview_kl: KL to the rollout policy, nats per action, that no update exceeds: steps that would are
        shrunk, and if the whole batch is still past it the parameters walk back. ``"auto"``: 0.02 against the initial,
        0.5 against the rollout policy. ``None``: no bound.
    :param critic_warmup: rollouts at the start whose updates train the critics alone (and a features extractor that
        they share with the policy): advantages from untrained critics are noise.
        If actor and critics have equal hidden sizes they share tensors, so Adam's step count advances for the actor too
        while its gradient is 0; the actor's first real steps are then up to 3 times too long.
    :param n_envs: number of environments, when ``env`` is an id.
    :param env_kwargs: arguments of the environment, when ``env`` is an id.
    :param stats_window_size: episodes that logged means are taken over.
    :param tensorboard_log: folder for TensorBoard.
    :param policy_kwargs: arguments of the policy.
    :param verbose: 0 silent, 1 info, 2 debug.
    :param seed: of all random generators.
    :param device: ``"auto"``, ``"cpu"``, ``"cuda"``...
    :raises ValueError: an argument that does not fit, named, before anything is computed.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": TwinCriticPolicy,
        "CnnPolicy": TwinCriticCnnPolicy,
        "MultiInputPolicy": TwinCriticMultiInputPolicy,
    }
    policy: Any
    policy_class: Any
    rollout_buffer: AnnotatedRollout
    controller: KLController
    preset_normalize: bool = False

    @with_presets
    def __init__(
        self,
        policy: str | type[BasePolicy] = "auto",
        env: GymEnv | gym.vector.VectorEnv[Any, Any, Any] | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        huber_delta: float | None = 1.0,
        critic_tau: float = 1.0,
        kl_controller: str | type[KLController] = "safe",
        kl_controller_kwargs: dict[str, Any] | None = None,
        kl_reference: Reference | Literal["auto"] = "auto",
        kl_estimator: Estimator | Literal["auto"] = "auto",
        max_preview_kl: float | Literal["auto"] | None = "auto",
        critic_warmup: int = 0,
        n_envs: int = 1,
        env_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        environments.check_places(policy, env, (*self.policy_aliases, "LanguagePolicy"))
        advertised: dict[str, Any] = {}
        if isinstance(env, str):
            env = environments.make(env, n_envs, env_kwargs)
        elif env is not None and (env_kwargs is not None or n_envs != 1):
            raise ValueError(environments.ONLY_FOR_IDS)
        if env is not None:
            env = self._wrap_env(env, verbose)
            if self.preset_normalize:
                env = VecNormalize(env, gamma=gamma)
            if policy == "auto":
                policy = environments.fitting_policy(env)
            if isinstance(policy, str):
                environments.check_policy(env, policy)
            advertised = environments.advertised_policy_kwargs(env, policy)
            policy_kwargs = environments.joined_policy_kwargs(advertised, policy_kwargs)
        super().__init__(
            policy,  # type: ignore[arg-type]
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            seed=seed,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        self._advertised = advertised
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.huber_delta = huber_delta
        self.critic_tau = critic_tau
        self.kl_controller = kl_controller
        self.kl_controller_kwargs: Any = kl_controller_kwargs
        self.kl_reference: Any = kl_reference
        self.kl_estimator: Any = kl_estimator
        self.max_preview_kl: Any = max_preview_kl
        self.critic_warmup = critic_warmup
        self._controller_made_of: list[Any] = []
        self._controller_made_for = 0
        self.n_trained_rollouts: Any = None
        self.n_skipped_steps = 0
        self.measured_kl = 0.0
        self._finished_returns: list[float] = []
        if _init_setup_model:
            self._setup_model()

    # -- set-up ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """SB3's wrapping, and gymnasium's own vector environments besides."""
        return OnPolicyAlgorithm._wrap_env(environments.wrap_native(env), verbose, monitor_wrapper)

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name == "LanguagePolicy":
            # Imported on demand: transformers takes seconds, and control tasks have no use for it.
            from sb3_safe.language import LanguagePolicy

            return LanguagePolicy
        return super()._get_policy_from_name(policy_name)

    def _choose_automatic(self) -> None:
        """Put values where ``"auto"`` or ``None`` was given, to the constructor or to load()."""
        self.kl_controller_kwargs = self.kl_controller_kwargs or {}
        if self.kl_reference == "auto":
            self.kl_reference = getattr(self.policy_class, "kl_reference", "rollout")
        if self.kl_reference not in ESTIMATORS:
            raise ValueError(f"kl_reference must be 'initial', 'rollout' or 'auto', got {self.kl_reference!r}")
        if self.kl_estimator == "auto":
            self.kl_estimator = ESTIMATORS[self.kl_reference][0]
        if self.max_preview_kl == "auto":
            self.max_preview_kl = MAX_PREVIEW_KL[self.kl_reference]
        if self.rollout_buffer_class is None:
            own = getattr(self.policy_class, "rollout_buffer_class", None)
            self.rollout_buffer_class = own or buffer_class_for(self.observation_space)

    def _set_up_controller(self) -> None:
        """Make the controller. A loaded one stays, unless load() asked for another, or for rollouts of another size."""
        # A class by its name: a file has what this list has in it in the form that it has the arguments in themselves.
        name = getattr(self.kl_controller, "__qualname__", self.kl_controller)
        made_of, n_actions = [name, self.kl_controller_kwargs, self.kl_reference], self.n_steps * self.n_envs
        if made_of != self._controller_made_of:
            defaults = controller_defaults(self.kl_reference, n_actions)
            self.controller = make_controller(self.kl_controller, defaults, **self.kl_controller_kwargs)
        elif n_actions != self._controller_made_for and "tau_base" not in self.kl_controller_kwargs:
            self.controller.resize(self.kl_reference, n_actions)
        self._controller_made_of, self._controller_made_for = made_of, n_actions

    def _setup_model(self) -> None:
        self._choose_automatic()
        self._check_arguments()
        if self.n_trained_rollouts is None:  # new, or of a file that has their epochs only: one each, or more
            self.n_trained_rollouts = self._n_updates
        self._set_up_controller()
        self.policy_class.check_algorithm(self)
        super()._setup_model()
        if self.seed is not None and self.num_timesteps > 0:  # from a file: not the random numbers that it began with
            self.set_random_seed((self.seed + self.num_timesteps) % 2**32)
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        # Before load() fills in parameters, so that the saved reference and target critics find their place.
        if self.controller.active and self.kl_reference == "initial":
            self.policy.freeze_reference()
        if self.critic_tau < 1:
            self.policy.make_target_critics()

    def _maybe_recommend_cpu(self, mlp_class_name: str = TwinCriticPolicy.__name__) -> None:
        super()._maybe_recommend_cpu(mlp_class_name)

    def _check_arguments(self) -> None:
        """Everything that can be known to be wrong before any compute is spent.

        Called from ``_setup_model``, because ``load()`` sets attributes after the constructor.
        """
        vars(self).update(arguments.checked(vars(self), arguments.CONSTRUCTOR))
        arguments.checked(self.policy_kwargs, arguments.POLICY)
        environments.check_spaces(self.observation_space, self.action_space)
        check_policy_class(self.policy_class, self.policy_aliases)
        check_buffer_class(self.rollout_buffer_class)
        if self.normalize_advantage and self.n_steps * self.n_envs < 2:
            raise ValueError(
                f"n_steps * n_envs must be at least 2 to normalise advantages, got n_steps={self.n_steps}, "
                f"n_envs={self.n_envs}; raise n_steps"
            )
        if self.normalize_advantage and self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 to normalise advantages, got {self.batch_size}")
        if self.kl_estimator not in ESTIMATORS[self.kl_reference]:
            raise ValueError(
                f"kl_estimator={self.kl_estimator!r} has the wrong gradient for kl_reference={self.kl_reference!r}; "
                f"choose one of {ESTIMATORS[self.kl_reference]}"
            )

    # -- learning --------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int | None = None,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "SAFE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Collect rollouts and train on them.

        :param total_timesteps: a lower bound on the number of actions; ``None``: the environment's recommended
            budget (its preset's, else that of all presets).
        :param callback: called at every step; a function ends training by ``False``.
        :param log_interval: rollouts between two log lines; ``None``: no log.
        :param tb_log_name: name of the run in TensorBoard.
        :param reset_num_timesteps: whether to count from 0 (else training goes on).
        :param progress_bar: shows one (needs the extra ``progress``).
        :raises ValueError: ``total_timesteps`` or ``log_interval`` does not fit, or there is no environment.
        :raises NonFiniteError: a reward, loss or gradient is NaN or infinite. What was learned up to then is in the
            model, and saved at the path that a note to the error names; so it is when an environment, a reward
            function or a callback raises anything else.
        """
        if self.env is None:
            raise ValueError("there is no environment to learn in: load(path, env=...), or set_env(env)")
        if total_timesteps is None:
            total_timesteps = self._recommended_timesteps()
        given = {"total_timesteps": total_timesteps, "log_interval": log_interval}
        given = arguments.checked(given, arguments.LEARN)
        total_timesteps, log_interval = given["total_timesteps"], given["log_interval"]
        with self._rescuing():
            return super().learn(
                total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
            )

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if not isinstance(callback, BaseCallback | list):
            callback = FunctionCallback(callback)
        if progress_bar:  # one that shows more than SB3's
            callback = [*(callback if isinstance(callback, list) else [callback]), ProgressCallback()]
        return super()._init_callback(callback)

    def _recommended_timesteps(self) -> int:
        spec = None if self.env is None else environments.attribute(self.env, "spec")
        return int((preset("") if spec is None else preset(spec.id, spec.kwargs))["n_timesteps"])

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """SB3's rollout; then the controller is told what it showed."""

        def ended() -> np.ndarray | None:  # not a method: copies of a policy that holds it would copy all of this
            return self._last_episode_starts if self.rollout_buffer.awaits_last_values else None

        self._finished_returns = []
        self._last_good = LastGood(self)
        try:
            with self.policy.collecting(ended):
                if not super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps):
                    return False
        except (RuntimeError, ValueError):  # torch refuses to draw from a distribution that is not finite
            check_observations(self._last_obs, self.num_timesteps)
            raise
        check_rollout(self.rollout_buffer, self.num_timesteps)
        self._observe_rollout()
        return True

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        # A wrapper may keep from training what a Monitor has seen: one infinite return would stay in every average.
        returns = (float(info["episode"]["r"]) for info in infos if "episode" in info)
        self._finished_returns += [value for value in returns if abs(value) <= LARGEST_RETURN]

    @th.no_grad()
    def _observe_rollout(self) -> None:
        """What the loss and the controller need to know of a finished rollout, once."""
        buffer, policy, controller = self.rollout_buffer, self.policy, self.controller
        needs_reference = controller.active and self.kl_reference == "initial"
        if policy.rollout_is_approximate or needs_reference or self.clip_range_vf is not None:
            written = buffer.log_probs
            buffer.annotate(functools.partial(self._annotations, needs_reference), self.batch_size)
            if policy.rollout_is_approximate:
                self.logger.record("safe/rollout_mismatch", float(np.abs(buffer.log_probs - written).mean()))
        if needs_reference:
            log_ratio = buffer.flat("log_probs") - buffer.annotations["reference_log_prob"]
            self.measured_kl = functional.k1(log_ratio).mean().item()
            # Densities have no limit.
            if controller.max_drift is not None and not isinstance(self.action_space, spaces.Box):
                lost = log_ratio > controller.max_drift
                share = lost.float().mean().item()
                if share > 0:
                    buffer.annotations["lost"] = lost
                self.logger.record("safe/lost", share)
        if controller.active:
            # The mean of -log pi over the actions taken estimates the entropy, without another forward pass.
            dimensions = max(1, buffer.action_dim)
            controller.update(self._finished_returns, self.measured_kl, float(-buffer.log_probs.mean()) / dimensions)
            for name, value in controller.metrics().items():
                self.logger.record(f"safe/{name}", value)
            self.logger.record("safe/kl", self.measured_kl)
        if needs_reference and self.kl_estimator == "k1":
            price = controller.reward_coefficient() / self._reward_unit()
            buffer.subtract_from_rewards(price * log_ratio.cpu().numpy())
        spread = float(buffer.returns.std())
        if self._n_updates > 0:
            spread = RETURN_SCALE_DECAY * float(policy.return_scale) + (1 - RETURN_SCALE_DECAY) * spread
        policy.return_scale.fill_(max(spread, 1e-6))

    def _reward_unit(self) -> float:
        """What a ``VecNormalize`` has divided the rewards by; the controller knows them, and prices, without it."""
        normalizer = self._vec_normalize_env
        if normalizer is None or not normalizer.norm_reward:
            return 1.0
        return float(np.sqrt(normalizer.ret_rms.var + normalizer.epsilon))

    def _annotations(self, needs_reference: bool, batch: SafeSamples) -> dict[str, Tensor]:
        """What the loss will compare with, computed as it computes; see :meth:`AnnotatedRollout.annotate`."""
        annotations, policy = {}, self.policy
        if policy.rollout_is_approximate or self.clip_range_vf is not None:
            evaluation = policy.evaluate(batch.observations, batch.actions)
            if policy.rollout_is_approximate:
                annotations["log_probs"] = evaluation.log_prob
            if self.clip_range_vf is not None:
                annotations["old_critic_values"] = evaluation.values
        if needs_reference:
            annotations["reference_log_prob"] = policy.reference_log_prob(batch.observations, batch.actions)
        return annotations

    def train(self) -> None:
        """One update: ``n_epochs`` passes over the rollout."""
        policy = self.policy
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        self._objective = self._make_objective()
        bound = TrustBound(policy, self.max_preview_kl)
        log: list[dict[str, float]] = []
        for epoch, pieces in (
            (i, pieces) for i in range(self.n_epochs) for pieces in self.rollout_buffer.minibatches(self.batch_size)
        ):
            log.append(self._gradient(pieces) | {"epoch": epoch, "actions": sum(len(p.actions) for p in pieces)})
            if self.target_kl is not None and log[-1]["approx_kl"] > 1.5 * self.target_kl:
                break
            taken = math.isfinite(log[-1]["loss"]) and self._step(bound.step_scale(log))
            log[-1]["skipped"] = float(not taken)
        n_skipped = sum(parts.get("skipped", 0.0) for parts in log)
        self.n_skipped_steps += round(n_skipped)
        if n_skipped > len(log) / 2:
            bound.undo()
            raise NonFiniteError(describe_steps(log, self.num_timesteps))
        means = {name: mean_of_finite(parts.get(name, 0.0) for parts in log) for name in log[0]}
        self._n_updates += epoch + 1
        self.n_trained_rollouts += 1
        kept = bound.keep(log, functools.partial(self.rollout_buffer.in_order, self.batch_size))
        if self.kl_reference == "rollout":
            last_epoch = [parts["approx_kl"] for parts in log if parts["epoch"] == epoch]
            # What is left of nothing is 0, though nothing in the last epoch may have been finite.
            self.measured_kl = mean_of_finite(last_epoch) * kept**2 if kept > 0 else 0.0
        self._log_update(means, kept)

    def _make_objective(self) -> Objective:
        """What the coming update minimises."""
        progress = self._current_progress_remaining
        return Objective(
            clip_range=self.clip_range(progress),  # type: ignore[operator]
            normalize_advantage=self.normalize_advantage,
            vf_coef=self.vf_coef,
            huber_delta=None if self.huber_delta is None else self.huber_delta * self._critic_rms(),
            clip_range_vf=None if self.clip_range_vf is None else self.clip_range_vf(progress),  # type: ignore[operator]
            ent_coef=self.ent_coef,
            kl_estimator=self.kl_estimator,
            kl_coefficient=self.controller.coefficient,
            trains_policy=self.n_trained_rollouts >= self.critic_warmup,
        )

    def _critic_rms(self) -> float:
        """Root mean square of the critic's error on the rollout, in units of the return.

        An outlier is judged against typical errors of the critic. Against the spread of the returns, every state would
        be one as soon as all returns shift, and the loss linear everywhere.
        """
        error = self.rollout_buffer.returns - self.rollout_buffer.values
        return max(float(np.sqrt(np.mean(np.square(error)))), 1e-6)

    def _gradient(self, pieces: list[SafeSamples]) -> dict[str, float]:
        """The gradient of a minibatch, added up over the pieces that it is computed in.

        :return: means over all its actions, for the log.
        """
        self.policy.optimizer.zero_grad()
        needs_kl = self.controller.active and self.kl_estimator != "k1" and self._objective.trains_policy
        kl = self._measure_kl(pieces) if needs_kl and len(pieces) > 1 else None
        own_loss = any(getattr(getattr(self, name), "__func__", None) is not getattr(SAFE, name) for name in LOSS)
        if len(pieces) == 1 and not own_loss and pieces[0].lost is None:
            fast: dict[str, float] | None = self.policy.fast_gradient(pieces[0], self._objective)
            if fast is not None:
                return fast
        sizes = [len(piece.actions) for piece in pieces]
        advantages = th.cat([piece.advantages for piece in pieces])
        if self.normalize_advantage:
            advantages = functional.normalize(advantages)
        means: dict[str, float] = defaultdict(float)
        for piece, size, normalized in zip(pieces, sizes, th.split(advantages, sizes), strict=True):
            loss, parts = self._loss(piece._replace(advantages=normalized), kl)
            share = size / len(advantages)
            for name, value in parts.items():
                means[name] += share * value
            if not math.isfinite(parts["loss"]):
                break  # the step will not be taken
            loss.backward(loss.new_tensor(share))  # type: ignore[no-untyped-call]
        return means

    def _loss(self, batch: SafeSamples, kl: float | None = None) -> tuple[Tensor, dict[str, float]]:
        """The loss of a minibatch ``[]``, and means over its actions for the log.

        :param kl: of the minibatch that this is a piece of; ``None``: it is whole.
        """
        aim, policy = self._objective, self.policy
        evaluation: Evaluation = policy.evaluate(batch.observations, batch.actions)
        values, log_prob, entropy, _ = evaluation
        if entropy is None:  # no closed form: the log-probability of the actions taken stands in, as in SB3
            entropy = -log_prob
        log_ratio = log_prob - batch.old_log_prob
        surrogate = functional.clipped_surrogate(log_ratio, batch.advantages, aim.clip_range)
        old_values = batch.old_critic_values
        error = functional.critic_error(values, batch.returns, aim.huber_delta, old_values, aim.clip_range_vf)
        with th.no_grad():
            statistics = {
                "policy_gradient_loss": surrogate,
                "value_loss": error,
                "entropy_loss": -entropy,
                "approx_kl": functional.k3(log_ratio),
                "clip_fraction": th.expm1(log_ratio).abs() > aim.clip_range,
                "critic_gap": values.amax(dim=-1) - values.amin(dim=-1),
                "kl": self._kl(batch, log_prob),
            }
            means = th.stack([value.to(surrogate.dtype) for value in statistics.values()]).mean(dim=1).tolist()
        parts = dict(zip(statistics, means, strict=True))
        # Everything is a mean over actions, so it is added up per action and reduced once.
        loss = aim.vf_coef * error
        if aim.trains_policy:
            loss = surrogate + loss
            if aim.ent_coef != 0:
                loss = loss - aim.ent_coef * entropy
            # k1 is in the reward already.
            coefficient = 0.0 if aim.kl_estimator == "k1" else aim.kl_coefficient(parts["kl"] if kl is None else kl)
            if coefficient > 0:
                loss = loss + coefficient * self._kl_term(batch, evaluation, log_ratio)
            if batch.lost is not None and batch.lost.any():  # where the policy is certain, nothing above has a gradient
                lost = th.nonzero(batch.lost).view(-1)
                log_others = policy.log_others(batch.observations, batch.actions, evaluation, lost)
                loss = loss.index_add(0, lost, functional.unlikelihood(log_others), alpha=self.controller.coef)
        total = loss.mean()
        parts["loss"] = total.item()
        return total, parts

    def _kl(self, batch: SafeSamples, log_prob: Tensor) -> Tensor:
        """Per action ``[B]``, the KL that the controller goes by, nats."""
        if batch.reference_log_prob is None:
            return functional.k3(log_prob - batch.old_log_prob)
        return log_prob - batch.reference_log_prob

    @th.no_grad()
    def _measure_kl(self, pieces: list[SafeSamples]) -> float:
        """The mean of that over a minibatch, which no piece of it knows."""
        kls = [self._kl(piece, self.policy.evaluate(piece.observations, piece.actions).log_prob) for piece in pieces]
        return th.cat(kls).mean().item()

    def _kl_term(self, batch: SafeSamples, evaluation: Evaluation, log_ratio: Tensor) -> Tensor:
        """KL to the reference per action ``[B]``, by the estimator whose gradient is right for it."""
        if batch.reference_log_prob is None:
            return functional.k3(log_ratio)
        if self.kl_estimator == "exact":
            return self.policy.exact_kl(batch.observations, evaluation.latents)  # type: ignore[no-any-return]
        drift = evaluation.log_prob - batch.reference_log_prob
        return functional.weighted_k3(drift, log_ratio) if self.kl_estimator == "k3" else functional.k2(drift)

    def _step(self, scale: float) -> bool:
        """A step along the gradient, ``scale`` times as long as it would be; not taken where that is not finite."""
        optimizer = self.policy.optimizer
        limits: list[tuple[list[Tensor], float]] = [([], self.max_grad_norm)]
        for group in optimizer.param_groups:
            if "max_grad_norm" in group:  # a group may have a limit of its own; the others share one
                limits.append((group["params"], group["max_grad_norm"]))
            else:
                limits[0][0].extend(group["params"])
        norms = [th.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]) for params, _ in limits]
        if not all(math.isfinite(norm.item()) for norm in norms):
            return False
        for (params, limit), norm in zip(limits, norms, strict=True):
            if norm.item() > limit:
                th.nn.utils.clip_grads_with_norm_(params, limit, norm)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= scale
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.critic_tau < 1:
            self.policy.update_target_critics(self.critic_tau)
        return True

    # -- log and files ---------------------------------------------------------------------------------------------

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may go beyond the budget. Otherwise progress turns negative, and with it a linear schedule's
        # learning rate.
        self._current_progress_remaining = max(0.0, self._current_progress_remaining)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        # SB3 writes one rate into every group; a group may ask for a multiple of it.
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            for group in optimizer.param_groups:
                group["lr"] *= group.get("rate_factor", 1.0)

    def _log_update(self, means: dict[str, float], kept: float) -> None:
        """SB3's names for what SB3 logs; all means are over the whole update."""
        buffer, policy, record = self.rollout_buffer, self.policy, self.logger.record
        for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction", "loss"):
            record(f"train/{name}", means[name])
        record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        record("train/clip_range", self._objective.clip_range)
        if self._objective.clip_range_vf is not None:
            record("train/clip_range_vf", self._objective.clip_range_vf)
        if hasattr(policy, "log_std"):
            record("train/std", th.exp(policy.log_std).mean().item())
        record("safe/critic_gap", means["critic_gap"])
        record("safe/update_kept", kept)
        record("safe/skipped_steps", self.n_skipped_steps)

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """See ``BaseAlgorithm.set_parameters``. Target critics are kept where ``critic_tau`` moves them."""
        super().set_parameters(load_path_or_dict, exact_match, device)
        if self.critic_tau == 1:
            self.policy.drop_target_critics()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_finished_returns", "_last_good", "_objective"]
