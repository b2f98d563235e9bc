"""Stopping where something is not finite, with what and where, before it spoils what was learned."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from sb3_safe.buffers import AnnotatedRollout


class NonFiniteError(FloatingPointError):
    """A reward, loss or gradient is NaN or infinite. The model holds its last good parameters."""


class LastGood:
    """Snapshot of state, other than parameters, that NaN or infinity could corrupt before it is detected.

    The scale of returns, statistics that a features extractor or a ``VecNormalize`` keeps, the
    controller's averages: a single infinite reward would stay in them for good.

    :param algorithm: a :class:`~sb3_safe.safe.SAFE`, before a rollout.
    """

    def __init__(self, algorithm: Any) -> None:
        policy, normalizer = algorithm.policy, algorithm.get_vec_normalize_env()
        self._tensors = [(tensor, tensor.clone()) for tensor in policy.buffers()]
        holders = [algorithm.controller]
        if normalizer is not None:
            observed = getattr(normalizer, "obs_rms", {})
            holders += [normalizer.ret_rms, *(observed.values() if isinstance(observed, dict) else [observed])]
        self._values = [
            (holder, {name: copy.copy(value) for name, value in vars(holder).items()}) for holder in holders
        ]

    def restore(self) -> None:
        """Put everything back."""
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for holder, values in self._values:
            vars(holder).update(values)


def check_observations(observations: np.ndarray | Mapping[str, np.ndarray] | None, timesteps: int) -> None:
    """Name the observation that made a distribution refuse its parameters.

    :param observations: ``[N, ...]``, those the policy saw last, by key where there are several.
    :param timesteps: so far, for the message.
    :raises NonFiniteError: one of them is NaN or infinite.
    """
    last: Any = observations if isinstance(observations, Mapping) else {"": observations}
    for key, array in last.items():
        for index in np.argwhere(~np.isfinite(array))[:1]:
            raise NonFiniteError(
                f"observation {key and key + ' '}of environment {index[0]} is {array[tuple(index)]} after {timesteps} "
                "steps; check the environment"
            )


def check_rollout(buffer: AnnotatedRollout, timesteps: int) -> None:
    """Name the first value or reward of a rollout that is not finite.

    :param buffer: with ``values`` and ``rewards`` ``[T, N]``.
    :param timesteps: so far, for the message.
    :raises NonFiniteError: there is one.
    """
    # What a network made of an observation comes first: its action may have spoilt the reward.
    for name, cause in {"values": "observations", "rewards": "the reward function"}.items():
        array = getattr(buffer, name)
        bad = np.argwhere(~np.isfinite(array))
        if len(bad) > 0:
            step, env = bad[0]
            raise NonFiniteError(
                f"{name[:-1]} of environment {env} at step {step} of the rollout is {array[step, env]} ({len(bad)} "
                f"such {name}, after {timesteps} steps in all); check {cause}"
            )


def mean_of_finite(values: Iterable[float]) -> float:
    """Mean of those values that are neither NaN nor infinite; NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def describe_steps(log: Sequence[Mapping[str, float]], timesteps: int) -> str:
    """Say how much of an update could not be done, and what the loss consisted of where it first could not.

    :param log: of every minibatch, means by name and whether its step was ``skipped``.
    :param timesteps: so far.
    """
    skipped = [number for number, parts in enumerate(log) if parts.get("skipped")]
    parts = log[skipped[0]]
    what = "gradient" if math.isfinite(parts["loss"]) else "loss"
    about = ("epoch", "actions", "skipped")
    values = ", ".join(f"{name} {value:.4g}" for name, value in parts.items() if name not in about)
    return (
        f"loss or gradient is not finite in {len(skipped)} of {len(log)} minibatches of the update after {timesteps} "
        f"steps; first the {what} of minibatch {skipped[0]}: {values}. The update is undone. Lower learning_rate, or "
        "check observations and rewards for outliers"
    )
