"""The promise that no update moves the policy further than a given KL: preview before a step, walk-back after all.

See SAFE, predictive control, https://arxiv.org/abs/2602.04651. The published code never calls its preview, and scales
by ``max / foreseen`` where the KL grows with the square of the step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch as th
from torch import Tensor


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
