"""Scores of finished texts: reward functions in TRL's form, reward models, and their weighted sum.

A reward function is called as `f(prompts=..., completions=..., completion_ids=..., **columns)` and returns one float
per completion, or None where it does not apply. Prompts are strings or message lists, as the user gave them;
completions are strings, or for a message list `[{"role": "assistant", "content": text}]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from textgen_env.resolve import resolve
from textgen_env.vocabulary import file_arguments

EMBEDDED_REWARD_MODEL = "textgen_env:assets/reward_model"

RewardFunction = Callable[..., Sequence[float | None]]


class RewardModel:
    """A sequence classifier with one output, as a reward function.

    A string prompt and its completion are joined and tokenised as ONE string by the reward model's own tokenizer; a
    chat goes through that tokenizer's chat template. Batches are sorted by length, padded on the right and masked, so
    a text's score does not depend on its company (to 1e-5 in single precision).

    :param model: hub name, path, `package:path`, or a loaded model.
    :param tokenizer: a tokenizer, its name, or None for the model's own.
    :param batch_size: texts per forward pass.
    :param device: `"auto"` for a GPU where there is one. A loaded model stays where it is.
    :param model_kwargs: arguments of `from_pretrained`. Without a `dtype`, weights are single precision on CPU and as
        stored elsewhere.
    :raises ValueError: no tokenizer or pad token, or more than one output and no `score` field in the model's output.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        batch_size: int = 32,
        device: str = "auto",
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        arguments = dict(model_kwargs or {})
        name = model if isinstance(model, str) else model.config.name_or_path
        self.__name__ = PurePath(name.partition(":")[2] or name).name or type(model).__name__
        if isinstance(model, str):
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            if device == "cpu":
                arguments.setdefault("dtype", torch.float32)
            model = AutoModelForSequenceClassification.from_pretrained(resolve(model), **arguments)
            if "device_map" not in arguments:
                model = model.to(device)
        if tokenizer is None and not name:
            raise ValueError(
                f"reward model {self.__name__!r} does not say where its tokenizer is: pass reward_tokenizer=..."
            )
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(resolve(tokenizer or name), **file_arguments(arguments))
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._batch_size = batch_size
        config = model.config.get_text_config()
        self._pad_id = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        if self._pad_id is None:
            raise ValueError(
                f"reward model {self.__name__!r} has no pad token in its configuration or tokenizer: set "
                "tokenizer.pad_token and pass it as reward_tokenizer=..."
            )
        # Classifiers find a text's last token by the pad id of their configuration.
        config.pad_token_id = model.config.pad_token_id = self._pad_id
        self._context: int | None = getattr(config, "max_position_embeddings", None)
        self.score([self.tokenizer("a")["input_ids"]])  # a wrong kind of model should fail now, not after a rollout

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Scores of finished texts: one per completion."""
        return self.score([self._encode(*pair) for pair in zip(prompts, completions, strict=True)])

    def score(self, texts: Sequence[list[int]]) -> list[float]:
        """Scores of token id lists, in their order.

        :raises ValueError: a text longer than the model's context, or an output that is not one score per text.
        """
        result = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for index, value in zip(batch, self._forward([texts[index] for index in batch]), strict=True):
                result[index] = value
        return result

    def _forward(self, texts: Sequence[list[int]]) -> list[float]:
        """Scores of one batch."""
        longest = max(map(len, texts))
        if self._context is not None and longest > self._context:
            raise ValueError(
                f"reward model {self.__name__!r} takes {self._context} tokens but a text has {longest}: lower "
                "max_prompt_tokens or max_new_tokens, or use another reward_model"
            )
        ids = torch.full((len(texts), longest), self._pad_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        device = self.model.device
        with torch.no_grad():
            output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        score = getattr(output, "score", None)
        score = output.logits if score is None else score
        if score.numel() != len(texts):
            raise ValueError(
                f"reward model {self.__name__!r} gives {tuple(score.shape[1:])} values per text, not one: use a "
                "classifier with num_labels=1, or wrap it in a function that makes one number of them"
            )
        values: list[float] = score.float().flatten().tolist()
        return values

    def _encode(self, prompt: Any, completion: Any) -> list[int]:
        """Token ids of a finished text."""
        ids: list[int]
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt + completion)["input_ids"]
            return ids
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"prompts are messages but the tokenizer of reward model {self.__name__!r} has no chat template: set "
                "tokenizer.chat_template and pass it as reward_tokenizer=..."
            )
        text = self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


class RewardSum:
    """The weighted sum of reward functions.

    :param functions: reward functions; each is called once per batch of finished texts.
    :param weights: one per function; None for 1 each.
    :raises ValueError: no functions, or another number of weights.
    """

    def __init__(self, functions: Sequence[RewardFunction], weights: Sequence[float] | None = None) -> None:
        if not functions:
            raise ValueError("reward_model is empty: pass at least one reward function or model")
        if weights is not None and len(weights) != len(functions):
            raise ValueError(f"reward_weights has {len(weights)} entries for {len(functions)} reward functions")
        self._functions = dict(zip(_unique_names(functions), functions, strict=True))
        self._weights = np.ones(len(functions)) if weights is None else np.asarray(weights, dtype=np.float64)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, list[Any]],
    ) -> tuple[NDArray[np.float64], list[dict[str, float]]]:
        """Score a batch of finished texts.

        :return: weighted sums, [n], and for each text the unweighted values of the functions that apply to it.
        :raises ValueError: a wrong number of values, a value that is not finite, or a text that no function scores.
        """
        replies = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        table = np.full((len(self._functions), len(completions)), np.nan)
        for row, (name, function) in zip(table, self._functions.items(), strict=True):
            values = function(
                prompts=list(prompts), completions=list(replies), completion_ids=list(completion_ids), **columns
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


def make_reward(
    reward_model: Any,
    weights: Sequence[float] | None = None,
    tokenizer: Any = None,
    batch_size: int = 32,
    device: str = "auto",
    model_kwargs: Mapping[str, Any] | None = None,
) -> RewardSum:
    """The reward of an environment from its arguments: names and loaded models become reward models.

    :param reward_model: a name, a loaded model, a function, or a list of these.
    :param tokenizer: of the reward models; None for each one's own.
    """
    parts = list(reward_model) if isinstance(reward_model, list | tuple) else [reward_model]
    functions = [
        RewardModel(part, tokenizer, batch_size, device, model_kwargs)
        if isinstance(part, str | torch.nn.Module)
        else part
        for part in parts
    ]
    for part in functions:
        if not callable(part):
            raise ValueError(f"reward_model must be a name, a model, a function or a list of these, not {part!r}")
    return RewardSum(functions, weights)


def _checked(name: str, values: Sequence[float | None], completions: Sequence[str]) -> list[float]:
    """The values of one reward function as floats, NaN for None."""
    values = list(values)
    if len(values) != len(completions):
        raise ValueError(f"reward function {name!r} returned {len(values)} values for {len(completions)} completions")
    for index, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            raise ValueError(
                f"reward function {name!r} returned {value} for completion {index} ({completions[index]!r}); "
                "return a finite number, or None where it does not apply"
            )
    return [math.nan if value is None else float(value) for value in values]


def _unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        candidates = chain([name], (f"{name}_{number}" for number in count(2)))
        names.append(next(candidate for candidate in candidates if candidate not in names))
    return names
