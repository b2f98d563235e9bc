"""The texts being written: token buffers of many rows, advanced together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textgen_env.prompts import Prompt
from textgen_env.rewards import RewardSum
from textgen_env.vocabulary import Vocabulary, decode_completions

Observation = dict[str, NDArray[np.int64]]


class TextRows:
    """N texts in progress, each a prompt followed by the tokens appended so far.

    :param num_rows: N.
    :param vocabulary: the language model's.
    :param reward: scores finished texts.
    :param max_prompt_tokens: room for the prompt.
    :param max_new_tokens: tokens after which a text ends even without eos.
    :param missing_eos_penalty: subtracted from the reward of such a text.
    """

    def __init__(
        self,
        num_rows: int,
        vocabulary: Vocabulary,
        reward: RewardSum,
        max_prompt_tokens: int,
        max_new_tokens: int,
        missing_eos_penalty: float,
    ) -> None:
        self._vocabulary = vocabulary
        self._reward = reward
        self._max_new_tokens = max_new_tokens
        self._missing_eos_penalty = missing_eos_penalty
        self._ids = np.full((num_rows, max_prompt_tokens + max_new_tokens), vocabulary.pad_id, dtype=np.int64)
        self._lengths = np.zeros(num_rows, dtype=np.int64)
        self._prompt_lengths = np.zeros(num_rows, dtype=np.int64)
        self._prompts: list[Prompt] = []
        self._every_row = np.arange(num_rows)
        self._created = time.time()

    @property
    def started(self) -> bool:
        """Whether every row has a prompt."""
        return bool(self._prompts)

    def start_all(self, prompts: Sequence[Prompt]) -> None:
        """Begin a text in every row."""
        self._prompts = list(prompts)
        self.start(self._every_row, prompts)

    def start(self, rows: NDArray[np.int64], prompts: Sequence[Prompt]) -> None:
        """Begin a text in the rows given, each with its prompt."""
        for row, prompt in zip(rows.tolist(), prompts, strict=True):
            self._prompts[row] = prompt
            length = len(prompt.ids)
            self._ids[row, :length] = prompt.ids
            self._ids[row, length:] = self._vocabulary.pad_id
            self._lengths[row] = self._prompt_lengths[row] = length

    def append(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Append one token to each row.

        :param tokens: [N].
        :return: the rows that are finished by it.
        :raises ValueError: another number of tokens, or one outside the vocabulary.
        """
        tokens = np.asarray(tokens)
        if tokens.shape != self._every_row.shape:
            raise ValueError(f"actions must have shape {self._every_row.shape}, not {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self._vocabulary.size:
            raise ValueError(f"actions must be token ids from 0 to {self._vocabulary.size - 1}; got {tokens}")
        self._ids[self._every_row, self._lengths] = tokens
        self._lengths += 1
        full = self._lengths - self._prompt_lengths >= self._max_new_tokens
        return np.flatnonzero((tokens == self._vocabulary.eos_id) | full)

    def observe(self) -> Observation:
        """A copy of all rows: ids [N, L], length and prompt length [N, 1]."""
        return {
            "input_ids": self._ids.copy(),
            "length": self._lengths[:, None].copy(),
            "prompt_length": self._prompt_lengths[:, None].copy(),
        }

    def finish(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], list[dict[str, Any]]]:
        """Decode and score finished rows, all in one call of each reward function.

        :return: rewards, [len(rows)], and each episode's info.
        """
        prompts = [self._prompts[row] for row in rows.tolist()]
        texts = [self._ids[row, : self._lengths[row]].tolist() for row in rows.tolist()]
        prompt_ids = [text[: len(prompt.ids)] for text, prompt in zip(texts, prompts, strict=True)]
        new_ids = [text[len(prompt.ids) :] for text, prompt in zip(texts, prompts, strict=True)]
        completions = decode_completions(self._vocabulary.tokenizer, prompt_ids, new_ids)
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        rewards, parts = self._reward([prompt.value for prompt in prompts], completions, new_ids, columns)
        stopped = np.array([ids[-1] == self._vocabulary.eos_id for ids in new_ids])
        rewards = rewards - self._missing_eos_penalty * ~stopped
        seconds = round(time.time() - self._created, 6)
        infos = [
            {
                "episode": {"r": float(rewards[i]), "l": len(new_ids[i]), "t": seconds},
                "prompt": prompts[i].value,
                "completion": completions[i],
                "reward_parts": parts[i],
                "finish_reason": "stop" if stopped[i] else "length",
                "completion_ids": new_ids[i],
            }
            for i in range(len(rows))
        ]
        return rewards, infos

    def text(self, row: int) -> str:
        """The prompt and the text so far of a row, special tokens included."""
        return str(self._vocabulary.tokenizer.decode(self._ids[row, : self._lengths[row]].tolist()))
