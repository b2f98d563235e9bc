"""KL controllers: how strongly, and beyond which threshold, drift from the reference policy is penalised.

A controller is plain Python with a small state. It is told once per rollout what the rollout showed (returns of
the finished episodes, KL to the reference, entropy) and answers with the coefficient of the KL term. It is saved
with the model. :class:`SafeController` is the paper's; the others are the usual baselines.
"""

import inspect
import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any, Literal

Phase = Literal["WARMUP", "CLIMBING", "PLATEAU", "CONVERGED"]
PHASES: tuple[Phase, ...] = ("WARMUP", "CLIMBING", "PLATEAU", "CONVERGED")
Threshold = Literal["earned", "paper", "constant"]
Reference = Literal["initial", "rollout"]
Estimator = Literal["k1", "k2", "k3", "exact"]

# Which estimators have the right gradient against which reference; the first is the default.
ESTIMATORS: dict[Reference, tuple[Estimator, ...]] = {"initial": ("k1", "k2", "k3", "exact"), "rollout": ("k3",)}


def rollout_threshold(n_actions: int) -> float:
    """KL that an update is free to take against the policy that wrote the rollout: ``ceiling / (1 + noise / n)``.

    Advantages of few actions are mostly noise, and so is a step along them. Where the gradient of ``B`` samples has as
    much noise as signal, the best learning rate on ``n`` samples is ``1 / (1 + B / n)`` of that without noise. The
    squared length of such a gradient is larger by ``1 + B / n``, so the squared length of the best step, which its KL
    goes with, is again ``1 / (1 + B / n)`` of the largest. The two constants were chosen on control tasks
    (``benchmarks/README.md``): 0.1 nats and 1024 actions, so 0.02 for a rollout of 256 and 0.08 for one of 4096.

    :param n_actions: of a rollout, over all environments; at least 1.
    :return: nats per action.

    See McCandlish et al. 2018, section 2.2, https://arxiv.org/abs/1812.06162
    """
    return 0.1 / (1 + 1024 / n_actions)


def controller_defaults(reference: Reference, n_actions: int) -> dict[str, float | None]:
    """What a SAFE controller takes where it is told nothing else, and its own defaults do not fit.

    :param reference: what the KL is measured to.
    :param n_actions: of a rollout, over all environments.
    :return: arguments of :class:`SafeController`.
    """
    if reference == "initial":
        return {}
    # The rollout policy is near and always the last one: a penalty against it is a brake, distance itself has no price.
    return {"coef": 2.0, "price": 0.0, "tau_base": rollout_threshold(n_actions), "max_drift": None}


class KLController:
    """Base of all KL controllers, and the interface of your own.

    Where the coefficient acts is not the controller's business: ``SAFE(kl_estimator="k1")`` subtracts the KL from
    the reward of each action, the other estimators are terms of the loss.
    """

    active = True
    max_drift: float | None = None
    """Against the starting policy: nats by which ``log pi`` may exceed ``log ref`` of one action. Beyond it, and where
    actions are discrete, :func:`~sb3_safe.functional.unlikelihood` pushes it down, ``coef`` times."""
    coef: float = 0.0

    def update(self, returns: Sequence[float], kl: float, entropy: float) -> None:
        """Take in one rollout.

        :param returns: undiscounted returns of the episodes that ended in it; may be empty.
        :param kl: mean KL to the reference, nats per action; NaN or infinite where it could not be measured.
        :param entropy: mean entropy of the policy, nats per action dimension.
        """

    def coefficient(self, kl: float = 0.0) -> float:
        """Coefficient of the KL term, never negative.

        :param kl: KL to the reference measured in the minibatch at hand, nats per action.
        """
        return 0.0

    def reward_coefficient(self) -> float:
        """Coefficient of the KL in the reward, never negative, in units of reward per nat."""
        return self.coefficient()

    def resize(self, reference: Reference, n_actions: int) -> None:
        """Go on with rollouts of another size, where nobody gave a threshold; most controllers have no use for it.

        :param reference: what the KL is measured to.
        :param n_actions: of a rollout, over all environments.
        """

    def metrics(self) -> dict[str, float]:
        """What to log, by name."""
        return {}


class NoKL(KLController):
    """No KL penalty: plain PPO."""

    active = False


class FixedKL(KLController):
    """A constant coefficient, as in most PPO for language models.

    :param coef: coefficient of the KL term, reward units per nat.
    :raises ValueError: negative coefficient.
    """

    def __init__(self, coef: float = 0.05) -> None:
        _require(coef >= 0, "coef", coef, "at least 0")
        self.coef = coef

    def coefficient(self, kl: float = 0.0) -> float:
        """See :meth:`KLController.coefficient`."""
        return self.coef

    def metrics(self) -> dict[str, float]:
        """See :meth:`KLController.metrics`."""
        return {"coefficient": self.coef}


class AdaptiveKL(FixedKL):
    """Ziegler's proportional controller: the coefficient follows the KL towards a target.

    ``coef <- coef (1 + clip(kl / target - 1, -0.2, 0.2) / horizon)`` once per rollout whose KL is finite.

    :param coef: first coefficient.
    :param target: wanted KL, nats per action.
    :param horizon: rollouts over which a clipped error adds up to 20 %.
    :raises ValueError: a parameter outside its range.

    See Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593
    """

    def __init__(self, coef: float = 0.05, target: float = 0.25, horizon: float = 10.0) -> None:
        super().__init__(coef)
        _require(target > 0, "target", target, "positive")
        _require(horizon > 0, "horizon", horizon, "positive")
        self.target = target
        self.horizon = horizon

    def update(self, returns: Sequence[float], kl: float, entropy: float) -> None:
        """See :meth:`KLController.update`."""
        if not math.isfinite(kl):
            return
        self.coef *= 1 + _clip(kl / self.target - 1, -0.2, 0.2) / self.horizon


class SafeController(KLController):
    """The entropy-gated asymmetric penalty with a moving threshold (layers 2 to 4 of SAFE).

    The penalty is ``c gate tau_base ((s - tau) / tau_base)^2`` above the threshold, and below it only the linear
    ``price``, which every nat has. Its derivative with respect to the KL is the coefficient that multiplies a KL term
    with a gradient:

        ``coefficient = price + 2 c gate max(0, (s - tau) / tau_base)``,  ``s = max(kl_short, kl of the minibatch)``

    Where the KL is in the reward, the coefficient is in units of the reward's spread, the largest that was seen.

    - **KL trackers**: ``kl_short`` and ``kl_long`` are moving averages that start at the first measurement (against the
      rollout policy that is 0, before the first update). A KL that is not finite is no measurement.
    - **Entropy gate**: ``gate = clip(exp(floor - H), 0.5, 10)``, the ratio of the floor's perplexity to the policy's.
      With two actions the automatic floor is 0, and the gate at most 1.
    - **PID**: error = velocity of the reward's moving average less ``target_velocity``, the reward in units of its
      running spread, so that returns of 0.7 and of -1000 are treated alike. The integral stands still while the
      threshold is clipped and the error pushes it further out.
    - **Phase**: WARMUP, then CLIMBING while the mean of a window exceeds that of the window before, CONVERGED when
      reward is steady and high, else PLATEAU. Means are relative to the first reward, in units of spread.
    - **Lost actions**: a policy can become certain of an action that the reference would never take, of one token over
      and over for instance. There its gradient vanishes, and no penalty in the reward gets it back: see ``max_drift``.
    - **Threshold**: ``"paper"``: ``tau = clip(tau_base (1 + pid) phase, tau_base / 3, 2 tau_base)``.
      ``"earned"``: while reward rises the threshold may follow ``kl_short`` upwards, by at most ``max_step`` of
      ``tau_base`` a rollout and up to ``max_threshold`` of it; when reward stagnates it stays on what was earned,
      so drift stops and nothing is pulled back. ``"constant"``: ``tau = tau_base``.

    Defaults are the paper's numbers at the paper's scale (a reward whose spread is 1), but for the price and the earned
    threshold. Against the rollout policy SAFE takes others.

    :param coef: ``c``, strength of the penalty above the threshold.
    :param price: coefficient of the KL below the threshold, where the paper has none. Against the starting policy a
        policy for which KL is free spends it on what the reward model overrates.
    :param tau_base: nats per action: 0.3 a token against the starting policy (paper); against the rollout policy SAFE
        takes :func:`rollout_threshold`.
    :param threshold: ``"earned"``, ``"paper"`` or ``"constant"``.
    :param max_step: largest relaxation of the earned threshold per rollout, in units of ``tau_base``.
    :param max_threshold: ceiling of the earned threshold, in units of ``tau_base``.
    :param max_drift: nats by which the log-probability of an action may exceed the starting policy's; beyond it its
        probability is pushed down, with strength ``c``. ``None``: no limit. Discrete actions, and
        ``kl_reference="initial"``, only.
    :param entropy_gate: whether entropy amplifies the penalty; off: ``gate = 1``.
    :param entropy_floor: nats per action dimension, or ``"auto"``: half the perplexity of the first rollout.
    :param kp: proportional gain.
    :param ki: integral gain.
    :param kd: derivative gain.
    :param target_velocity: wanted rise of the reward per rollout, in units of its spread.
    :param reward_decay: decay of the reward's moving average.
    :param kl_short_decay: decay of the fast KL tracker.
    :param kl_long_decay: decay of the slow KL tracker.
    :param warmup: rollouts of the WARMUP phase.
    :param window: rollouts of a window of the phase detector.
    :raises ValueError: a parameter outside its range.

    See SAFE, https://arxiv.org/abs/2602.04651; on the PID, Stooke et al. 2020, https://arxiv.org/abs/2007.03964
    """

    phase_factors: dict[Phase, float] = {  # noqa: RUF012
        "WARMUP": 1.5,
        "CLIMBING": 1.2,
        "PLATEAU": 0.8,
        "CONVERGED": 1.0,
    }
    gate_limits = (0.5, 10.0)
    integral_limit = 1.0
    climbing_rise = 0.01
    converged_spread = 0.02
    converged_level = 0.7
    spread_decay = 0.99

    def __init__(
        self,
        coef: float = 0.1,
        price: float = 0.05,
        tau_base: float = 0.3,
        threshold: Threshold = "earned",
        max_step: float = 1 / 30,
        max_threshold: float = 3.0,
        max_drift: float | None = 10.0,
        entropy_gate: bool = True,
        entropy_floor: float | Literal["auto"] = "auto",
        kp: float = 0.3,
        ki: float = 0.01,
        kd: float = 0.05,
        target_velocity: float = 0.001,
        reward_decay: float = 0.95,
        kl_short_decay: float = 0.9,
        kl_long_decay: float = 0.99,
        warmup: int = 50,
        window: int = 50,
    ) -> None:
        _require(coef >= 0, "coef", coef, "at least 0")
        _require(price >= 0, "price", price, "at least 0")
        _require(tau_base > 0, "tau_base", tau_base, "positive")
        _require(
            threshold in ("earned", "paper", "constant"), "threshold", threshold, "'earned', 'paper' or 'constant'"
        )
        _require(max_step >= 0, "max_step", max_step, "at least 0")
        _require(max_threshold >= 1, "max_threshold", max_threshold, "at least 1")
        _require(max_drift is None or max_drift > 0, "max_drift", max_drift, "positive, or None for no limit")
        for name, decay in (
            ("reward_decay", reward_decay),
            ("kl_short_decay", kl_short_decay),
            ("kl_long_decay", kl_long_decay),
        ):
            _require(0 <= decay < 1, name, decay, "in [0, 1)")
        _require(warmup >= 0, "warmup", warmup, "at least 0")
        _require(window >= 2, "window", window, "at least 2")
        is_floor = entropy_floor == "auto" or (not isinstance(entropy_floor, str) and math.isfinite(entropy_floor))
        _require(is_floor, "entropy_floor", entropy_floor, "'auto' or a finite number of nats")
        self.coef = coef
        self.price = price
        self.tau_base = tau_base
        self.threshold_rule = threshold
        self.max_step = max_step
        self.max_threshold = max_threshold
        self.max_drift = max_drift
        self.entropy_gate = entropy_gate
        self.entropy_floor = entropy_floor
        self.kp, self.ki, self.kd = kp, ki, kd
        self.target_velocity = target_velocity
        self.reward_decay = reward_decay
        self.kl_short_decay = kl_short_decay
        self.kl_long_decay = kl_long_decay
        self.warmup = warmup
        self.window = window

        self.n_updates = 0
        self.threshold = tau_base
        self.kl_short = self.kl_long = 0.0
        self.gate = 1.0
        self.phase: Phase = "WARMUP"
        self.first_reward: float | None = None
        self.reward_ema = 0.0
        self.reward_variance = 0.0
        self.reward_scale = 0.0
        self.velocity = 0.0
        self.error = 0.0
        self.integral = 0.0
        self.pid = dict.fromkeys("pid", 0.0)
        self.rewards: deque[float] = deque(maxlen=2 * window)

    def update(self, returns: Sequence[float], kl: float, entropy: float) -> None:
        """Take in one rollout; see :meth:`KLController.update`. Called once per rollout, before it is trained on."""
        first = self.n_updates == 0
        self.n_updates += 1
        if math.isfinite(kl):  # anything else would stay in the averages for good
            self.kl_short = kl if first else _moving_average(self.kl_short, kl, self.kl_short_decay)
            self.kl_long = kl if first else _moving_average(self.kl_long, kl, self.kl_long_decay)
        self._update_gate(entropy)
        if len(returns) > 0:
            self._update_reward(returns)
            self._update_pid()
        self.phase = self._detect_phase()
        self._update_threshold(fresh=len(returns) > 0)

    def coefficient(self, kl: float = 0.0) -> float:
        """``price + 2 c gate max(0, (s - tau) / tau_base)``: the derivative of the penalty.

        :param kl: KL to the reference in the minibatch at hand, nats per action; negative ones never count.
        """
        excess = (max(self.kl_short, kl) - self.threshold) / self.tau_base
        return self.price + 2.0 * self.coef * self.gate * max(0.0, excess)

    def reward_coefficient(self) -> float:
        """The same in units of the largest spread of rewards seen: that falls as a policy settles, a price must not."""
        return self.coefficient() * self.reward_scale

    def resize(self, reference: Reference, n_actions: int) -> None:
        """See :meth:`KLController.resize`. ``tau_base`` is the rule's, and the threshold goes along."""
        if reference == "rollout":
            self.threshold *= rollout_threshold(n_actions) / self.tau_base
            self.tau_base = rollout_threshold(n_actions)

    def metrics(self) -> dict[str, float]:
        """See :meth:`KLController.metrics`."""
        return {
            "threshold": self.threshold,
            "kl_short": self.kl_short,
            "kl_long": self.kl_long,
            "coefficient": self.coefficient(),
            "gate": self.gate,
            "entropy_floor": math.nan if self.entropy_floor == "auto" else float(self.entropy_floor),
            "phase": float(PHASES.index(self.phase)),
            "reward_ema": self.reward_ema,
            "reward_spread": self.spread,
            "reward_velocity": self.velocity,
            "pid_p": self.pid["p"],
            "pid_i": self.pid["i"],
            "pid_d": self.pid["d"],
        }

    @property
    def spread(self) -> float:
        """Running standard deviation of episode returns, the unit of reward in here."""
        return math.sqrt(self.reward_variance)

    def _update_gate(self, entropy: float) -> None:
        if self.entropy_floor == "auto":
            self.entropy_floor = entropy - math.log(2.0)
        if self.entropy_gate:
            # Clipped before exp as well, so that an entropy of -1000 does not overflow.
            self.gate = _clip(math.exp(_clip(float(self.entropy_floor) - entropy, -50.0, 50.0)), *self.gate_limits)

    def _update_reward(self, returns: Sequence[float]) -> None:
        reward = fmean(returns)
        if self.first_reward is None:
            self.first_reward = self.reward_ema = reward
            self.reward_variance = pstdev(returns) ** 2
            self.velocity = 0.0
        else:
            variance = fmean((value - self.reward_ema) ** 2 for value in returns)
            # A first rollout with a single episode, or with equal returns, has no spread to start from.
            start = self.reward_variance or variance
            self.reward_variance = _moving_average(start, variance, self.spread_decay)
            before = self.reward_ema
            self.reward_ema = _moving_average(before, reward, self.reward_decay)
            self.velocity = (self.reward_ema - before) / self.spread if self.spread > 0 else 0.0
        self.reward_scale = max(self.reward_scale, self.spread)
        self.rewards.append(reward)

    def _update_pid(self) -> None:
        error = self.velocity - self.target_velocity
        outward = self._unclipped_threshold() - self._paper_threshold()
        if outward * error <= 0:
            self.integral = _clip(self.integral + error, -self.integral_limit, self.integral_limit)
        self.pid = {"p": self.kp * error, "i": self.ki * self.integral, "d": self.kd * (error - self.error)}
        self.error = error

    def _detect_phase(self) -> Phase:
        if self.n_updates <= self.warmup or not self.rewards or self.first_reward is None or self.spread == 0:
            return "WARMUP"
        levels = [(reward - self.first_reward) / self.spread for reward in self.rewards]
        recent, previous = levels[-self.window :], levels[: -self.window]
        if previous and fmean(recent) > fmean(previous) + self.climbing_rise:
            return "CLIMBING"
        if pstdev(recent) < self.converged_spread and fmean(recent) > self.converged_level:
            return "CONVERGED"
        return "PLATEAU"

    def _update_threshold(self, fresh: bool) -> None:
        if self.threshold_rule == "paper":
            self.threshold = self._paper_threshold()
        elif self.threshold_rule == "earned" and fresh and self.error > 0:
            relaxed = min(self.kl_short, self.threshold + self.max_step * self.tau_base)
            self.threshold = min(max(self.threshold, relaxed), self.max_threshold * self.tau_base)

    def _paper_threshold(self) -> float:
        return _clip(self._unclipped_threshold(), self.tau_base / 3, 2 * self.tau_base)

    def _unclipped_threshold(self) -> float:
        return self.tau_base * (1 + sum(self.pid.values())) * self.phase_factors[self.phase]


CONTROLLERS: dict[str, type[KLController]] = {
    "safe": SafeController,
    "fixed": FixedKL,
    "adaptive": AdaptiveKL,
    "none": NoKL,
}


def make_controller(
    controller: str | type[KLController], defaults: Mapping[str, Any], /, **kwargs: Any
) -> KLController:
    """Build a controller from its name or class.

    :param controller: one of :data:`CONTROLLERS`, or a subclass of :class:`KLController`.
    :param defaults: arguments of a :class:`SafeController` that ``kwargs`` does not have; a subclass with a constructor
        of its own gets those that it takes.
    :param kwargs: arguments of its constructor.
    :raises ValueError: unknown name, or an argument that the controller does not take or accept.
    """
    if isinstance(controller, str):
        if controller not in CONTROLLERS:
            raise ValueError(f"kl_controller={controller!r} is unknown; choose one of {sorted(CONTROLLERS)}")
        controller = CONTROLLERS[controller]
    if not (isinstance(controller, type) and issubclass(controller, KLController)):
        raise ValueError(
            f"kl_controller={controller!r} is not a class of KL controllers; pass the class or its name, for example "
            "FixedKL, and its arguments as kl_controller_kwargs"
        )
    if issubclass(controller, SafeController):
        takes = inspect.signature(controller).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        kwargs = {name: value for name, value in defaults.items() if takes_any or name in takes} | kwargs
    try:
        return controller(**kwargs)
    except TypeError as error:
        raise ValueError(f"kl_controller_kwargs do not fit {controller.__name__}: {error}") from error


def _moving_average(average: float, value: float, decay: float) -> float:
    return decay * average + (1 - decay) * value


def _clip(value: float, low: float, high: float) -> float:
    return min(high, max(low, value))


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
