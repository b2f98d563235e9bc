"""Token-level text generation as a reinforcement-learning environment.

Importing this package only registers `TextGenEnv-v0` with gymnasium; torch and transformers are imported when an
environment is made or a class of this package is named.
"""

from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from textgen_env.env import TextGenEnv, TextGenVectorEnv
    from textgen_env.reward_model import RewardModel

__all__ = ["RewardModel", "TextGenEnv", "TextGenVectorEnv"]

_HOMES = {
    "RewardModel": "textgen_env.reward_model",
    "TextGenEnv": "textgen_env.env",
    "TextGenVectorEnv": "textgen_env.env",
}

gymnasium.register(
    id="TextGenEnv-v0",
    entry_point="textgen_env.env:TextGenEnv",
    vector_entry_point="textgen_env.env:TextGenVectorEnv",
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
