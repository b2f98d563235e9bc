"""Scores of finished texts: reward functions in TRL's form, reward models, and their weighted sum.

A reward function is called as `f(prompts=..., completions=..., completion_ids=..., **columns)` and returns one float
per completion, or None where it does not apply. Prompts are strings or message lists; completions are strings, or for
a message list the messages that follow: `[{"role": "assistant", "content": text}]`. Of an episode of several turns a
completion is everything after the prompt, and one more argument, `turns`, lists its parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from inspect import signature
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from textgen_env.prompts import check_call, copied
from textgen_env.resolve import as_name
from textgen_env.reward_model import RewardModel
from textgen_env.transcripts import Messages

EMBEDDED_REWARD_MODEL = "textgen_env:assets/reward_model"

RewardFunction = Callable[..., Sequence[float | None]]


class RewardSum:
    """The weighted sum of reward functions.

    :param functions: reward functions; each is called once per batch of finished texts.
    :param weights: one per function; None for 1 each.
    :raises ValueError: no functions, another number of weights, or one that is not a finite number.
    """

    def __init__(self, functions: Sequence[RewardFunction], weights: Sequence[float] | None = None) -> None:
        if not functions:
            raise ValueError("reward_model is empty: pass at least one reward function or model")
        if weights is not None:
            if not isinstance(weights, Collection) or not all(is_finite(weight) for weight in weights):
                raise ValueError(
                    f"reward_weights={weights!r} must be a list of finite numbers, one per reward function"
                )
            if len(weights) != len(functions):
                raise ValueError(f"reward_weights has {len(weights)} entries for {len(functions)} reward functions")
        self._functions = dict(zip(_unique_names(functions), functions, strict=True))
        self._weights = np.ones(len(functions)) if weights is None else np.asarray(weights, dtype=np.float64)

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, list[Any]],
    ) -> tuple[NDArray[np.float64], list[dict[str, float]]]:
        """Score a batch of finished texts, all arguments as reward functions get them.

        :return: weighted sums, [n], and for each text the unweighted values of the functions that apply to it.
        :raises ValueError: a function that does not return a list with one value per text, a value that is not a finite
            number, or a text that no function scores.
        """
        table = np.full((len(self._functions), len(completions)), np.nan)
        for row, (name, function) in zip(table, self._functions.items(), strict=True):
            values = function(
                prompts=copied(list(prompts)),
                completions=copied(list(completions)),
                completion_ids=[list(ids) for ids in completion_ids],
                **copied(dict(columns)),
            )
            row[:] = _checked(name, values, completions)
        applies = ~np.isnan(table)
        if not applies.any(axis=0).all():
            index = int(np.flatnonzero(~applies.any(axis=0))[0])
            raise ValueError(
                f"no reward function scores completion {index} ({completions[index]!r}): at least one of "
                f"{list(self._functions)} must return a number, not None"
            )
        totals = self._weights @ np.where(applies, table, 0.0)
        parts = [
            {name: float(value) for name, value in zip(self._functions, column, strict=True) if not math.isnan(value)}
            for column in table.T
        ]
        return totals, parts

    def check(self, prompts: Sequence[str | Messages], new_tokens: int, columns: Collection[str] = ()) -> None:
        """Refuse what could not be scored later on; functions are not run.

        :param prompts: those to try.
        :param new_tokens: how many tokens may be written after each.
        :param columns: what functions get besides prompts and completions, by name.
        :raises ValueError: a prompt that is too long for a reward model, or a function that takes other arguments.
        """
        for name, function in self._functions.items():
            if isinstance(function, RewardModel):
                for prompt in prompts:
                    function.check(prompt, new_tokens)
            else:
                given = ("prompts", "completions", "completion_ids", *columns)
                check_call(function, f"reward function {name!r}", given)


def make_reward(
    reward_model: Any,
    weights: Sequence[float] | None = None,
    tokenizer: Any = None,
    batch_size: int = 32,
    device: str = "auto",
    model_kwargs: Mapping[str, Any] | None = None,
    column: int | None = None,
) -> RewardSum:
    """The reward of an environment from its arguments: names and loaded models become reward models.

    :param reward_model: a name, a loaded model, a function, or a list of these.
    :param tokenizer: of the reward models; None for each one's own.
    :raises ValueError: a reward model that cannot be loaded, something else than these, no part at all, or an argument
        of reward models where there are only functions.
    """
    parts = [as_name(part) for part in (reward_model if isinstance(reward_model, list | tuple) else [reward_model])]
    are_models = [_is_model(part) for part in parts]
    of_models: dict[str, tuple[Any, Any]] = {
        "reward_tokenizer": (tokenizer, None),
        "reward_batch_size": (batch_size, 32),
        "reward_device": (device, "auto"),
        "reward_model_kwargs": (model_kwargs or None, None),
        "reward_column": (column, None),
    }
    if not any(are_models):
        for name, (value, default) in of_models.items():
            if value != default:
                raise ValueError(
                    f"{name}={value!r:.100} is for reward models given by name or loaded, but reward_model names none: "
                    "leave it out"
                )
    functions = [
        RewardModel(part, tokenizer, batch_size, device, model_kwargs, column) if is_model else part
        for part, is_model in zip(parts, are_models, strict=True)
    ]
    for part in functions:
        if not callable(part):
            raise ValueError(f"reward_model must be a name, a model, a function or a list of these, not {part!r}")
        if isinstance(part, torch.nn.Module) and not _is_function(part):
            raise ValueError(
                f"reward_model: {type(part).__name__} is neither a model of transformers nor a reward function: give "
                "its forward() the arguments prompts, completions and completion_ids, or wrap it in a function that "
                "has them"
            )
    return RewardSum(functions, weights)


def _is_model(part: Any) -> bool:
    """Whether a part of the reward is the name of a model, or a model of transformers."""
    return isinstance(part, str) or (
        isinstance(part, torch.nn.Module) and isinstance(getattr(part, "config", None), PreTrainedConfig)
    )


def _is_function(module: torch.nn.Module) -> bool:
    """Whether a module can be called as a reward function is."""
    parameters = signature(module.forward).parameters
    return {"prompts", "completions", "completion_ids"} <= parameters.keys() or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _checked(name: str, values: Any, completions: Sequence[Any]) -> list[float]:
    """The values of one reward function as floats, NaN for None."""
    if isinstance(values, np.ndarray | torch.Tensor):
        values = values.reshape(-1).tolist()  # models give [n, 1]
    # A mapping would give its keys for rewards, a set would give them in any order.
    if not isinstance(values, Iterable) or isinstance(values, str | Mapping | Set):
        raise ValueError(
            f"reward function {name!r} returned {values!r:.100}; return a list with one number per completion, or "
            "None in its place where the function does not apply"
        )
    values = list(values)
    if len(values) != len(completions):
        raise ValueError(f"reward function {name!r} returned {len(values)} values for {len(completions)} completions")
    for index, value in enumerate(values):
        if value is not None and not is_finite(value):
            raise ValueError(
                f"reward function {name!r} returned {value!r} for completion {index} ({completions[index]!r}); "
                "return a finite number, or None where it does not apply"
            )
    return [math.nan if value is None else float(value) for value in values]


def is_finite(value: Any) -> bool:
    """Whether something is a number, and neither NaN nor infinite."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a tensor of several numbers is a RuntimeError
        return False


def _unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        name = name.lstrip("_") or "reward"  # gymnasium takes `_key` for the mask of `key`
        candidates = chain([name], (f"{name}_{number}" for number in count(2)))
        names.append(next(candidate for candidate in candidates if candidate not in names))
    return names
