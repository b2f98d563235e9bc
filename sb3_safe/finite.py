"""Stopping where something is not finite, with what and where, before it spoils what was learned."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sb3_safe.buffers import AnnotatedRollout


class NonFiniteError(FloatingPointError):
    """A reward, loss or gradient is NaN or infinite. The model holds its last good parameters."""


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
                f"observation {key} of environment {index[0]} is {array[tuple(index)]} after {timesteps} steps; check "
                "the environment"
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


def describe_loss(parts: Mapping[str, float], epoch: int, number: int, timesteps: int) -> str:
    """Say which part of a loss is not finite, and where it was met.

    :param parts: means over the minibatch, by name.
    :param epoch: of the update.
    :param number: of the minibatch in the update.
    :param timesteps: so far.
    """
    values = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
    return (
        f"loss is not finite in minibatch {number} (epoch {epoch}) of the update after {timesteps} steps: {values}. "
        "Lower learning_rate, or check observations and rewards for outliers"
    )
