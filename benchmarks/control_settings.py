"""What the control benchmark compares: algorithms, stress on their hyperparameters, SAFE's layers; a run by name."""

import inspect
import math
from typing import Any

from runs import Run
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import LinearSchedule

from sb3_safe import SAFE, SafeController, TwinCriticPolicy
from sb3_safe.controller import Reference, controller_defaults
from sb3_safe.presets import preset
from sb3_safe.trust_bound import MAX_PREVIEW_KL

# What PPO and SAFE have in common. A preset's value wins over SB3's default; nothing here is SAFE's own.
SHARED = (
    "learning_rate", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "clip_range_vf",
    "normalize_advantage", "ent_coef", "vf_coef", "max_grad_norm", "use_sde", "sde_sample_freq",
)  # fmt: skip
NOISE = 1.0
"""Standard deviation of the noise on the reward, in root mean squares of a random policy's step rewards."""
BIAS = 1.0
"""What is added to the critic's targets, in running standard deviations of the returns."""
SETTINGS: dict[str, dict[str, Any]] = {
    "tuned": {},
    "long": {},
    "lr-x5": {"learning_rate": 5.0},
    "lr-x20": {"learning_rate": 20.0},
    "clip-1": {"clip_range": 1.0},
    "epochs-x4": {"n_epochs": 4},
    "reward-noise": {"noise": NOISE},
    "biased-critic": {"bias": BIAS},
}
STRESS = tuple(name for name, stress in SETTINGS.items() if stress)

ABLATED = ("CartPole-v1", "Pendulum-v1", "MountainCar-v0")
"""Tasks of the ablation suite: what its aggregates are over, whatever other task a variant was tried on."""

# A layer of SAFE, and what turns it off. With all of them off SAFE is PPO.
LAYERS: dict[str, dict[str, Any]] = {
    "soft-min": {"policy_kwargs": {"n_critics": 1}},
    "huber": {"huber_delta": None},
    "penalty": {"kl_controller": "none"},
    "gate": {"kl_controller_kwargs": {"entropy_gate": False}},
    "threshold": {"kl_controller_kwargs": {"threshold": "constant"}},
    "drift": {"kl_controller_kwargs": {"max_drift": None}},
    "preview": {"max_preview_kl": None},
}


def without(*layers: str) -> dict[str, Any]:
    """Arguments of SAFE that turn some of its layers off."""
    arguments: dict[str, Any] = {}
    for layer in layers:
        for name, value in LAYERS[layer].items():
            arguments[name] = arguments.get(name, {}) | value if isinstance(value, dict) else value
    if "penalty" in layers:  # a controller that is none takes no arguments
        arguments.pop("kl_controller_kwargs", None)
    return arguments


def only(*layers: str) -> dict[str, Any]:
    """Arguments of SAFE that turn all but some of its layers off."""
    return without(*(layer for layer in LAYERS if layer not in layers))


VARIANTS: dict[str, dict[str, Any]] = {
    "safe-no-soft-min": without("soft-min"),
    "safe-no-huber": without("huber"),
    "safe-no-penalty": without("penalty"),
    "safe-no-gate": without("gate"),
    "safe-no-preview": without("preview"),
    "safe-constant": {"kl_controller_kwargs": {"threshold": "constant"}},
    "safe-paper": {"kl_controller_kwargs": {"threshold": "paper"}},
    # Two critics, of which the mean is used: without their pessimism; and with the most of it.
    "safe-mean": {"policy_kwargs": {"soft_min_alpha": math.inf}},
    "safe-min": {"policy_kwargs": {"soft_min_alpha": 0.0}},
    "safe-off": only(),
    "only-soft-min": only("soft-min"),
    "only-huber": only("huber"),
    "only-penalty": only("penalty"),
    # Gate and threshold act through the penalty, so that "alone" is the penalty with the one of them.
    "only-penalty-gate": only("penalty", "gate"),
    "only-penalty-threshold": only("penalty", "threshold"),
    "only-preview": only("preview"),
}
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "ppo": (PPO, {}),
    "ppo-target-kl": (PPO, {"target_kl": 0.03}),
    "trpo": (TRPO, {}),
    "safe": (SAFE, {}),
    **{name: (SAFE, arguments) for name, arguments in VARIANTS.items()},
}


def arguments_of(run: Run) -> dict[str, Any]:
    """Constructor arguments of a run: shared hyperparameters, then the stress on them, then the algorithm's own.

    :raises ValueError: the stress is on something that the algorithm does not have.
    """
    settings, (algorithm, own) = preset(run.task), ALGORITHMS[run.algorithm]
    defaults = {name: parameter.default for name, parameter in inspect.signature(PPO).parameters.items()}
    accepted = inspect.signature(algorithm.__init__).parameters
    arguments = {name: settings.get(name, defaults[name]) for name in SHARED}
    for name, stress in SETTINGS[run.setting].items():
        if name in ("noise", "bias"):
            continue
        if name not in accepted:
            raise ValueError(f"{run.setting} stresses {name}, which {run.algorithm} does not have")
        arguments[name] = stress if name == "clip_range" else scaled(arguments[name], stress)
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    policy_kwargs = settings.get("policy_kwargs", {}) | own.get("policy_kwargs", {})
    return arguments | own | {"policy_kwargs": policy_kwargs}


def scaled(value: Any, factor: float) -> Any:
    """A number or linear schedule, times a factor."""
    if isinstance(value, LinearSchedule):
        return LinearSchedule(value.start * factor, value.end * factor, value.end_fraction)
    return value * factor


def described(run: Run) -> dict[str, Any]:
    """Everything that decides a run's outcome but the code, as JSON: what tells whether a result is still valid."""
    settings, description = preset(run.task), dict(arguments_of(run))
    if ALGORITHMS[run.algorithm][0] is SAFE:
        # Written out, because a default that is changed changes the run.
        n_actions = description["n_steps"] * settings["n_envs"]
        description = safe_defaults(TwinCriticPolicy, SafeController, "rollout", n_actions) | description
    return {
        **run._asdict(),
        "n_envs": settings["n_envs"],
        "normalize": settings.get("normalize", False),
        "stress": SETTINGS[run.setting],
        "arguments": plain(description),
    }


def safe_defaults(policy: type, controller: type, reference: Reference, n_actions: int) -> dict[str, Any]:
    """Defaults of SAFE's own arguments, of its controller's and of its policy's.

    :param policy: class of the policy.
    :param controller: class of the KL controller.
    :param reference: what the KL is measured to by default with that policy.
    :param n_actions: of a rollout.
    """
    shared = inspect.signature(PPO.__init__).parameters

    def defaults(function: Any) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.items()
        return {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}

    own = {name: value for name, value in defaults(SAFE.__init__).items() if name not in shared}
    critics = {name: defaults(policy.__init__).get(name) for name in ("n_critics", "soft_min_alpha")}
    constants = defaults(controller.__init__)
    if "tau_base" in constants:
        constants |= controller_defaults(reference, n_actions)
    own["max_preview_kl"] = MAX_PREVIEW_KL[reference]
    omitted = ("n_envs", "env_kwargs")
    kept = {name: value for name, value in own.items() if name not in omitted}
    return kept | {"defaults": {"policy": critics, "controller": constants, "target_kl": None}}


def plain(value: Any) -> Any:
    """Arguments as JSON has them."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, LinearSchedule):
        return f"lin_{value.start:.6g}"
    if isinstance(value, type):
        return value.__name__
    known = value is None or (isinstance(value, bool | int | float | str) and value != math.inf)
    return value if known else repr(value)  # JSON has no word for infinity
