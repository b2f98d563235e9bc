"""Statistics of few runs: interquartile mean, stratified bootstrap, probability of improvement, performance profile.

And of many samples of one run: what the best of ``n`` of them is worth.

Scores are given as one array of runs per task, ``[R_1], [R_2], ...``; with as many runs on each they are the columns of
the usual matrix of runs and tasks. Tasks count alike in everything. Every statistic works along the last axis, so that
the bootstrap is one call on arrays ``[repetitions, R_m]``.

See Agarwal et al. 2021, Deep reinforcement learning at the edge of the statistical precipice,
https://arxiv.org/abs/2108.13264
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Scores = Sequence[FloatArray]

REPETITIONS = 2000
LEVEL = 0.95


def iqm(scores: Scores) -> FloatArray:
    """Interquartile mean: the mean of what is left without the lowest and the highest quarter of all runs.

    Tasks count alike whatever the number of their runs: each of those weighs ``1 / R_m``. A run at the edge of a
    quarter counts in part, where rliable, which takes equally many runs of all tasks, leaves out ``floor(0.25 N)``.

    :param scores: ``[..., R_m]`` for each task.
    :return: ``[...]``
    """
    runs = np.concatenate(scores, axis=-1)
    weights = np.concatenate([np.full(x.shape[-1], 1 / (len(scores) * x.shape[-1])) for x in scores])
    order = np.argsort(runs, axis=-1)
    ends = np.cumsum(weights[order], axis=-1).clip(0.25, 0.75)
    inside = np.diff(ends, axis=-1, prepend=0.25)
    return np.asarray((inside * np.take_along_axis(runs, order, axis=-1)).sum(axis=-1) / inside.sum(axis=-1))


def probability_of_improvement(ours: Scores, theirs: Scores) -> FloatArray:
    """How likely a run of ours beats one of theirs on the same task, ties counting half; the mean over tasks.

    ``mean_m U_m / (R_m R'_m)`` with the Mann-Whitney statistic ``U``.

    :param ours: ``[..., R_m]`` for each task.
    :param theirs: ``[..., R'_m]`` for each task.
    :return: ``[...]``
    """
    tasks = []
    for x, y in zip(ours, theirs, strict=True):
        x, y = x[..., :, None], y[..., None, :]
        tasks.append(((x > y) + 0.5 * (x == y)).mean(axis=(-2, -1)))
    return np.asarray(np.mean(tasks, axis=0))


def performance_profile(scores: Scores, thresholds: ArrayLike) -> FloatArray:
    """Share of runs that score above each threshold; tasks count alike.

    :param scores: ``[..., R_m]`` for each task.
    :param thresholds: ``[K]``
    :return: ``[K, ...]``
    """
    return np.stack([np.mean([(x > t).mean(axis=-1) for x in scores], axis=0) for t in np.asarray(thresholds)])


def best_of_n(proxy: FloatArray, values: FloatArray, n: int) -> float:
    """Expected value of the sample whose proxy is highest among ``n``, over all subsets of ``n`` of those at hand.

    Unbiased: the ``i``-th best by proxy (from 0) is the best of a subset with probability
    ``C(N - 1 - i, n - 1) / C(N, n)``. Samples of equal proxy are each as likely to be taken.

    :param proxy: ``[N]``, what is chosen by.
    :param values: ``[N]``, what the choice is worth.
    :param n: 1 to ``N``.
    :raises ValueError: ``n`` is not.

    See Nakano et al. 2021, appendix I, https://arxiv.org/abs/2112.09332
    """
    if not 1 <= n <= len(proxy):
        raise ValueError(f"n must be from 1 to the {len(proxy)} samples at hand, got {n}")
    _, group = np.unique(proxy, return_inverse=True)
    values = (np.bincount(group, values) / np.bincount(group))[group]
    worse = np.arange(len(values) - 1, 0, -1)
    chances = n / len(values) * np.cumprod([1.0, *((worse - n + 1) / worse).clip(0)])
    return float(chances @ values[np.argsort(-proxy)])


def interval(
    statistic: Callable[..., FloatArray], *groups: Scores, repetitions: int = REPETITIONS, seed: int = 0
) -> tuple[Any, Any]:
    """Percentile bootstrap interval of a statistic, runs resampled within each task (the strata).

    :param statistic: function of as many arguments as there are groups.
    :param groups: each ``[..., R_m]`` for each task.
    :param repetitions: bootstrap samples.
    :param seed: of the resampling.
    :return: lower and upper end of the 95 % interval, each of the statistic's shape.
    """
    rng = np.random.default_rng(seed)
    resampled = [
        [np.asarray(x)[..., rng.integers(np.shape(x)[-1], size=(repetitions, np.shape(x)[-1]))] for x in scores]
        for scores in groups
    ]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(statistic(*resampled), [tail, 100 - tail], axis=-1)
    return low, high
