"""Statistics of few runs, against the plainest computation of each, and against rliable."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import rl_statistics


def scores(runs: int, tasks: int, seed: int = 0, shift: float = 0.0) -> list[np.ndarray]:
    """Rounded, so that there are ties."""
    return list(np.random.default_rng(seed).normal(shift, size=(tasks, runs)).round(1))


@pytest.mark.parametrize("runs", [[1], [5], [3, 3], [4, 4], [10, 10, 10, 10, 10], [2, 5, 10], [1, 4]])
def test_iqm_is_the_mean_without_the_outer_quarters_of_equally_weighted_tasks(runs: list[int]) -> None:
    tasks = [scores(count, 1, seed=i)[0] for i, count in enumerate(runs)]
    # Every run as often as makes all tasks alike and the quarters whole.
    common = 4 * math.lcm(*runs)
    values = sorted(value for task in tasks for value in task for _ in range(common // len(task)))
    cut = len(values) // 4
    inner = values[cut : len(values) - cut]
    assert rl_statistics.iqm(tasks) == pytest.approx(sum(inner) / len(inner))


def test_iqm_counts_a_task_with_one_run_as_much_as_one_with_many() -> None:
    assert rl_statistics.iqm([np.zeros(1), np.full(99, 10.0)]) == pytest.approx(5.0)


def test_probability_of_improvement_counts_pairs_and_half_of_ties() -> None:
    ours, theirs = scores(6, 3), scores(4, 3, seed=1)
    tasks = []
    for x, y in zip(ours, theirs, strict=True):
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(x, y)]
        tasks.append(sum(wins) / len(wins))
    assert rl_statistics.probability_of_improvement(ours, theirs) == pytest.approx(sum(tasks) / 3)
    assert rl_statistics.probability_of_improvement(ours, ours) == pytest.approx(0.5)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    proxy, values = np.array([0.0, 1.0, 1.0, 0.5, 2.0, 0.5, 1.0]), np.arange(7.0) ** 2
    taken = []
    for chosen in map(list, itertools.combinations(range(7), n)):
        best = proxy[chosen] == proxy[chosen].max()
        taken.append(values[chosen][best].mean())
    assert rl_statistics.best_of_n(proxy, values, n) == pytest.approx(np.mean(taken))


@pytest.mark.parametrize("n", [0, 4])
def test_best_of_more_than_there_are_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n must be from 1 to the 3 samples at hand, got {n}"):
        rl_statistics.best_of_n(np.zeros(3), np.zeros(3), n)


def test_profile_is_the_share_of_runs_above_each_threshold() -> None:
    runs, thresholds = scores(5, 4), [-1.0, 0.0, 0.3]
    expected = [np.mean([value > t for task in runs for value in task]) for t in thresholds]
    np.testing.assert_allclose(rl_statistics.performance_profile(runs, thresholds), expected)


def test_interval_is_that_of_a_plain_stratified_bootstrap() -> None:
    runs = scores(8, 3)
    low, high = rl_statistics.interval(rl_statistics.iqm, runs, repetitions=20_000)
    rng = np.random.default_rng(99)
    means = []
    for _ in range(4000):
        values = sorted(value for task in runs for value in rng.choice(task, size=len(task)))
        means.append(sum(values[6:18]) / 12)
    plain_low, plain_high = np.percentile(means, [2.5, 97.5])
    assert (low, high) == (pytest.approx(plain_low, abs=0.03), pytest.approx(plain_high, abs=0.03))


def test_interval_resamples_within_a_task_only() -> None:
    """Runs of a task that are all alike leave nothing to chance, however different the tasks are."""
    low, high = rl_statistics.interval(rl_statistics.iqm, [np.zeros(4), np.full(4, 9.0)])
    assert low == high == pytest.approx(4.5)


def test_interval_is_reproducible_and_depends_on_the_seed() -> None:
    runs = scores(5, 2)
    first = rl_statistics.interval(rl_statistics.iqm, runs, repetitions=50)
    assert first == rl_statistics.interval(rl_statistics.iqm, runs, repetitions=50)
    assert first != rl_statistics.interval(rl_statistics.iqm, runs, repetitions=50, seed=1)


def test_a_curve_is_resampled_run_by_run() -> None:
    """Along the last axis: two runs that are constant give intervals that are the same at every point."""
    lines = np.tile([0.0, 1.0, 2.0], (7, 1))
    low, high = rl_statistics.interval(rl_statistics.iqm, [lines], repetitions=200)
    assert low.shape == high.shape == (7,)
    assert len(set(low)) == len(set(high)) == 1


def test_agrees_with_rliable() -> None:
    library = pytest.importorskip("rliable.library")
    from rliable import metrics

    # 40 runs: quarters are whole runs, so that both leave out the same.
    x, y = np.stack(scores(10, 4), axis=1), np.stack(scores(10, 4, seed=1, shift=0.3), axis=1)
    ours, theirs = list(x.T), list(y.T)
    assert rl_statistics.iqm(ours) == pytest.approx(metrics.aggregate_iqm(x))
    improvement = metrics.probability_of_improvement(x, y)
    assert rl_statistics.probability_of_improvement(ours, theirs) == pytest.approx(improvement)
    _, ends = library.get_interval_estimates({"x": x}, lambda s: np.array([metrics.aggregate_iqm(s)]), reps=5000)
    assert rl_statistics.interval(rl_statistics.iqm, ours) == pytest.approx(tuple(ends["x"].ravel()), abs=0.04)
