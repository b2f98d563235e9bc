import itertools
import math

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_safe import functional

CRITICS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5)
TEMPERATURES = st.sampled_from([0.0, 1e-6, 1e-3, 0.3, 1.0, 1e3, 1e6, math.inf])


def values_of(numbers: list[float], dtype: th.dtype = th.float64) -> th.Tensor:
    return th.tensor(numbers, dtype=dtype)


# -- soft-min ------------------------------------------------------------------------------------------------------


def test_soft_min_is_the_formula_of_the_paper():
    values = np.array([[0.2, 0.5], [1.0, 1.0], [-3.0, 0.7]])
    for temperature in (0.1, 0.3, 2.0):
        expected = -temperature * np.log(0.5 * np.exp(-values / temperature).sum(-1))
        np.testing.assert_allclose(functional.soft_min(th.from_numpy(values), temperature), expected, rtol=1e-12)


@given(CRITICS, TEMPERATURES)
def test_soft_min_lies_between_minimum_and_mean(numbers: list[float], temperature: float):
    soft = functional.soft_min(values_of(numbers), temperature).item()
    slack = 1e-9 * (1 + max(map(abs, numbers)))
    assert min(numbers) - slack <= soft <= sum(numbers) / len(numbers) + slack


@given(CRITICS, TEMPERATURES, st.integers(0, 4), st.floats(0, 1e3))
def test_soft_min_never_falls_when_a_critic_rises(numbers: list[float], temperature: float, which: int, rise: float):
    raised = list(numbers)
    raised[which % len(numbers)] += rise
    before = functional.soft_min(values_of(numbers), temperature).item()
    after = functional.soft_min(values_of(raised), temperature).item()
    assert after >= before - 1e-9 * (1 + max(map(abs, numbers)))


@given(CRITICS)
def test_soft_min_never_falls_when_the_temperature_rises(numbers: list[float]):
    values = values_of(numbers)
    soft = [functional.soft_min(values, temperature).item() for temperature in (0.0, 1e-6, 0.01, 1.0, 100.0, math.inf)]
    slack = 1e-9 * (1 + max(map(abs, numbers)))
    assert all(higher >= lower - slack for lower, higher in itertools.pairwise(soft))


@given(CRITICS, TEMPERATURES, st.floats(-1e5, 1e5))
def test_soft_min_moves_with_a_constant_added_to_all_critics(numbers: list[float], temperature: float, shift: float):
    values = values_of(numbers)
    moved = functional.soft_min(values + shift, temperature) - functional.soft_min(values, temperature)
    assert moved.item() == pytest.approx(shift, abs=1e-7 * (1 + max(map(abs, numbers))))


@given(CRITICS, TEMPERATURES)
def test_soft_min_neither_overflows_nor_loses_its_gradient_in_single_precision(
    numbers: list[float], temperature: float
):
    values = values_of(numbers, th.float32).requires_grad_()
    soft = functional.soft_min(values, temperature)
    (gradient,) = th.autograd.grad(soft, values)
    assert math.isfinite(soft.item())
    assert gradient.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_soft_min_limits():
    values = values_of([[1.0, 2.0, 6.0]], th.float32)
    assert functional.soft_min(values, 0.0).item() == 1.0
    assert functional.soft_min(values, 1e-6).item() == pytest.approx(1.0, abs=1e-5)
    assert functional.soft_min(values, math.inf).item() == 3.0


def test_soft_min_of_a_large_finite_temperature_is_the_mean_in_single_precision():
    values = values_of([[1.0, 2.0, 6.0]], th.float32)
    for temperature in (1e4, 1e6, 1e8):
        # The next term of the expansion is variance / (2 a).
        expected = 3.0 - 14 / 3 / (2 * temperature)
        assert functional.soft_min(values, temperature).item() == pytest.approx(expected, abs=2e-6)


def test_a_traced_soft_min_has_only_operations_that_onnx_has():
    values = th.tensor([[1.0, 2.0], [3.0, -5.0]])
    traced = th.jit.trace(lambda tensor: functional.soft_min(tensor, 0.3), (values,))
    th.testing.assert_close(traced(2 * values), functional.soft_min(2 * values, 0.3))
    assert not {"aten::expm1", "aten::log1p"} & {node.kind() for node in traced.graph.nodes()}


def test_two_critics_a_distance_apart_cost_its_square_over_eight_temperatures():
    distance, temperature = 0.2, 0.3
    soft = functional.soft_min(values_of([1.0, 1.0 + distance]), temperature).item()
    assert 1.0 + distance / 2 - soft == pytest.approx(distance**2 / (8 * temperature), rel=0.02)


@pytest.mark.parametrize("temperature", [1e-2, 0.3, 10.0])
def test_the_gradient_of_soft_min_is_the_softmax_of_the_negated_values(temperature: float):
    values = values_of([[0.4, 0.1, 0.15], [5.0, -5.0, 0.0]]).requires_grad_()
    (gradient,) = th.autograd.grad(functional.soft_min(values, temperature).sum(), values)
    weights = np.exp(-(values.detach().numpy() - values.detach().numpy().min(-1, keepdims=True)) / temperature)
    np.testing.assert_allclose(gradient, weights / weights.sum(-1, keepdims=True), atol=1e-12)


def test_the_gradient_of_soft_min_agrees_with_finite_differences():
    values = values_of([[0.4, 0.1, 0.15], [0.3, -0.2, 0.0]]).requires_grad_()
    assert th.autograd.gradcheck(lambda v: functional.soft_min(v, 0.3), values)


def test_soft_min_of_one_critic_is_that_critic():
    values = th.randn(5, 1)
    assert th.equal(functional.soft_min(values, 0.3), values[:, 0])


@pytest.mark.parametrize("temperature", [-1.0, -1e-9, math.nan])
def test_soft_min_refuses_a_negative_temperature(temperature: float):
    with pytest.raises(ValueError, match="temperature"):
        functional.soft_min(th.zeros(1, 2), temperature)


# -- losses --------------------------------------------------------------------------------------------------------


def test_clipped_surrogate_agrees_with_numpy():
    log_ratio, advantages = th.randn(200) * 0.5, th.randn(200)
    ratio, advantage = np.exp(log_ratio.numpy()), advantages.numpy()
    expected = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    np.testing.assert_allclose(functional.clipped_surrogate(log_ratio, advantages, 0.2), expected, rtol=1e-5)


def test_clipped_surrogate_stops_pushing_only_where_the_push_goes_further_out():
    log_ratio = th.log(th.tensor([1.5, 1.5, 0.5, 0.5], dtype=th.float64)).requires_grad_()
    advantages = th.tensor([1.0, -1.0, 1.0, -1.0], dtype=th.float64)
    (gradient,) = th.autograd.grad(functional.clipped_surrogate(log_ratio, advantages, 0.2).sum(), log_ratio)
    # d(-A r) / d log r = -A r, where it is not clipped.
    np.testing.assert_allclose(gradient, [0.0, 1.5, -0.5, 0.0])


def test_every_critic_gets_the_gradient_of_its_own_error():
    values = th.randn(8, 3, dtype=th.float64, requires_grad=True)
    returns = th.randn(8, dtype=th.float64)
    (gradient,) = th.autograd.grad(functional.critic_error(values, returns).sum(), values)
    expected = 2 * (values.detach().numpy() - returns.numpy()[:, None]) / 3
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_critic_error_is_quadratic_inside_delta_and_linear_beyond():
    values, returns, delta = th.tensor([[0.5], [3.0]], dtype=th.float64), th.zeros(2, dtype=th.float64), 1.0
    np.testing.assert_allclose(functional.critic_error(values, returns, delta), [0.5**2, 2 * delta * 3.0 - delta**2])


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_huber_and_squared_error_are_the_same_inside_delta(numbers: list[float]):
    values, returns = values_of(numbers)[:, None], th.zeros(len(numbers), dtype=th.float64)
    squared = functional.critic_error(values, returns)
    np.testing.assert_allclose(squared, np.square(numbers), rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(functional.critic_error(values, returns, 1.0), squared, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("delta", [None, 0.5])
def test_a_clipped_critic_pays_for_its_clipped_value(delta: float | None):
    values, old, returns = th.randn(50, 2), th.randn(50, 2), th.randn(50)

    def error(prediction: np.ndarray) -> np.ndarray:
        distance = np.abs(prediction - returns.numpy()[:, None])
        return (
            distance**2 if delta is None else np.where(distance < delta, distance**2, 2 * delta * distance - delta**2)
        )

    clipped = old.numpy() + np.clip(values.numpy() - old.numpy(), -0.2, 0.2)
    expected = error(clipped).mean(-1)
    np.testing.assert_allclose(
        functional.critic_error(values, returns, delta, old, 0.2), expected, rtol=1e-4, atol=1e-6
    )
    assert np.abs(expected - error(values.numpy()).mean(-1)).max() > 0.1


def test_normalized_advantages_have_mean_zero_and_spread_one():
    advantages = th.randn(100, dtype=th.float64) * 7 + 3
    expected = (advantages.numpy() - advantages.numpy().mean()) / advantages.numpy().std(ddof=1)
    np.testing.assert_allclose(functional.normalize(advantages), expected, rtol=1e-6)


def test_a_single_advantage_and_equal_advantages_stay_finite():
    assert functional.normalize(th.tensor([3.0])).item() == 3.0
    assert functional.normalize(th.full((4,), 3.0)).abs().max().item() == 0.0


# -- exact divergences ---------------------------------------------------------------------------------------------


def test_categorical_kl_agrees_with_torch():
    p, q = (th.log_softmax(th.randn(6, 5, dtype=th.float64), -1) for _ in range(2))
    expected = th.distributions.kl_divergence(*(th.distributions.Categorical(logits=logits) for logits in (p, q)))
    np.testing.assert_allclose(functional.categorical_kl(p, q), expected, rtol=1e-12)


def test_actions_that_both_policies_exclude_add_nothing_to_the_kl():
    p = th.log_softmax(th.tensor([1.0, 0.0, -math.inf], dtype=th.float64), -1)
    q = th.log_softmax(th.tensor([0.0, 0.5, -math.inf], dtype=th.float64), -1)
    expected = functional.categorical_kl(p[:2], q[:2]).item()
    assert functional.categorical_kl(p, q).item() == pytest.approx(expected)


def test_excluding_an_action_does_not_poison_the_gradient_of_the_kl():
    logits = th.tensor([1.0, 0.0, 2.0], dtype=th.float64, requires_grad=True)
    mask = th.tensor([False, False, True])
    p = th.log_softmax(logits.masked_fill(mask, -math.inf), -1)
    q = th.log_softmax(th.tensor([0.0, 0.5, -math.inf], dtype=th.float64), -1)
    (gradient,) = th.autograd.grad(functional.categorical_kl(p, q), logits)
    assert th.isfinite(gradient).all()


# -- estimators: expectations are enumerated over four actions, so there is no sampling noise -----------------------

LOGITS = np.array([0.3, -0.6, 1.1, 0.2])
REFERENCE = np.array([-0.4, 0.5, 0.3, 0.9])
ROLLOUT = np.array([0.8, 0.1, -0.3, 0.0])


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * (np.log(p) - np.log(q))).sum())


def gradient_of_kl_to_reference() -> np.ndarray:
    """``dKL(pi || ref) / d logits = pi (log pi - log ref - KL)``."""
    pi, reference = softmax(LOGITS), softmax(REFERENCE)
    return pi * (np.log(pi) - np.log(reference) - kl(pi, reference))


def expectation(estimator, sampled_from: np.ndarray):
    """Mean of an estimator over actions drawn from fixed probabilities, as a function of the policy's logits.

    ``estimator(log pi, log ref, log rollout)`` for every action.
    """
    probabilities = th.from_numpy(softmax(sampled_from))
    log_reference = th.log_softmax(th.from_numpy(REFERENCE), -1)
    log_rollout = th.log_softmax(th.from_numpy(sampled_from), -1)

    def mean(logits: th.Tensor) -> th.Tensor:
        return (probabilities * estimator(th.log_softmax(logits, -1), log_reference, log_rollout)).sum()

    return mean


def value_and_gradient(mean) -> tuple[float, np.ndarray]:
    """Both at the policy's logits; autograd is held against finite differences on the way."""
    logits = th.tensor(LOGITS, requires_grad=True)
    assert th.autograd.gradcheck(mean, logits)
    value = mean(logits)
    (gradient,) = th.autograd.grad(value, logits)
    return value.item(), gradient.numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_closed_form_of_the_kl_gradient_agrees_with_finite_differences():
    step = 1e-6 * np.eye(4)
    reference = softmax(REFERENCE)
    slopes = [(kl(softmax(LOGITS + e), reference) - kl(softmax(LOGITS - e), reference)) / 2e-6 for e in step]
    np.testing.assert_allclose(gradient_of_kl_to_reference(), slopes, atol=1e-8)


def test_k1_is_the_kl_in_value_but_its_gradient_is_zero():
    value, gradient = value_and_gradient(expectation(lambda pi, ref, _: functional.k1(pi - ref), LOGITS))
    assert value == pytest.approx(kl(softmax(LOGITS), softmax(REFERENCE)))
    assert np.linalg.norm(gradient) < 1e-12


def test_k2_has_the_gradient_of_the_kl_on_policy():
    _, gradient = value_and_gradient(expectation(lambda pi, ref, _: functional.k2(pi - ref), LOGITS))
    true = gradient_of_kl_to_reference()
    assert cosine(gradient, true) == pytest.approx(1.0, abs=1e-12)
    assert np.linalg.norm(gradient) / np.linalg.norm(true) == pytest.approx(1.0, abs=1e-12)


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    log_ratio = th.log_softmax(th.from_numpy(LOGITS), -1) - th.log_softmax(th.from_numpy(REFERENCE), -1)
    # Score function: the reward -k1 is a number, the gradient of the loss comes from log pi alone.
    _, gradient = value_and_gradient(expectation(lambda pi, ref, _: functional.k1(log_ratio) * pi, LOGITS))
    np.testing.assert_allclose(gradient, gradient_of_kl_to_reference(), atol=1e-12)


def test_plain_k3_on_policy_has_the_gradient_of_the_other_kl():
    _, gradient = value_and_gradient(expectation(lambda pi, ref, _: functional.k3(ref - pi), LOGITS))
    # dKL(ref || pi) / d logits = pi - ref
    np.testing.assert_allclose(gradient, softmax(LOGITS) - softmax(REFERENCE), atol=1e-12)
    assert cosine(gradient, gradient_of_kl_to_reference()) < 0.999
    assert np.linalg.norm(gradient) / np.linalg.norm(gradient_of_kl_to_reference()) > 1.1


@pytest.mark.parametrize("sampled_from", [LOGITS, ROLLOUT], ids=["on-policy", "off-policy"])
def test_weighted_k3_is_the_kl_in_value_and_gradient_whoever_acted(sampled_from: np.ndarray):
    def estimator(pi: th.Tensor, ref: th.Tensor, rollout: th.Tensor) -> th.Tensor:
        return functional.weighted_k3(pi - ref, pi - rollout)

    value, gradient = value_and_gradient(expectation(estimator, sampled_from))
    assert value == pytest.approx(kl(softmax(LOGITS), softmax(REFERENCE)))
    np.testing.assert_allclose(gradient, gradient_of_kl_to_reference(), atol=1e-12)


def test_k2_off_policy_is_not_the_gradient_of_the_kl():
    _, gradient = value_and_gradient(expectation(lambda pi, ref, _: functional.k2(pi - ref), ROLLOUT))
    assert np.linalg.norm(gradient - gradient_of_kl_to_reference()) > 0.05


def test_k3_to_the_rollout_policy_is_the_kl_in_value_and_gradient():
    value, gradient = value_and_gradient(expectation(lambda pi, _, rollout: functional.k3(pi - rollout), ROLLOUT))
    assert value == pytest.approx(kl(softmax(ROLLOUT), softmax(LOGITS)))
    np.testing.assert_allclose(gradient, softmax(LOGITS) - softmax(ROLLOUT), atol=1e-12)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=8), st.floats(-5, 5))
def test_k2_and_k3_are_never_negative(log_ratios: list[float], log_importance: float):
    log_ratio = values_of(log_ratios)
    assert functional.k2(log_ratio).min() >= 0
    assert functional.k3(log_ratio).min() >= 0
    assert functional.weighted_k3(log_ratio, values_of([log_importance])).min() >= 0


def test_k3_of_a_tiny_ratio_keeps_its_digits_in_single_precision():
    log_ratio = th.tensor([1e-3, -1e-3])
    np.testing.assert_allclose(functional.k3(log_ratio), log_ratio.double().square() / 2, rtol=1e-3)


@given(st.floats(-6, 40), st.integers(2, 6))
def test_unlikelihood_lowers_the_logit_of_a_certain_action_as_strongly_as_of_any(log_odds: float, n: int):
    """In single precision, in which 1 - pi is 0 from log-odds of 17 on."""
    logits = th.tensor([log_odds + np.log(n - 1)] + [0.0] * (n - 1), dtype=th.float32, requires_grad=True)
    loss = functional.unlikelihood(functional.log_others(th.log_softmax(logits, -1), th.tensor(0)))
    probability = 1 / (1 + np.exp(-log_odds))
    assert loss.item() == pytest.approx(np.logaddexp(0, log_odds), rel=1e-5, abs=1e-6)
    (gradient,) = th.autograd.grad(loss, logits)
    np.testing.assert_allclose(gradient, [probability] + [-probability / (n - 1)] * (n - 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("excluded", [-1e8, -1e9, -np.inf])
def test_where_nothing_else_is_possible_there_is_no_unlikelihood(excluded: float):
    logits = th.tensor([[1.0, excluded, excluded], [1.0, 2.0, excluded]], requires_grad=True)
    log_others = functional.log_others(th.log_softmax(logits, -1), th.tensor([0, 0]))
    loss = functional.unlikelihood(log_others)
    np.testing.assert_allclose(loss.detach(), [0, np.log1p(np.exp(-1))], rtol=1e-5)
    (gradient,) = th.autograd.grad(loss.sum(), logits)
    np.testing.assert_allclose(gradient[0], np.zeros(3))
    np.testing.assert_allclose(gradient[1], np.array([1, -1, 0]) / (1 + np.e), rtol=1e-5)


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5))
def test_of_several_choices_at_least_one_is_another_unless_all_are_as_they_were(probabilities: list[float]):
    p = values_of(probabilities)
    expected = np.log(1 - np.prod(probabilities))
    np.testing.assert_allclose(functional.log_any_other(p.log(), th.log1p(-p)), expected, rtol=1e-5, atol=1e-6)


def test_what_is_known_of_a_log_probability_alone_is_finite_at_the_ends():
    log_prob = th.tensor([0.0, 1e-7, -1e-7, -1.0, -100.0], requires_grad=True)
    complement = functional.log_complement(log_prob)
    (gradient,) = th.autograd.grad(complement.sum(), log_prob)
    assert th.isfinite(complement).all()
    assert th.isfinite(gradient).all()
    assert complement.min().item() > -14
    np.testing.assert_allclose(complement[3:].detach(), [np.log1p(-np.exp(-1)), 0], atol=1e-5)
