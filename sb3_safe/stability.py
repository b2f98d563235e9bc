"""How stable a training run was: pure functions of what each rollout showed.

A run is a sequence of rollouts; ``rewards`` are the mean returns of the episodes that ended in each. One rule serves
every task: nothing here depends on the scale or the sign of the rewards.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Row = Mapping[str, float]

SMOOTHING = 5
"""Rollouts that a level is the mean of."""
SPIKE_FLOOR = 0.02
"""Nats per action: what an update may move unpunished (SAFE's threshold for rollouts of 256 actions)."""


def smooth(values: ArrayLike, window: int = SMOOTHING) -> FloatArray:
    """Trailing mean ``s_t = mean(x_{t-w+1} ... x_t)``, over fewer values at the beginning.

    :param values: ``[T]``
    :param window: ``w >= 1``, in values.
    :return: ``[T]``
    :raises ValueError: window below 1.
    """
    if window < 1:
        raise ValueError(f"smooth: window must be at least 1, got {window}")
    x = _array(values)
    if x.size == 0:
        return x
    counts = np.minimum(np.arange(1, x.size + 1), window)
    return np.convolve(x, np.ones(window))[: x.size] / counts


def crashes(
    levels: ArrayLike, start: float | None = None, noise: float = 0.0, near: float = 0.9, fallen: float = 0.5
) -> int:
    """How often a smoothed reward curve collapsed.

    The gain of a level is its height over the start, ``g_t = s_t - start``, and ``b_t = max(g_1 ... g_t)`` is the best
    gain so far. A crash is a fall from ``g >= near b`` to ``g < fallen b``; the next one is counted only after
    the curve has been near its best again. Gains, not rewards, so that returns may be negative.

    :param levels: ``[T]``, a smoothed curve, units of reward.
    :param start: level before training; ``None``: the first one.
    :param noise: best gains up to this do not count: losing half of next to nothing is no crash.
    :param near: share of the best gain that counts as being there.
    :param fallen: share of the best gain under which it is lost.
    """
    s = _array(levels)
    if s.size == 0:
        return 0
    gains = s - (s[0] if start is None else start)
    best = np.maximum.accumulate(gains)
    count, up = 0, False
    for is_near, has_fallen in zip((gains >= near * best) & (best > noise), gains < fallen * best, strict=True):
        if is_near:
            up = True
        elif up and has_fallen:
            count, up = count + 1, False
    return count


class Dispersion(NamedTuple):
    """Change of the mean reward from one rollout to the next, units of reward; NaN without two rollouts."""

    mean_absolute: float
    """``mean |d_t|``"""
    rms: float
    """``sqrt(mean d_t^2)``"""
    net: float
    """The same less what sampling a few episodes explains; NaN where that is unknown."""


def dispersion(rewards: ArrayLike, stds: ArrayLike | None = None, counts: ArrayLike | None = None) -> Dispersion:
    """How much the mean reward jumps between successive rollouts, ``d_t = r_{t+1} - r_t``.

    A mean of ``n`` episodes of standard deviation ``s`` has the variance ``s^2 / n``, so that two unchanged policies
    differ by ``s_t^2 / n_t + s_{t+1}^2 / n_{t+1}`` in the square. That is subtracted:
    ``net = sqrt(max(0, mean(d_t^2 - s_t^2 / n_t - s_{t+1}^2 / n_{t+1})))``. Learning itself is part of it.

    :param rewards: ``[T]``, mean return of each rollout's episodes.
    :param stds: ``[T]``, their sample standard deviation; NaN where it is unknown (a single episode).
    :param counts: ``[T]``, their number.
    """
    changes = np.diff(_array(rewards))
    if changes.size == 0:
        return Dispersion(math.nan, math.nan, math.nan)
    net = math.nan
    if stds is not None and counts is not None:
        variance = _array(stds) ** 2 / _array(counts)
        excess = changes**2 - variance[1:] - variance[:-1]
        known = excess[np.isfinite(excess)]
        net = math.sqrt(max(0.0, known.mean())) if known.size else math.nan
    return Dispersion(float(np.abs(changes).mean()), math.sqrt(np.mean(changes**2)), net)


def kl_spikes(
    kls: ArrayLike, factor: float = 5.0, floor: float = SPIKE_FLOOR, window: int = 20, history: int = 3
) -> int:
    """How many updates moved the policy much further than those before it.

    An update is a spike when its KL exceeds ``factor`` times the median of the ``window`` updates before it, and
    ``floor``. The first ``history`` updates are not judged: there is nothing to compare them with.

    :param kls: ``[T]``, KL of the policy before each update to the one after it, nats per action.
    :param factor: in multiples of the running median.
    :param floor: nats per action, under which no update is a spike.
    :param window: updates that the median is taken of.
    :param history: updates that a median needs.
    """
    x = _array(kls)
    return sum(x[t] > floor and x[t] > factor * np.median(x[max(0, t - window) : t]) for t in range(history, x.size))


def entropy_floor_hits(entropies: ArrayLike, floor: ArrayLike) -> int:
    """How many rollouts were collected with an entropy under the floor.

    :param entropies: ``[T]``, nats per action dimension.
    :param floor: ``[T]`` or a number, likewise.
    """
    return int(np.sum(_array(entropies) < _array(floor)))


def distinct_n(texts: Sequence[Sequence[Any]], n: int = 2) -> float:
    """Diversity of a batch of texts: distinct n-grams over all n-grams, in (0, 1]; NaN without any.

    It falls with the amount of text, so compare batches of about one size only.

    :param texts: token ids (or words) of each text.
    :param n: length of an n-gram.

    See Li et al. 2016, https://arxiv.org/abs/1510.03055
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def stability_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """All of the above for one run; what cannot be computed from its rows is left out.

    The noise of :func:`crashes` is the standard deviation of the returns in the first rollouts, and the entropy floor
    of a run that has none is SAFE's: half the perplexity of the first rollout.

    :param rows: as :class:`~sb3_safe.callbacks.StabilityCallback` writes them.
    """
    metrics: dict[str, float] = {}
    with_reward = [row for row in rows if "reward" in row]
    if with_reward:
        rewards, stds, counts = (_column(with_reward, name) for name in ("reward", "reward_std", "episodes"))
        first = stds[:SMOOTHING][np.isfinite(stds[:SMOOTHING])]
        metrics["crashes"] = crashes(smooth(rewards), noise=float(first.mean()) if first.size else 0.0)
        jumps = dispersion(rewards, stds, counts)
        metrics |= {"dispersion": jumps.mean_absolute, "dispersion_rms": jumps.rms, "dispersion_net": jumps.net}
    kls = [row["update_kl"] for row in rows if "update_kl" in row]
    if kls:
        metrics["kl_spikes"] = kl_spikes(kls)
    with_entropy = [row for row in rows if "entropy" in row]
    if with_entropy:
        floors = _column(with_entropy, "entropy_floor")
        floors = np.where(np.isnan(floors), with_entropy[0]["entropy"] - math.log(2.0), floors)
        metrics["entropy_floor_hits"] = entropy_floor_hits(_column(with_entropy, "entropy"), floors)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _column(rows: Sequence[Row], name: str) -> FloatArray:
    return _array([row.get(name, math.nan) for row in rows])


def _array(values: ArrayLike) -> FloatArray:
    return np.asarray(values, dtype=np.float64)
