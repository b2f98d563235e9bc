import math
import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_safe.controller import (
    CONTROLLERS,
    PHASES,
    AdaptiveKL,
    FixedKL,
    KLController,
    NoKL,
    SafeController,
    make_controller,
    rollout_threshold,
)

RULES = ("earned", "paper", "constant")
ROLLOUTS = st.lists(
    st.tuples(st.lists(st.floats(-1e6, 1e6), max_size=4), st.floats(-1, 100), st.floats(-1e3, 1e3)),
    min_size=1,
    max_size=30,
)


def feed(controller: SafeController, rewards: Iterable[float], kl: float = 0.0, entropy: float = 1.0) -> list[Any]:
    """One rollout of two episodes per reward, a distance of 1 either side; the threshold and phase after each."""
    seen = []
    for reward in rewards:
        controller.update([reward - 1.0, reward + 1.0], kl, entropy)
        seen.append((controller.threshold, controller.phase))
    return seen


# -- what is measured ----------------------------------------------------------------------------------------------


def test_kl_trackers_start_at_the_first_measurement_and_follow_at_their_own_pace():
    controller = SafeController()
    short, long = [], []
    for kl in (0.4, 0.2, 0.0):
        controller.update([], kl, 0.0)
        short.append(controller.metrics()["kl_short"])
        long.append(controller.metrics()["kl_long"])
    assert short == pytest.approx([0.4, 0.38, 0.342])
    assert long == pytest.approx([0.4, 0.398, 0.39402])


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_enters_no_average(kl: float):
    told, spared = SafeController(), SafeController()
    for controller in (told, spared):
        controller.update([1.0], 0.4, 0.0)
    told.update([], kl, 0.0)
    assert (told.kl_short, told.kl_long) == (spared.kl_short, spared.kl_long)
    assert told.coefficient() == spared.coefficient() > told.price
    adaptive = AdaptiveKL(coef=0.1)
    adaptive.update([], kl, 0.0)
    assert adaptive.coef == 0.1


def test_reward_average_starts_at_the_first_reward():
    controller = SafeController()
    feed(controller, [10.0])
    assert controller.metrics()["reward_ema"] == 10.0
    feed(controller, [20.0])
    assert controller.metrics()["reward_ema"] == pytest.approx(10.5)


def test_spread_is_the_running_deviation_of_returns_from_the_average_reward():
    controller = SafeController()
    controller.update([1.0, 3.0], 0.0, 0.0)
    assert controller.metrics()["reward_spread"] == pytest.approx(1.0)
    controller.update([2.0, 12.0], 0.0, 0.0)
    # Around the average of before, 2: squares 0 and 100.
    assert controller.metrics()["reward_spread"] == pytest.approx(math.sqrt(0.99 * 1.0 + 0.01 * 50.0))


def test_rollouts_with_a_single_episode_find_a_spread_as_soon_as_rewards_differ():
    controller = SafeController()
    for reward in (5.0, 5.0, 8.0):
        controller.update([reward], 0.0, 0.0)
    assert controller.spread == pytest.approx(3.0)


@pytest.mark.parametrize("rule", RULES)
def test_a_rollout_without_finished_episodes_leaves_reward_state_and_threshold_alone(rule: str):
    controller = SafeController(threshold=rule)
    feed(controller, [0.0, 1.0, 3.0])
    names = (
        "reward_ema", "reward_variance", "velocity", "error", "integral", "pid", "rewards", "first_reward", "threshold"
    )  # fmt: skip
    before = {name: pickle.dumps(getattr(controller, name)) for name in names}
    kl_short = controller.kl_short
    controller.update([], 5.0, 1.0)
    assert {name: pickle.dumps(getattr(controller, name)) for name in names} == before
    assert controller.kl_short > kl_short


# -- entropy gate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entropy", "gate"),
    [(2.0, 1.0), (1.0, math.e), (2.5, math.exp(-0.5)), (-5.0, 10.0), (-1e6, 10.0), (3.0, 0.5), (1e6, 0.5)],
)
def test_the_gate_is_the_ratio_of_perplexities_within_limits(entropy: float, gate: float):
    controller = SafeController(entropy_floor=2.0)
    controller.update([], 0.0, entropy)
    assert controller.gate == pytest.approx(gate)


@pytest.mark.parametrize("first", [1.5, -3.0])
def test_an_automatic_floor_is_half_the_perplexity_of_the_first_rollout(first: float):
    controller = SafeController()
    for entropy in (first, first + 7.0, first - 1.0):
        controller.update([], 0.0, entropy)
    assert math.exp(controller.entropy_floor) == pytest.approx(math.exp(first) / 2)
    assert controller.gate == pytest.approx(math.exp(first) / 2 / math.exp(first - 1.0))


def test_the_gate_can_be_switched_off():
    controller = SafeController(entropy_gate=False)
    for entropy in (2.0, -8.0):
        controller.update([], 0.0, entropy)
        assert controller.gate == 1.0


# -- coefficient ---------------------------------------------------------------------------------------------------


def constant(**kwargs: Any) -> SafeController:
    return SafeController(**({"threshold": "constant", "entropy_gate": False, "price": 0.0} | kwargs))


@pytest.mark.parametrize("kl", [-10.0, -0.1, 0.0, 0.1, 0.3])
def test_nothing_is_punished_below_the_threshold(kl: float):
    controller = constant(tau_base=0.3)
    controller.update([], kl, 0.0)
    assert controller.coefficient(kl) == 0.0


def test_the_coefficient_rises_linearly_above_the_threshold():
    controller = constant(coef=2.0, tau_base=0.3)
    controller.update([], 0.0, 0.0)
    assert [controller.coefficient(kl) for kl in (0.6, 0.9, 3.3)] == pytest.approx([4.0, 8.0, 40.0])


def test_the_coefficient_is_the_slope_of_a_quadratic_penalty():
    coef, tau, step = 1.7, 0.02, 1e-7
    controller = constant(coef=coef, tau_base=tau)
    controller.update([], 0.0, 0.0)
    for kl in (0.01, 0.03, 0.2):
        penalties = [coef * tau * (max(0.0, k - tau) / tau) ** 2 for k in (kl - step, kl + step)]
        assert controller.coefficient(kl) == pytest.approx(
            (penalties[1] - penalties[0]) / (2 * step), rel=1e-5, abs=1e-6
        )


def test_the_larger_of_tracked_and_present_kl_counts():
    controller = constant(coef=1.0, tau_base=1.0)
    controller.update([], 3.0, 0.0)
    assert controller.coefficient(-5.0) == controller.coefficient(0.0) == pytest.approx(4.0)
    assert controller.coefficient(4.0) == pytest.approx(6.0)


def test_the_gate_multiplies_the_coefficient():
    coefficients = []
    for floor in (0.0, 1.0):
        controller = SafeController(threshold="constant", entropy_floor=floor, price=0.0)
        controller.update([], 1.0, 0.0)
        coefficients.append(controller.coefficient())
    assert coefficients[1] / coefficients[0] == pytest.approx(math.e)


def test_below_the_threshold_every_nat_has_its_price():
    controller = constant(price=0.1, coef=1.0, tau_base=0.5)
    controller.update([], -0.3, 0.0)
    assert controller.coefficient(0.0) == controller.coefficient(0.5) == 0.1
    assert controller.coefficient(0.75) == pytest.approx(0.1 + 1.0)


def test_in_the_reward_the_unit_is_the_largest_spread_of_rewards_seen():
    """A price that fell as the policy settles would let it drift for nothing."""
    controller = constant(price=0.1)
    controller.update([], 0.0, 0.0)
    assert controller.reward_coefficient() == 0.0  # nothing is known of the reward yet
    controller.update([1.0, -1.0], 0.0, 0.0)
    assert controller.reward_coefficient() == pytest.approx(0.1)
    for _ in range(200):
        controller.update([0.0, 0.0], 0.0, 0.0)
    assert controller.spread < 0.5
    assert controller.reward_coefficient() == pytest.approx(0.1)
    assert FixedKL(0.2).reward_coefficient() == 0.2


# -- PID -----------------------------------------------------------------------------------------------------------


def test_pid_terms_are_those_of_the_definition():
    generator = np.random.default_rng(0)
    rollouts = [list(generator.normal(0.1 * t, 1.0, size=3)) for t in range(40)]
    controller = SafeController(threshold="paper", kp=0.3, ki=0.01, kd=0.05, target_velocity=0.001)
    average, variance, integral, last_error = float(np.mean(rollouts[0])), float(np.var(rollouts[0])), 0.0, 0.0
    for number, returns in enumerate(rollouts):
        velocity = 0.0
        if number > 0:
            variance = 0.99 * variance + 0.01 * float(np.mean((np.array(returns) - average) ** 2))
            velocity = 0.05 * (float(np.mean(returns)) - average) / math.sqrt(variance)
            average += 0.05 * (float(np.mean(returns)) - average)
        error = velocity - 0.001
        integral = min(1.0, max(-1.0, integral + error))
        controller.update(returns, 0.0, 0.0)
        expected = [velocity, 0.3 * error, 0.01 * integral, 0.05 * (error - last_error)]
        logged = controller.metrics()
        assert [logged[name] for name in ("reward_velocity", "pid_p", "pid_i", "pid_d")] == pytest.approx(expected)
        last_error = error


def test_the_integral_stays_within_its_limits():
    controller = SafeController(target_velocity=0.3, kp=0.0, ki=1e-3, kd=0.0)
    feed(controller, [0.0] * 10)
    assert controller.integral == -1.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_integral_stands_still_while_the_threshold_is_clipped_and_the_error_pushes_it_further(sign: float):
    controller = SafeController(threshold="paper", target_velocity=-0.1 * sign, kp=20.0, ki=1e-3, kd=0.0)
    feed(controller, [0.0])
    assert controller.threshold == pytest.approx(controller.tau_base * (2.0 if sign > 0 else 1 / 3))
    feed(controller, [0.0] * 5)
    assert controller.integral == pytest.approx(0.1 * sign)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_integral_moves_again_when_the_error_turns_back(sign: float):
    controller = SafeController(threshold="paper", target_velocity=-0.1 * sign, kp=20.0, ki=1e-3, kd=0.0)
    feed(controller, [0.0, 0.0])
    feed(controller, [-100.0 * sign])
    assert controller.error * sign < 0
    assert controller.integral == pytest.approx(max(-1.0, min(1.0, 0.1 * sign + controller.error)))


# -- phases --------------------------------------------------------------------------------------------------------


def test_training_starts_in_warmup_for_as_many_rollouts_as_asked():
    phases = [phase for _, phase in feed(SafeController(warmup=50, window=5), [0.0] * 52)]
    assert phases == ["WARMUP"] * 50 + ["PLATEAU"] * 2


def test_rising_reward_is_climbing():
    phases = [phase for _, phase in feed(SafeController(warmup=0, window=5), range(20))]
    assert set(phases[:5]) == {"PLATEAU"}
    assert set(phases[5:]) == {"CLIMBING"}


def test_reward_that_rose_and_then_stays_is_converged():
    phases = [phase for _, phase in feed(SafeController(warmup=0, window=5), [0.0] * 5 + [4.0] * 10)]
    assert phases[5:9] == ["CLIMBING"] * 4
    assert phases[-1] == "CONVERGED"


@pytest.mark.parametrize("rewards", [[0.0] * 20, list(range(0, -20, -1)), [0.0] * 4 + [4.0, 2.0] * 8])
def test_reward_that_stays_low_falls_or_swings_is_a_plateau(rewards: list[float]):
    assert feed(SafeController(warmup=0, window=4), rewards)[-1][1] == "PLATEAU"


def test_without_any_spread_of_reward_there_is_no_phase_but_warmup():
    controller = SafeController(warmup=0, window=2)
    for _ in range(10):
        controller.update([3.0], 0.0, 0.0)
    assert controller.phase == "WARMUP"


# -- threshold -----------------------------------------------------------------------------------------------------


def test_the_papers_threshold_is_base_times_pid_times_phase():
    controller = SafeController(tau_base=0.3, threshold="paper", warmup=3, window=3)
    factors = {"WARMUP": 1.5, "CLIMBING": 1.2, "PLATEAU": 0.8, "CONVERGED": 1.0}
    seen = set()
    for reward in [0.0] * 8 + [1.0, 2.0, 3.0] + [3.0] * 8:
        feed(controller, [reward])
        logged = controller.metrics()
        phase = PHASES[int(logged["phase"])]
        expected = 0.3 * (1 + logged["pid_p"] + logged["pid_i"] + logged["pid_d"]) * factors[phase]
        assert logged["threshold"] == pytest.approx(expected)
        seen.add(phase)
    assert seen == set(PHASES)


@pytest.mark.parametrize(("velocity", "limit"), [(-10.0, 2.0), (10.0, 1 / 3)])
def test_the_papers_threshold_is_clipped_to_a_third_and_to_twice_the_base(velocity: float, limit: float):
    controller = SafeController(tau_base=0.3, threshold="paper", target_velocity=velocity)
    feed(controller, [0.0])
    assert controller.threshold == pytest.approx(0.3 * limit)


def test_the_earned_threshold_rises_by_bounded_steps_while_reward_rises():
    controller = SafeController(tau_base=0.3, max_step=0.1)
    thresholds = [threshold for threshold, _ in feed(controller, range(0, 50, 10), kl=10.0)]
    # No velocity is known in the first rollout.
    assert thresholds == pytest.approx([0.3, 0.33, 0.36, 0.39, 0.42])


def test_the_earned_threshold_rises_to_the_measured_kl_and_no_further():
    controller = SafeController(tau_base=0.3, max_step=0.1)
    feed(controller, range(0, 100, 10), kl=0.35)
    assert controller.threshold == pytest.approx(0.35)


def test_the_earned_threshold_keeps_to_its_ceiling():
    controller = SafeController(tau_base=0.3, max_step=1.0, max_threshold=2.0)
    feed(controller, range(0, 100, 10), kl=10.0)
    assert controller.threshold == pytest.approx(0.6)


def test_the_earned_threshold_stays_when_reward_stagnates_falls_or_kl_shrinks():
    controller = SafeController(tau_base=0.3, max_step=0.1)
    feed(controller, range(0, 50, 10), kl=10.0)
    earned = controller.threshold
    feed(controller, [controller.reward_ema] * 5, kl=10.0)
    feed(controller, [-50.0, -100.0], kl=10.0)
    controller.kl_short = 0.0
    feed(controller, [500.0, 900.0], kl=0.0)
    assert controller.error > 0
    assert controller.threshold == earned > 0.3


def test_a_constant_threshold_is_constant():
    controller = SafeController(tau_base=0.3, threshold="constant")
    assert {threshold for threshold, _ in feed(controller, range(100), kl=1.0)} == {0.3}


@given(ROLLOUTS)
def test_the_earned_threshold_obeys_its_bounds_whatever_happens(rollouts: list[Any]):
    controller = SafeController(tau_base=0.3, max_step=0.1, max_threshold=3.0)
    for returns, kl, entropy in rollouts:
        before = controller.threshold
        controller.update(returns, kl, entropy)
        rise = controller.threshold - before
        assert 0.0 <= rise <= 0.1 * 0.3 + 1e-12
        if rise > 0:
            assert controller.error > 0
            assert controller.threshold <= controller.kl_short
        assert controller.threshold <= 3.0 * 0.3


@given(ROLLOUTS, st.sampled_from(RULES))
def test_everything_stays_finite_and_within_limits_whatever_happens(rollouts: list[Any], rule: str):
    controller = SafeController(tau_base=0.3, threshold=rule, warmup=2, window=3)
    limits = {"earned": (0.3, 0.9), "paper": (0.1, 0.6), "constant": (0.3, 0.3)}[rule]
    for returns, kl, entropy in rollouts:
        controller.update(returns, kl, entropy)
        assert limits[0] - 1e-12 <= controller.threshold <= limits[1] + 1e-12
        assert 0.5 <= controller.gate <= 10.0
        assert abs(controller.integral) <= 1.0
        assert controller.coefficient(kl) >= 0.0
        assert all(math.isfinite(value) for value in controller.metrics().values())


@pytest.mark.parametrize("rule", RULES)
def test_the_scale_and_the_level_of_rewards_do_not_matter(rule: str):
    generator = np.random.default_rng(1)
    plain, scaled = (SafeController(threshold=rule, warmup=3, window=4) for _ in range(2))
    phases = set()
    for t in range(60):
        returns = generator.normal(min(t, 30) * 0.2, 0.5, size=generator.integers(0, 4))
        kl, entropy = generator.uniform(0, 1), generator.uniform(0, 1)
        plain.update(list(returns), kl, entropy)
        scaled.update(list(1000 * returns - 1e4), kl, entropy)
        assert scaled.threshold == pytest.approx(plain.threshold, rel=1e-9)
        assert scaled.coefficient() == pytest.approx(plain.coefficient(), rel=1e-6)
        assert scaled.reward_coefficient() == pytest.approx(1000 * plain.reward_coefficient(), rel=1e-6)
        assert scaled.pid == pytest.approx(plain.pid, rel=1e-6, abs=1e-12)
        assert scaled.phase == plain.phase
        phases.add(plain.phase)
    assert len(phases) > 2


def test_a_pickled_controller_goes_on_where_it_was():
    controller = SafeController(warmup=2, window=3)
    feed(controller, [0.0, 1.0, 2.0, 4.0], kl=1.0)
    copy = pickle.loads(pickle.dumps(controller))
    assert copy.metrics() == controller.metrics()
    for one in (controller, copy):
        feed(one, [5.0, 3.0, 9.0], kl=0.2, entropy=-1.0)
    assert copy.metrics() == controller.metrics()


# -- the other controllers -----------------------------------------------------------------------------------------


def test_no_kl_never_punishes():
    controller = NoKL()
    controller.update([1.0], 100.0, 0.0)
    assert controller.coefficient(100.0) == 0.0
    assert not controller.active


def test_a_fixed_coefficient_is_fixed():
    controller = FixedKL(0.07)
    controller.update([1.0], 100.0, 0.0)
    assert controller.coefficient(100.0) == controller.metrics()["coefficient"] == 0.07


def test_the_adaptive_coefficient_follows_zieglers_rule():
    controller = AdaptiveKL(coef=0.1, target=6.0, horizon=10.0)
    expected = 0.1
    for kl in (0.0, 5.5, 6.0, 6.3, 100.0):
        expected *= 1 + 0.1 * float(np.clip((kl - 6.0) / 6.0, -0.2, 0.2))
        controller.update([], kl, 0.0)
        assert controller.coefficient() == pytest.approx(expected)


# -- construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("safe", SafeController), ("fixed", FixedKL), ("adaptive", AdaptiveKL), ("none", NoKL)]
)
def test_controllers_are_made_by_name(name: str, kind: type[KLController]):
    assert type(make_controller(name, {"tau_base": 0.1})) is kind
    assert CONTROLLERS[name] is kind


def test_a_safe_controller_takes_the_threshold_of_its_reference_unless_told_otherwise():
    assert make_controller("safe", {"tau_base": 0.02}).tau_base == 0.02
    assert make_controller(SafeController, {"tau_base": 0.02}, tau_base=0.5).tau_base == 0.5


def test_a_rollout_of_few_actions_frees_less_kl():
    assert [rollout_threshold(n) for n in (256, 1024, 4096)] == pytest.approx([0.02, 0.05, 0.08])
    thresholds = [rollout_threshold(n) for n in (1, 64, 2048, 10**12)]
    assert thresholds == sorted(thresholds)
    assert thresholds[-1] == pytest.approx(0.1)


def test_a_controller_of_ones_own_is_made_from_its_class():
    class Mine(KLController):
        def __init__(self, strength: float = 1.0) -> None:
            self.strength = strength

    assert make_controller(Mine, {"tau_base": 0.1}, strength=3.0).strength == 3.0


def test_a_subclass_of_ones_own_gets_the_defaults_that_its_constructor_takes():
    class TakesNothing(SafeController):
        def __init__(self) -> None:
            super().__init__(coef=1.0)

    class TakesAll(SafeController):
        def __init__(self, strength: float = 1.0, **kwargs: Any) -> None:
            super().__init__(coef=strength, **kwargs)

    defaults = {"price": 0.0, "tau_base": 0.02}
    assert make_controller(TakesNothing, defaults).coef == 1.0
    made = make_controller(TakesAll, defaults, strength=3.0)
    assert (made.coef, made.price, made.tau_base) == (3.0, 0.0, 0.02)


def test_an_unknown_controller_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"kl_controller='pid'.*adaptive.*fixed.*none.*safe"):
        make_controller("pid", {"tau_base": 0.1})


def test_a_controller_that_is_already_built_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"kl_controller.*FixedKL.*kl_controller_kwargs"):
        make_controller(FixedKL(0.1), {"tau_base": 0.1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("safe", {"coef": -1.0}),
        ("safe", {"tau_base": 0.0}),
        ("safe", {"threshold": "pid"}),
        ("safe", {"max_step": -0.1}),
        ("safe", {"price": -0.1}),
        ("safe", {"max_threshold": 0.5}),
        ("safe", {"max_drift": 0.0}),
        ("safe", {"kl_short_decay": 1.0}),
        ("safe", {"kl_long_decay": -0.1}),
        ("safe", {"reward_decay": math.nan}),
        ("safe", {"warmup": -1}),
        ("safe", {"window": 1}),
        ("safe", {"entropy_floor": "low"}),
        ("safe", {"entropy_floor": math.inf}),
        ("fixed", {"coef": -0.1}),
        ("adaptive", {"target": 0.0}),
        ("adaptive", {"horizon": -1.0}),
        ("fixed", {"target": 1.0}),
    ],
)
def test_an_argument_out_of_range_or_unknown_is_named(name: str, kwargs: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        make_controller(name, {"tau_base": 0.1}, **kwargs)


def test_a_controller_without_arguments_refuses_them():
    with pytest.raises(ValueError, match="kl_controller_kwargs do not fit NoKL"):
        make_controller("none", {"tau_base": 0.1}, coef=1.0)
