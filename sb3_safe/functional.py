"""The mathematics of SAFE and PPO as pure functions: tensors in, tensors out, no state.

Shapes: ``B`` actions of a minibatch, ``K`` critics, ``A`` actions of a discrete distribution.
KL divergences and log-probabilities are in nats per action (for text: per token).
"""

import math

import torch as th
from torch import Tensor
from torch.nn import functional as F

# Probability ratios are cut off at e^20: beyond, exp() overflows and its gradient is NaN, where "far too large" is all
# that needs to be known.
MAX_LOG_RATIO = 20.0
# Probability that is left for everything else where an action is certain: keeps 1 / (1 - pi) finite.
CERTAINTY = 1e-6
# Below it a log-probability is that of an action that a mask excludes, not of an improbable one.
EXCLUDED = -1e7
# As a log-probability, nothing; finite, so that its gradient is 0 and not NaN.
NOTHING = -1e9


def soft_min(values: Tensor, temperature: float) -> Tensor:
    """Pessimistic aggregate of K critics: ``-a (logsumexp_k(-V_k / a) - log K)``.

    The minimum over critics at ``a = 0``, their mean at ``a = inf``, never below the minimum and never above the
    mean. For two critics a distance ``d`` apart it lies about ``d^2 / (8 a)`` below the mean. The minimum is
    taken out first, so that neither a tiny temperature nor huge values overflow, and what is left is written with
    ``expm1`` and ``log1p``, so that a large temperature does not magnify rounding. (Not in an export by
    ``torch.jit``'s tracing, as ONNX has neither.)

    :param values: ``[..., K]``
    :param temperature: ``a >= 0``, in the units of ``values``.
    :return: ``[...]``
    :raises ValueError: negative temperature.

    See SAFE, double soft-min critic, https://arxiv.org/abs/2602.04651
    """
    if not temperature >= 0:
        raise ValueError(f"soft_min: temperature must be at least 0, got {temperature}")
    if values.shape[-1] == 1:
        return values[..., 0]
    if temperature == 0:
        return values.amin(dim=-1)
    if temperature == math.inf:
        return values.mean(dim=-1)
    lowest = values.detach().amin(dim=-1, keepdim=True)
    excess = (lowest - values) / temperature
    traced = th.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    pooled = excess.exp().mean(dim=-1).log() if traced else th.log1p(th.expm1(excess).mean(dim=-1))
    return lowest[..., 0] - temperature * pooled


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's objective as a loss per action: ``-min(r A, clip(r, 1 - e, 1 + e) A)``.

    :param log_ratio: ``[B]``, log-probability under the policy less that under the rollout policy.
    :param advantages: ``[B]``
    :param clip_range: ``e``
    :return: ``[B]``

    See Schulman et al. 2017, equation 7, https://arxiv.org/abs/1707.06347
    """
    ratio = th.exp(log_ratio.clamp(max=MAX_LOG_RATIO))
    return -th.min(advantages * ratio, advantages * th.clamp(ratio, 1 - clip_range, 1 + clip_range))


def critic_error(
    values: Tensor,
    returns: Tensor,
    delta: float | None = None,
    old_values: Tensor | None = None,
    clip_range: float | None = None,
) -> Tensor:
    """Regression of EACH critic on the returns; the mean over critics.

    Regressing the soft-min instead would fit the aggregate to the return and so take the pessimism out again.
    The error is squared up to ``delta`` and linear beyond: ``2 huber_delta(e)``, which is ``e^2`` inside, so
    that ``vf_coef`` means what it means in PPO. With a clip range the error is that of the clipped value, as in
    SB3's PPO (PPO's first implementation takes the larger of that and the unclipped error, the published code adds
    them).

    :param values: ``[B, K]``
    :param returns: ``[B]``
    :param delta: in units of the return; ``None`` for the squared error.
    :param old_values: ``[B, K]``, the same critics when the rollout was collected; needed for clipping.
    :param clip_range: how far a critic may move from ``old_values``, in units of the return.
    :return: ``[B]``, in squared units of the return.

    See SAFE, section on the critic, https://arxiv.org/abs/2602.04651
    """
    if clip_range is not None and old_values is not None:
        values = old_values + th.clamp(values - old_values, -clip_range, clip_range)
    targets = returns.unsqueeze(-1).expand_as(values)
    if delta is None:
        error = F.mse_loss(values, targets, reduction="none")
    else:
        error = 2.0 * F.huber_loss(values, targets, reduction="none", delta=delta)
    return error.mean(dim=-1)


def k1(log_ratio: Tensor) -> Tensor:
    """Sampled KL as the plain log-ratio: unbiased in value, and its gradient is ZERO on average.

    For the reward and for measuring; never for a loss. May be negative.

    :param log_ratio: ``[B]``, ``log pi - log ref`` of actions drawn from ``pi``.
    :return: ``[B]``
    """
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """``(log pi - log ref)^2 / 2``: on actions drawn from ``pi`` its expected gradient is that of KL(pi || ref).

    :param log_ratio: ``[B]``, ``log pi - log ref`` of actions drawn from ``pi``.
    :return: ``[B]``, never negative.

    See Schulman, http://joschu.net/blog/kl-approx.html, and https://arxiv.org/abs/2510.01555
    """
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """``r - 1 - log r`` with ``r = p / q``, of actions drawn from ``q``: KL(q || p), value and gradient unbiased.

    This is the KL of a rollout policy ``q`` to the policy ``p`` that is being trained. Against a reference
    that the actions are NOT drawn from use :func:`weighted_k3`.

    :param log_ratio: ``[B]``, ``log p - log q``.
    :return: ``[B]``, never negative.

    See Schulman, http://joschu.net/blog/kl-approx.html
    """
    log_ratio = log_ratio.clamp(max=MAX_LOG_RATIO)
    return th.expm1(log_ratio) - log_ratio


def weighted_k3(log_ratio: Tensor, log_importance: Tensor) -> Tensor:
    """Importance-weighted k3: KL(pi || ref) from actions drawn from a third policy, value and gradient unbiased.

    ``w (ref/pi - 1 - log(ref/pi))`` with ``w = pi / rollout``; the gradient flows through the weight too (k3
    alone would give the gradient of KL(ref || pi)).

    :param log_ratio: ``[B]``, ``log pi - log ref``.
    :param log_importance: ``[B]``, ``log pi - log rollout``, of actions drawn from the rollout policy.
    :return: ``[B]``, never negative.

    See https://arxiv.org/abs/2512.21852
    """
    return th.exp(log_importance.clamp(max=MAX_LOG_RATIO)) * k3(-log_ratio)


def unlikelihood(log_others: Tensor) -> Tensor:
    """``-log(1 - pi)`` per action, a loss that lowers its probability also where the policy is certain of it.

    There ``grad log pi`` vanishes, and with it whatever a reward or a KL says through the policy gradient; the
    gradient of this loss by the action's logit is ``pi``. It vanishes where the action is improbable.

    :param log_others: ``[B]``, ``log(1 - pi)`` of discrete actions; see :func:`log_others`.
    :return: ``[B]``, nats; 0 where nothing else is possible.

    See Welleck et al. 2019, https://arxiv.org/abs/1908.04319
    """
    return -th.where(log_others > EXCLUDED, log_others, th.zeros_like(log_others))


def log_others(log_probs: Tensor, actions: Tensor) -> Tensor:
    """``log(1 - pi(a))`` as the probability of all other actions: ``logsumexp_{b != a} log pi(b)``.

    ``1 - pi(a)`` itself is 0 in single precision as soon as the log-odds pass 16, and so is its gradient.

    :param log_probs: ``[..., A]``, normalised log-probabilities.
    :param actions: ``[...]``
    :return: ``[...]``, nats; below :data:`EXCLUDED` where nothing else is possible.
    """
    return log_probs.scatter(-1, actions.unsqueeze(-1), NOTHING).logsumexp(dim=-1)


def log_any_other(log_probs: Tensor, log_others: Tensor) -> Tensor:
    """Log-probability that at least one of D independent choices is another: ``log(1 - prod_d pi_d)``.

    The first that differs may be any: ``1 - prod_d pi_d = sum_d (prod_{e < d} pi_e) (1 - pi_d)``.

    :param log_probs: ``[..., D]``, ``log pi_d``
    :param log_others: ``[..., D]``, ``log(1 - pi_d)``
    :return: ``[...]``, nats.
    """
    before = log_probs.cumsum(dim=-1) - log_probs
    return (before + log_others).logsumexp(dim=-1)


def log_complement(log_prob: Tensor) -> Tensor:
    """``log(1 - pi)`` where ``log pi`` is all that is known of a distribution.

    In single precision its gradient fades where the log-odds pass 14: prefer :func:`log_others`.

    :param log_prob: ``[B]``, of discrete actions.
    :return: ``[B]``, nats, at least -14.
    """
    return th.log(CERTAINTY - th.expm1(log_prob.clamp(max=0.0)))


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Exact ``KL(p || q)`` of categorical distributions: ``sum_a p_a (log p_a - log q_a)``.

    :param log_p: ``[..., A]``, normalised log-probabilities.
    :param log_q: ``[..., A]``, likewise.
    :return: ``[...]``
    """
    # An action that p excludes contributes nothing, also where q excludes it as well: 0 * (-inf - -inf) would be NaN,
    # and outside the product so would its gradient.
    log_ratio = th.where(log_p > -th.inf, log_p - log_q, th.zeros_like(log_p))
    return (th.exp(log_p) * log_ratio).sum(dim=-1)


def normalize(advantages: Tensor) -> Tensor:
    """Zero mean and unit standard deviation over the minibatch; a single value is left as it is.

    :param advantages: ``[B]``
    :return: ``[B]``

    See https://github.com/DLR-RM/stable-baselines3/issues/325 for the single value.
    """
    if len(advantages) < 2:
        return advantages
    std, mean = th.std_mean(advantages)
    return (advantages - mean) / (std + 1e-8)
