"""Rollout buffers that yield what SAFE's loss needs besides PPO's six fields.

SB3's storage and arithmetic; minibatches come as slices of one shuffled copy an epoch, which is both simpler and
faster than indexing six NumPy arrays a minibatch.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import TensorDict
from torch import Tensor


class SafeSamples(NamedTuple):
    """A minibatch of B actions, or a piece of one: SB3's ``RolloutBufferSamples`` and four fields more."""

    observations: Tensor | TensorDict
    actions: Tensor
    """``[B, ...]``"""
    old_values: Tensor
    """``[B]``, the soft-min values that the advantages were made of."""
    old_log_prob: Tensor
    """``[B]``, nats, under the policy that collected the rollout."""
    advantages: Tensor
    """``[B]``"""
    returns: Tensor
    """``[B]``"""
    reference_log_prob: Tensor | None = None
    """``[B]``, nats, where annotated."""
    old_critic_values: Tensor | None = None
    """``[B, K]``, where annotated."""
    lost: Tensor | None = None
    """``[B]``, which actions drifted beyond ``max_drift``; ``None``: none of the rollout did."""
    flat_index: Tensor | None = None
    """``[B]``, where in the flat order of the rollout each action is."""


class AnnotatedRollout(RolloutBuffer):
    """What every SAFE buffer adds to SB3's: annotations per action, and returns that can be computed anew."""

    _last_values: Tensor
    _last_dones: np.ndarray
    _has_returns: bool

    def reset(self) -> None:
        """Forget the rollout."""
        super().reset()
        self._has_returns = False
        self.annotations: dict[str, Tensor] = {}
        self._flat: dict[str, Tensor] = {}

    @th.no_grad()
    def annotate(self, function: Callable[[SafeSamples], Mapping[str, Tensor]], batch_size: int) -> None:
        """Attach values to every action of the rollout.

        :param function: gives ``reference_log_prob`` ``[B]`` or ``old_critic_values`` ``[B, K]`` of some samples, or
            replaces ``log_probs`` ``[B]`` by what training computes.
        :param batch_size: as for :meth:`get`.
        """
        pieces = list(self.in_order(batch_size))
        order = th.argsort(th.cat([piece.flat_index for piece in pieces]))  # type: ignore[misc]
        parts = [function(piece) for piece in pieces]
        self.annotations |= {name: th.cat([part[name] for part in parts])[order] for name in parts[0]}
        if "log_probs" in self.annotations:
            self.log_probs = self.unflatten(self.annotations.pop("log_probs").cpu().numpy())
            self._flat = {}

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """GAE, as SB3's; remembers its arguments for :meth:`subtract_from_rewards`."""
        self._last_values, self._last_dones = last_values, dones
        super().compute_returns_and_advantage(last_values, dones)
        self._has_returns = True

    @property
    def awaits_last_values(self) -> bool:
        """Whether every step is there, and what is missing are the values after the last one."""
        return self.full and not self._has_returns

    def subtract_from_rewards(self, penalties: np.ndarray) -> None:
        """Take a penalty off the reward of each action, and compute returns and advantages again.

        :param penalties: ``[T * N]``, in flat order, units of reward.
        """
        self.rewards -= self.unflatten(penalties)
        self.compute_returns_and_advantage(self._last_values, self._last_dones)
        self._flat = {}

    def unflatten(self, flat: np.ndarray) -> np.ndarray:
        """From the flat order ``[T * N]`` (environment by environment) to storage order ``[T, N]``."""
        return flat.reshape(self.n_envs, self.buffer_size).swapaxes(0, 1)

    def flat(self, name: str) -> Tensor:
        """One of the stored arrays ``[T, N]`` in flat order ``[T * N]``, on the device."""
        return self.to_torch(self.swap_and_flatten(self.__dict__[name])).flatten()

    def in_order(self, batch_size: int) -> Iterator[SafeSamples]:
        """Everything once, in the pieces that training computes at a time, in an order that is always the same."""
        yield from self._batches(None, batch_size)

    def minibatches(self, batch_size: int) -> Iterator[list[SafeSamples]]:
        """Minibatches in random order, each as the pieces that are computed one after the other; here one piece."""
        for samples in self.get(batch_size):
            yield [samples]

    def get(self, batch_size: int | None = None) -> Generator[SafeSamples, None, None]:  # type: ignore[override]
        """Minibatches in random order; the permutation is the one that SB3 would draw.

        :param batch_size: actions per minibatch; ``None`` for all.
        """
        assert self.full, "the rollout is not complete"
        total = self.buffer_size * self.n_envs
        permutation = th.as_tensor(np.random.permutation(total), device=self.device)
        yield from self._batches(permutation, batch_size or total)

    def _flat_tensors(self) -> dict[str, Tensor]:
        """Every stored array as one tensor ``[T * N, ...]`` on the device; made once a rollout."""
        if not self._flat:
            names = ("actions", "values", "log_probs", "advantages", "returns")
            arrays = {name: self.swap_and_flatten(self.__dict__[name]) for name in names}
            # Casting to float32 is SB3's convention; MultiBinary's int8 would break distributions.
            arrays["actions"] = arrays["actions"].astype(np.float32, copy=False)
            self._flat = {name: self.to_torch(array) for name, array in arrays.items()}
            for name in names[1:]:
                self._flat[name] = self._flat[name].flatten()
            self._flat |= self._flat_observations()
        return self._flat | self.annotations

    def _flat_observations(self) -> dict[str, Tensor]:
        return {"obs": self.to_torch(self.swap_and_flatten(self.observations))}

    def _join_observations(self, batch: dict[str, Tensor]) -> Tensor | TensorDict:
        return batch["obs"]

    def _batches(self, permutation: Tensor | None, batch_size: int) -> Generator[SafeSamples, None, None]:
        total = self.buffer_size * self.n_envs
        flat = self._flat_tensors()
        index = th.arange(total, device=self.device) if permutation is None else permutation
        shuffled = flat if permutation is None else {name: tensor[permutation] for name, tensor in flat.items()}
        for start in range(0, total, batch_size):
            batch = {name: tensor[start : start + batch_size] for name, tensor in shuffled.items()}
            yield SafeSamples(
                self._join_observations(batch),
                batch["actions"],
                batch["values"],
                batch["log_probs"],
                batch["advantages"],
                batch["returns"],
                batch.get("reference_log_prob"),
                batch.get("old_critic_values"),
                batch.get("lost"),
                index[start : start + batch_size],
            )


class SafeRolloutBuffer(AnnotatedRollout):
    """Buffer for array observations."""


class SafeDictRolloutBuffer(AnnotatedRollout, DictRolloutBuffer):  # type: ignore[misc]
    """Buffer for Dict observations."""

    def _flat_observations(self) -> dict[str, Tensor]:
        return {f"obs.{key}": self.to_torch(self.swap_and_flatten(array)) for key, array in self.observations.items()}

    def _join_observations(self, batch: dict[str, Tensor]) -> TensorDict:
        return {key.removeprefix("obs."): value for key, value in batch.items() if key.startswith("obs.")}


def buffer_class_for(observation_space: Any) -> type[AnnotatedRollout]:
    """The buffer for an observation space."""
    return SafeDictRolloutBuffer if isinstance(observation_space, spaces.Dict) else SafeRolloutBuffer


def check_buffer_class(kind: Any) -> None:
    """Refuse what is not a class of buffers that training can read.

    :param kind: what was given.
    :raises ValueError: with what to derive from instead.
    """
    if not (isinstance(kind, type) and issubclass(kind, AnnotatedRollout)):
        raise ValueError(
            f"rollout_buffer_class={getattr(kind, '__name__', repr(kind))} is not an AnnotatedRollout: derive it from "
            "a class of sb3_safe.buffers"
        )
