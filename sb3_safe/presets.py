"""Recommended settings per environment id, from the one file that the RL Zoo entry reads too.

``SAFE("CartPole-v1")`` takes the preset of that id; an argument that is given always wins. ``SAFE("MlpPolicy",
"CartPole-v1")`` is the usual SB3 form and takes no preset but the budget of ``learn()``.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_safe.arguments import CONSTRUCTOR, KEYWORDS, checked

PRESETS_FILE = Path(__file__).with_name("presets.yml")
SCHEDULED = ("learning_rate", "clip_range", "clip_range_vf")


def entries() -> dict[str, dict[str, Any]]:
    """What the file has, as it is there: name -> settings."""
    with PRESETS_FILE.open(encoding="utf-8") as file:
        found: dict[str, dict[str, Any]] = yaml.safe_load(file)
        return found


def preset(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Recommended settings of an environment id: ``default`` of the file, overridden by the id's own entry.

    An entry ``<id>/<argument>`` overrides that in turn where the environment is given the argument.

    Keys are constructor arguments of SAFE, and ``n_timesteps`` (budget of ``learn()``), ``n_envs``, ``policy`` and
    ``normalize`` (whether observations and rewards are normalised by SB3's ``VecNormalize``), as in the RL Zoo.
    """
    presets = entries()
    name = env_id.rpartition(":")[2]
    settings: dict[str, Any] = presets["default"] | presets.get(name, {})
    for argument in env_kwargs or {}:
        settings |= presets.get(f"{name}/{argument}", {})
    for name in SCHEDULED:
        if name in settings:
            settings[name] = _schedule(settings[name])
    for name in KEYWORDS:
        if isinstance(settings.get(name), str):
            # An expression, as the Zoo has it for policy_kwargs: classes such as nn.ReLU have no other form in YAML.
            settings[name] = eval(settings[name], {"nn": nn, "dict": dict})
    return settings


def _schedule(value: float | str) -> Any:
    """Numbers as they are; the Zoo's ``lin_0.001`` as a schedule that falls linearly to 0."""
    if isinstance(value, str):
        kind, _, start = value.partition("_")
        if kind != "lin":
            raise ValueError(f"presets.yml: {value!r} is no schedule; write a number or lin_<start>")
        return LinearSchedule(float(start), 0.0, 1.0)
    # PyYAML reads 1e-5 (without a point) as a string, hence not float(): a string here is a mistake in the file.
    return value


def is_env_id(name: str) -> bool:
    """Whether a string names an environment: registered, or ``module:id``."""
    return name in gym.registry or ":" in name


def with_presets(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor called with an environment id alone start from that id's preset. What is given is checked.

    A decorator, because only the call itself shows which arguments were given and which are defaults.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind_partial(self, *args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__}: {error}; it takes a policy and an environment, or an environment's id alone. "
                "Arguments of the environment go into env_kwargs, of the policy into policy_kwargs, of the penalty "
                "into kl_controller_kwargs"
            ) from None
        given.pop("self")
        # Before anything is made of them: a preset, environments.
        given |= checked(given, CONSTRUCTOR)
        policy = given.get("policy", "auto")
        by_id = isinstance(policy, str) and given.get("env") is None and is_env_id(policy)
        if not by_id:
            init(self, **given)
            return
        settings = preset(policy, given.get("env_kwargs"))
        budget = settings.pop("n_timesteps")  # learn() takes that of the environment that it finds
        self.preset_normalize = settings.pop("normalize", False)
        self.preset_env_kwargs = settings.get("env_kwargs", {})  # for load(), which may get the same id
        chosen = {name: value for name, value in settings.items() if name not in given}
        for name in KEYWORDS:
            if name in settings and given.get(name) is not None:
                chosen[name] = {key: value for key, value in settings[name].items() if key not in given[name]}
                given[name] = settings[name] | given[name]
        settings |= {name: value for name, value in given.items() if name != "policy"}
        settings["env"] = policy
        settings.setdefault("policy", "auto")
        if settings.get("verbose", 0) >= 1:
            print(f"Preset of {policy} (budget {budget} steps): {chosen}")
        init(self, **settings)

    return wrapper
