import math

import numpy as np
import pytest

from sb3_safe.stability import (
    crashes,
    dispersion,
    distinct_n,
    entropy_floor_hits,
    kl_spikes,
    smooth,
    stability_metrics,
)


def test_smooth_is_the_mean_of_the_last_values_and_of_fewer_at_the_beginning() -> None:
    np.testing.assert_allclose(smooth([2, 4, 6, 8, 10], window=3), [2, 3, 4, 6, 8])
    assert smooth([], window=3).size == 0


def test_smooth_refuses_an_empty_window() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        smooth([1.0], window=0)


@pytest.mark.parametrize(
    ("levels", "count"),
    [
        ([0, 10, 20, 30], 0),
        ([0, 20, 11], 0),  # above half of the gain of 20
        ([0, 20, 9], 1),
        ([0, 20, 9, 5, 9, 1], 1),  # down is down
        ([0, 20, 9, 15, 9], 1),  # 15 is not within 10 % of the best
        ([0, 20, 9, 18, 9], 2),
        ([0, 20, 9, 30, 14], 2),
        ([0, 20, 21, 22, -5], 1),
        ([0, -3, -9, -2], 0),  # never above the start: nothing to lose
        ([5], 0),
        ([], 0),
    ],
)
def test_a_crash_is_a_fall_from_near_the_best_to_under_half_its_gain(levels: list[float], count: int) -> None:
    assert crashes(levels) == count


def test_crashes_do_not_depend_on_scale_or_sign_of_the_rewards() -> None:
    levels = np.array([0, 12, 20, 9, 19, 20, 3, 2, 20.0])
    assert crashes(levels) == crashes(levels / 1000 - 0.5) == crashes(levels * 70 - 1500) == 2


def test_crashes_count_the_gain_over_the_given_start() -> None:
    assert crashes([60, 100, 70]) == 1  # 10 of 40 are left
    assert crashes([60, 100, 70], start=0) == 0  # 70 of 100 are left


def test_losing_a_gain_within_the_noise_is_no_crash() -> None:
    assert crashes([0, 2, 0, 2, 0]) == 2
    assert crashes([0, 2, 0, 2, 0], noise=2) == 0


def test_dispersion_subtracts_what_sampling_explains() -> None:
    # Changes 3 and -1. Variances of the means: 4 / 4 = 1, 4 / 2 = 2, 1 / 1 = 1.
    found = dispersion([1, 4, 3], stds=[2, 2, 1], counts=[4, 2, 1])
    assert found.mean_absolute == pytest.approx(2)
    assert found.rms == pytest.approx(math.sqrt((9 + 1) / 2))
    assert found.net == pytest.approx(math.sqrt(((9 - 3) + (1 - 3)) / 2))


def test_dispersion_of_an_unchanged_policy_is_nothing_but_sampling_noise() -> None:
    returns = np.random.default_rng(0).normal(7, 3, size=(500, 20))
    found = dispersion(returns.mean(1), returns.std(1, ddof=1), np.full(500, 20))
    assert found.rms == pytest.approx(3 * math.sqrt(2 / 20), rel=0.1)
    assert found.net < 0.25 * found.rms


def test_net_dispersion_leaves_out_rollouts_of_unknown_spread() -> None:
    assert dispersion([0, 3, 50], stds=[1, 1, math.nan], counts=[1, 1, 1]).net == pytest.approx(math.sqrt(9 - 2))
    assert math.isnan(dispersion([0, 3]).net)
    assert math.isnan(dispersion([1]).rms)


def test_a_kl_spike_exceeds_five_times_the_running_median_and_the_floor() -> None:
    calm = [0.010, 0.012, 0.008]
    assert kl_spikes([*calm, 0.051]) == 1
    assert kl_spikes([*calm, 0.049]) == 0
    assert kl_spikes([0.001, 0.001, 0.001, 0.015]) == 0  # 15 times the median, but tiny
    assert kl_spikes([*calm, 1.0, 0.01, 1.0]) == 2  # the first spike does not raise the median
    assert kl_spikes([0.01, 0.01, 9.0]) == 0  # too little to compare with


def test_the_median_of_kl_spikes_forgets() -> None:
    kls = [0.1] * 30 + [0.01] * 15 + [0.08]
    assert kl_spikes(kls, window=20) == 1
    assert kl_spikes(kls, window=100) == 0


def test_entropy_floor_hits_are_the_rollouts_under_the_floor() -> None:
    assert entropy_floor_hits([1.0, 0.5, 0.4], 0.5) == 1
    assert entropy_floor_hits([1.0, 0.5, 0.4], [1.1, 0.6, 0.3]) == 2


def test_distinct_n_counts_ngrams_once() -> None:
    # Bigrams: (1,2) (2,1) (1,2) and (2,1) (1,3).
    assert distinct_n([[1, 2, 1, 2], [2, 1, 3]]) == pytest.approx(3 / 5)
    assert distinct_n(["abc"], n=3) == 1
    assert math.isnan(distinct_n([[1]]))


def test_metrics_of_a_run_use_the_columns_it_has() -> None:
    rewards = [0, 0, 0, 0, 0, 10, 10, 10, 10, 10, 0, 0, 0, 0, 0]
    rows = [{"reward": r, "reward_std": 1.0, "episodes": 4, "entropy": 1.0} for r in rewards]
    rows[7]["entropy"] = 1.0 - math.log(2) - 0.01  # without a floor of its own: half the perplexity of the first
    metrics = stability_metrics(rows)
    assert metrics == pytest.approx(
        {
            "crashes": 1,
            "dispersion": 20 / 14,
            "dispersion_rms": math.sqrt(200 / 14),
            "dispersion_net": math.sqrt(200 / 14 - 0.5),
            "entropy_floor_hits": 1,
        }
    )
    assert stability_metrics([row | {"reward_std": 10.0} for row in rows])["crashes"] == 0  # the gain is but noise
    assert stability_metrics([{"timesteps": 1.0}]) == {}
    assert stability_metrics(rows[:1]) == {"crashes": 0, "entropy_floor_hits": 0}
    assert stability_metrics([{"entropy": 0.2, "entropy_floor": 0.3}]) == {"entropy_floor_hits": 1}
