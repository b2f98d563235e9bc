"""The loss of a minibatch and its slopes in closed form, for the fast path of :mod:`sb3_safe.fast_mlp`.

On the CPU, recording and differentiating a graph of sixty operations on a few numbers each takes longer than the
networks that it is about. The terms, and the names of their means, are those of :mod:`sb3_safe.functional` and of
``SAFE._loss``.

Shapes: ``B`` actions, ``K`` critics.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sb3_safe.buffers import SafeSamples
from sb3_safe.functional import MAX_LOG_RATIO

Array = NDArray[np.float32]


class Slopes(NamedTuple):
    """Derivatives of the loss by what a policy computes of the actions."""

    values: Array
    """``[K, B]``"""
    log_prob: Array
    """``[B]``"""
    entropy: Array | None
    """``[B]``; ``None``: zero."""


class Objective(NamedTuple):
    """What an update minimises: a mean over actions."""

    clip_range: float
    normalize_advantage: bool
    vf_coef: float
    huber_delta: float | None
    """Units of the return; ``None``: squared error."""
    clip_range_vf: float | None
    """Units of the return; ``None``: no clipping."""
    ent_coef: float
    kl_estimator: str
    """``"k2"``, ``"k3"``, or ``"k1"``, which is in the reward."""
    kl_coefficient: Callable[[float], float]
    """Of the KL term, from the KL to the reference measured in the minibatch, nats per action."""
    trains_policy: bool
    """``False``: the error of the critics is the whole loss."""

    def slopes(
        self, samples: SafeSamples, values: Array, log_prob: Array, entropy: Array
    ) -> tuple[dict[str, float], Slopes]:
        """Means over the actions for the log, and the slopes of their ``loss``.

        :param samples: a whole minibatch, on the CPU.
        :param values: ``[K, B]``
        :param log_prob: ``[B]``
        :param entropy: ``[B]``
        """
        size = len(log_prob)
        log_ratio = log_prob - samples.old_log_prob.numpy()
        clamped = np.minimum(log_ratio, MAX_LOG_RATIO)
        change = np.expm1(clamped)
        ratio = change + 1
        not_clamped = log_ratio <= MAX_LOG_RATIO  # the others have no slope
        advantages = self._advantages(samples.advantages.numpy())
        gain = advantages * ratio
        clipped_gain = advantages * np.minimum(np.maximum(ratio, 1 - self.clip_range), 1 + self.clip_range)
        error, error_slope = self._critic_error(samples, values)
        update_kl = change - clamped
        reference = samples.reference_log_prob
        drift = None if reference is None else log_prob - reference.numpy()
        terms = {
            "policy_gradient_loss": -np.minimum(gain, clipped_gain),
            "value_loss": error,
            "entropy_loss": -entropy,
            "approx_kl": update_kl,
            "clip_fraction": np.abs(change) > self.clip_range,
            "critic_gap": np.maximum.reduce(values) - np.minimum.reduce(values),
            "kl": update_kl if drift is None else drift,
        }
        means = {name: float(np.add.reduce(term)) / size for name, term in terms.items()}
        means["loss"] = self.vf_coef * means["value_loss"]
        error_slope *= self.vf_coef / (size * len(values))
        if not self.trains_policy:
            return means, Slopes(error_slope, np.zeros_like(log_prob), None)
        means["loss"] += means["policy_gradient_loss"] + self.ent_coef * means["entropy_loss"]
        slope = -gain * ((gain <= clipped_gain) & not_clamped)
        coefficient = 0.0 if self.kl_estimator == "k1" else self.kl_coefficient(means["kl"])
        if coefficient > 0:
            if drift is None:
                penalty, penalty_slope = update_kl, change * not_clamped
            else:
                penalty, penalty_slope = self._penalty(drift, ratio, not_clamped)
            means["loss"] += coefficient * float(np.add.reduce(penalty)) / size
            slope += coefficient * penalty_slope
        entropy_slope = None if self.ent_coef == 0 else np.full(size, -self.ent_coef / size, np.float32)
        return means, Slopes(error_slope, slope / size, entropy_slope)

    def _advantages(self, advantages: Array) -> Array:
        size = len(advantages)
        if not self.normalize_advantage or size < 2:
            return advantages
        centred = advantages - np.add.reduce(advantages) / size
        return centred / (np.sqrt(np.dot(centred, centred) / (size - 1)) + 1e-8)  # type: ignore[no-any-return]

    def _critic_error(self, samples: SafeSamples, values: Array) -> tuple[Array, Array]:
        """Mean over the critics ``[B]``, and the slope of the error of each ``[K, B]``."""
        returns = samples.returns.numpy()
        if self.clip_range_vf is None or samples.old_critic_values is None:
            error, slope = self._regression(values - returns)
        else:
            old = samples.old_critic_values.numpy().T
            change = values - old
            within = np.minimum(np.maximum(change, -self.clip_range_vf), self.clip_range_vf)
            error, slope = self._regression(old + within - returns)
            slope = slope * (np.abs(change) <= self.clip_range_vf)
        return np.add.reduce(error) / len(values), slope

    def _regression(self, difference: Array) -> tuple[Array, Array]:
        if self.huber_delta is None:
            return difference * difference, 2 * difference
        within = np.minimum(np.maximum(difference, -self.huber_delta), self.huber_delta)
        return within * (2 * difference - within), 2 * within

    def _penalty(self, drift: Array, ratio: Array, not_clamped: NDArray[np.bool_]) -> tuple[Array, Array]:
        """KL to the initial policy ``[B]``, and its slope."""
        if self.kl_estimator == "k2":
            return 0.5 * drift * drift, drift
        clamped = np.minimum(-drift, MAX_LOG_RATIO)
        change = np.expm1(clamped)
        kl = change - clamped
        return ratio * kl, ratio * (kl * not_clamped - change * (-drift <= MAX_LOG_RATIO))
