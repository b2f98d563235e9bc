"""What the arguments of SAFE may be: one table for all that can be told by looking at one of them alone."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Rule(NamedTuple):
    """What an argument may be."""

    wanted: str
    """In words, to end the sentence "it must be ..."."""
    fits: Callable[[Any], bool]
    words: tuple[str | None, ...] = ()
    """Values that are accepted besides."""
    schedule: bool = False
    """Whether it may be a function of the remaining progress, which is not looked into."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _from_1(value: Any) -> bool:
    return _whole(value) and value >= 1


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _switch(value: Any) -> bool:
    # Files and command lines write 0 and 1.
    return isinstance(value, int | np.integer | np.bool_) and value in (0, 1)


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


KEYWORDS = ("rollout_buffer_kwargs", "kl_controller_kwargs", "env_kwargs", "policy_kwargs")
"""Arguments that are dicts of arguments."""
CONSTRUCTOR: dict[str, Rule] = {
    "learning_rate": Rule(
        "a number of at least 0, or a schedule", lambda value: _number(value) and 0 <= value < math.inf, schedule=True
    ),
    "n_steps": Rule("a whole number of at least 1", _from_1),
    "batch_size": Rule("a whole number of at least 1", _from_1),
    "n_epochs": Rule("a whole number of at least 1", _from_1),
    "gamma": Rule("a number in [0, 1]", _share),
    "gae_lambda": Rule("a number in [0, 1]", _share),
    "clip_range": Rule("a positive number, or a schedule", _positive, schedule=True),
    "clip_range_vf": Rule("a positive number, a schedule, or None for no clipping", _positive, (None,), schedule=True),
    "normalize_advantage": Rule("True or False", _switch),
    "ent_coef": Rule("a finite number", lambda value: _number(value) and math.isfinite(value)),
    "vf_coef": Rule("a finite number of at least 0", lambda value: _number(value) and 0 <= value < math.inf),
    "max_grad_norm": Rule("a positive number, float('inf') for no clipping", _positive),
    "use_sde": Rule("True or False", _switch),
    "sde_sample_freq": Rule(
        "a whole number of at least 1, or -1 for once a rollout",
        lambda value: _whole(value) and (value == -1 or value >= 1),
    ),
    "target_kl": Rule("a positive number, or None for no early stop", _positive, (None,)),
    "huber_delta": Rule("a positive number, or None for the squared error", _positive, (None,)),
    "critic_tau": Rule("a number in (0, 1]", lambda value: _positive(value) and value <= 1),
    "max_preview_kl": Rule("a positive number, 'auto', or None for no bound", _positive, ("auto", None)),
    "critic_warmup": Rule("a whole number of at least 0", lambda value: _whole(value) and value >= 0),
    "n_envs": Rule("a whole number of at least 1", _from_1),
    "stats_window_size": Rule("a whole number of at least 1", _from_1),
    "seed": Rule(
        "a whole number from 0 to 2**32 - 1, or None", lambda value: _whole(value) and 0 <= value < 2**32, (None,)
    ),
    **dict.fromkeys(KEYWORDS, Rule("a dict (in a yaml file: a mapping)", _mapping, (None,))),
}
POLICY: dict[str, Rule] = {
    "n_critics": Rule("a whole number of at least 1", _from_1),
    "soft_min_alpha": Rule(
        "a number of at least 0 (0: minimum, inf: mean of the critics)", lambda value: _number(value) and value >= 0
    ),
}
LEARN: dict[str, Rule] = {
    "total_timesteps": Rule("a number of at least 0", lambda value: _number(value) and value >= 0),
    "log_interval": Rule("a whole number of at least 1, or None for no log", _from_1, (None,)),
}


def checked(arguments: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Those arguments that there are rules for, NumPy's numbers among them as Python's, which SB3 asks for.

    :param arguments: by name; what there is no rule for is passed over.
    :param rules: one of the tables of this module.
    :raises ValueError: a value that does not fit, with its name and what would.
    """
    return {name: _checked(name, arguments[name], rule) for name, rule in rules.items() if name in arguments}


def _checked(name: str, value: Any, rule: Rule) -> Any:
    if (value is None or isinstance(value, str)) and value in rule.words:
        return value
    if rule.schedule and callable(value):
        return value
    if not rule.fits(value):
        raise ValueError(f"{name} must be {rule.wanted}, got {value!r}{_hint(value)}")
    if isinstance(value, np.generic):
        return value.item()
    return dict(value) if isinstance(value, Mapping) and not isinstance(value, dict) else value


def _hint(value: Any) -> str:
    """For numbers in quotes, and those that YAML does not take for numbers."""
    try:
        float(value if isinstance(value, str) else "")
    except ValueError:
        return ""
    return ", a string: leave out the quotes (YAML reads 1e-5 as a string, 1.0e-5 as a number)"
