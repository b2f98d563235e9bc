"""The promise that no update moves the policy further than a given KL: preview before a step, walk-back after all.

See SAFE, predictive control, https://arxiv.org/abs/2602.04651. The published code never calls its preview, and scales
by ``max / foreseen`` where the KL grows with the square of the step.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import torch as th
from torch import Tensor

from sb3_safe import functional
from sb3_safe.buffers import SafeSamples
from sb3_safe.controller import Reference

# Nats per action. A text has many actions, whose distances add up.
MAX_PREVIEW_KL: dict[Reference, float] = {"initial": 0.02, "rollout": 0.5}
MIN_TELLING = 16
"""Actions of a minibatch. Smaller minibatches (the leftover of an epoch) are too small for their KL to stand for the
rollout's, and a step of theirs may be far longer: the advantage of a single action is not normalised."""


def trained_parameters(policy: Any) -> list[Tensor]:
    """Those that the optimizer of a policy moves.

    :param policy: with its ``optimizer``.
    """
    return [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]


class TrustBound:
    """Keeps as much of one update as stays within a KL to the rollout policy.

    What its methods call ``log`` says of every minibatch of the update so far how many ``actions`` it has, and their KL
    to the rollout policy before its step, ``approx_kl``, nats per action.

    :param policy: before its update.
    :param bound: nats per action; ``None``: everything is kept.
    """

    def __init__(self, policy: Any, bound: float | None) -> None:
        self.policy, self.bound = policy, bound
        # What an update moves: the parameters that are trained, and the target critics that follow them.
        named = chain(policy.named_parameters(), policy.named_buffers())
        targets = (tensor for name, tensor in named if name.startswith("target_"))
        self._moved = [*trained_parameters(policy), *targets]
        self._start = self._copy()

    def step_scale(self, log: Sequence[Mapping[str, float]]) -> float:
        """How much of the coming step to take; see :func:`preview_scale`.

        :param log: with the minibatch at hand.
        """
        if self.bound is None:
            return 1.0
        return preview_scale(log[-1]["approx_kl"], log[-2]["approx_kl"] if len(log) > 1 else 0.0, self.bound)

    def keep(self, log: Sequence[Mapping[str, float]], batches: Callable[[], Iterable[SafeSamples]]) -> float:
        """Undo as much of the update as takes the policy beyond the bound.

        :param log: of the whole update.
        :param batches: gives the whole rollout.
        :return: the share of the update that was kept, 0 to 1; see :func:`walk_back`.
        """
        if self.bound is None:
            return 1.0
        # Measuring the whole rollout takes as long as a third of an epoch: only where the last step could matter.
        telling = min(parts["actions"] for parts in log) >= MIN_TELLING
        if telling and surely_within([parts["approx_kl"] for parts in log], self.bound):
            return 1.0
        return walk_back(self._start, self._copy(), self._place, lambda: self.kl(batches()), self.bound)

    def undo(self) -> None:
        """Back to where the policy was before the update."""
        self._place(self._start)

    @th.no_grad()
    def kl(self, batches: Iterable[SafeSamples]) -> float:
        """KL of the rollout policy to the policy as it is now, estimated by k3.

        :param batches: the whole rollout.
        :return: nats per action; infinity where a parameter is not finite.
        """
        if not all(th.isfinite(parameter).all() for parameter in trained_parameters(self.policy)):
            return math.inf
        self.policy.set_training_mode(False)
        total = th.zeros(())
        count = 0
        for batch in batches:
            log_prob = self.policy.evaluate(batch.observations, batch.actions).log_prob
            # In double precision, which not every device has.
            total = total + functional.k3(log_prob - batch.old_log_prob).cpu().double().sum()
            count += len(log_prob)
        return float(total) / count

    def _copy(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._moved]

    @th.no_grad()
    def _place(self, values: Iterable[Tensor]) -> None:
        for tensor, value in zip(self._moved, values, strict=True):
            tensor.copy_(value)
        # Switching modes tells a policy that keeps anything computed from its weights that they have changed.
        self.policy.set_training_mode(True)


def preview_scale(kl: float, kl_before: float, bound: float) -> float:
    """How much of the coming step to take, so that the KL foreseen after it stays within the bound.

    ``sqrt(bound / foreseen)``, at most 1. The KL to the rollout policy grows with the square of the distance moved, so
    it is its root that is extrapolated.

    :param kl: to the rollout policy before this step, nats per action.
    :param kl_before: before the step before, likewise; 0 if there was none.
    :param bound: nats per action.
    :return: 0 to 1.
    """
    distance, distance_before = math.sqrt(max(kl, 0.0)), math.sqrt(max(kl_before, 0.0))
    foreseen = max(distance, 2 * distance - distance_before)  # in this order infinity stays infinity
    return min(1.0, math.sqrt(bound) / foreseen) if foreseen > 0 else 1.0


def surely_within(kls: Sequence[float], bound: float) -> bool:
    """Whether a policy is within the bound after an update, as far as its minibatches can tell.

    They tell the distance before each step, but not after the last one. That is taken to be no longer than twice
    the largest change of distance from one minibatch to the next.

    :param kls: to the rollout policy in each minibatch of the update, before its step, nats per action.
    :param bound: nats per action.
    """
    distances = [math.sqrt(max(kl, 0.0)) for kl in kls]
    if len(kls) < 2 or not max(kls) > 1e-10 or not all(map(math.isfinite, distances)):
        return False  # no step was measured
    longest = max(abs(after - before) for before, after in pairwise(distances))
    return (max(distances) + 2 * longest) ** 2 <= bound


@th.no_grad()
def walk_back(
    start: list[Tensor],
    end: list[Tensor],
    place: Callable[[Iterable[Tensor]], None],
    kl: Callable[[], float],
    bound: float,
) -> float:
    """Walk from the new parameters along the line to the old ones until the KL is within the bound.

    :param start: parameters before the update.
    :param end: parameters after it, where the policy is now.
    :param place: puts the policy somewhere.
    :param kl: measures the KL of the rollout policy to the policy where it is, nats per action; may be NaN.
    :param bound: nats per action.
    :return: the share of the update that was kept, 0 to 1.
    """
    kept = 1.0
    while not (measured := kl()) <= bound:  # "not <=" is also true of NaN
        kept *= min(0.5, 0.9 * math.sqrt(bound / measured)) if measured < math.inf else 0.1
        if not kept > 1e-6:
            # The old parameters themselves: 0 times an infinite parameter would not be 0.
            place(start)
            return 0.0
        place(th.lerp(a, b, kept) for a, b in zip(start, end, strict=True))
    return kept
