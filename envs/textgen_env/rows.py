"""The texts being written: token buffers of many rows, advanced together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textgen_env.dialogue import Dialogue, columns_of, completion_of
from textgen_env.prompts import Prompt, copied
from textgen_env.rewards import RewardSum
from textgen_env.stopping import StopStrings
from textgen_env.vocabulary import Vocabulary, decode_completions

Observation = dict[str, NDArray[np.int64]]


class TextRows:
    """N texts in progress, each a prompt followed by the tokens appended so far.

    :param num_rows: N.
    :param length: L, room for prompt and all that follows.
    :param vocabulary: the language model's.
    :param reward: scores finished texts.
    :param max_new_tokens: tokens after which a turn ends even without an end token.
    :param missing_eos_penalty: subtracted from the reward of a text whose last turn ended so.
    :param stops: strings that end a turn as well.
    :param dialogue: answers turns; None for texts of one turn.
    """

    def __init__(
        self,
        num_rows: int,
        length: int,
        vocabulary: Vocabulary,
        reward: RewardSum,
        max_new_tokens: int,
        missing_eos_penalty: float,
        stops: StopStrings,
        dialogue: Dialogue | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._reward = reward
        self._max_new_tokens = max_new_tokens
        self._missing_eos_penalty = missing_eos_penalty
        self._stops = stops
        self._dialogue = dialogue
        self._ids = np.full((num_rows, length), vocabulary.pad_id, dtype=np.int64)
        self._lengths = np.zeros(num_rows, dtype=np.int64)
        #: Where the turn in progress begins: after the prompt, or after the environment's last answer.
        self._starts = np.zeros(num_rows, dtype=np.int64)
        #: Tokens that the policy wrote.
        self._written = np.zeros(num_rows, dtype=np.int64)
        self._prompts: list[Prompt] = []
        #: Texts of the turns that are over, in turn the policy's and the environment's.
        self._turns: list[list[str]] = [[] for _ in range(num_rows)]
        #: What ended the policy's last turn: the text of an end token, a stop string, or None for its length.
        self._endings: list[str | None] = [None] * num_rows
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
            self._turns[row] = []
            length = len(prompt.ids)
            self._ids[row, :length] = prompt.ids
            self._ids[row, length:] = self._vocabulary.pad_id
            self._lengths[row] = self._starts[row] = length
            self._written[row] = 0

    def append(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Append one token to each row, and the environment's answer where that ends a turn but not the last.

        :param tokens: [N].
        :return: the rows that are finished by it.
        :raises ValueError: another number of tokens, one outside the vocabulary, or an answer that cannot be used.
        """
        tokens = np.asarray(tokens)
        if tokens.shape != self._every_row.shape:
            raise ValueError(f"actions must have shape {self._every_row.shape}, not {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self._vocabulary.size:
            raise ValueError(f"actions must be token ids from 0 to {self._vocabulary.size - 1}; got {tokens}")
        self._ids[self._every_row, self._lengths] = tokens
        self._lengths += 1
        self._written += 1
        ended = np.isin(tokens, self._vocabulary.end_ids)
        stopped = self._stops.find(self._ids, self._starts, self._lengths)
        full = self._lengths - self._starts >= self._max_new_tokens
        over = np.flatnonzero(ended | full | np.array([string is not None for string in stopped]))
        if not over.size:
            return over
        for row in over.tolist():
            end_token = self._vocabulary.tokenizer.decode([int(tokens[row])])
            self._endings[row] = end_token if ended[row] else stopped[row]
        self._end_turns(over, stopped)
        return over if self._dialogue is None else self._answer(over, self._dialogue)

    def observe(self) -> Observation:
        """A copy of all rows: ids [N, L], length and prompt length [N, 1]."""
        return {
            "input_ids": self._ids.copy(),
            "length": self._lengths[:, None].copy(),
            "prompt_length": self._starts[:, None].copy(),
        }

    def finish(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], list[dict[str, Any]]]:
        """Score finished rows, all in one call of each reward function.

        :return: rewards, [len(rows)], and each episode's info.
        """
        prompts = [self._prompts[row] for row in rows.tolist()]
        turns = [list(self._turns[row]) for row in rows.tolist()]
        new_ids = [
            self._ids[row, len(prompt.ids) : self._lengths[row]].tolist()
            for row, prompt in zip(rows.tolist(), prompts, strict=True)
        ]
        completions = [completion_of(*pair) for pair in zip(prompts, turns, strict=True)]
        columns = columns_of(prompts)
        if self._dialogue is not None:
            columns["turns"] = turns
        rewards, parts = self._reward([prompt.value for prompt in prompts], completions, new_ids, columns)
        stopped = np.array([self._endings[row] is not None for row in rows.tolist()])
        rewards = rewards - self._missing_eos_penalty * ~stopped
        seconds = round(time.time() - self._created, 6)
        infos = [
            {
                "episode": {"r": float(rewards[i]), "l": int(self._written[row]), "t": seconds},
                "prompt": copied(prompts[i].value),
                "completion": ("" if isinstance(prompts[i].value, str) else "\n\n").join(turns[i]),
                "reward_parts": parts[i],
                "finish_reason": "stop" if stopped[i] else "length",
                "completion_ids": new_ids[i],
            }
            for i, row in enumerate(rows.tolist())
        ]
        if self._dialogue is not None:
            infos = [info | {"turns": texts} for info, texts in zip(infos, turns, strict=True)]
        return rewards, infos

    def text(self, row: int) -> str:
        """The prompt and the text so far of a row, special tokens included."""
        return str(self._vocabulary.tokenizer.decode(self._ids[row, : self._lengths[row]].tolist()))

    def _end_turns(self, rows: NDArray[np.int64], stopped: Sequence[str | None]) -> None:
        """Decode the turns that are over.

        :param stopped: the stop string that ended the turn of each row, None where none did.
        """
        before = [self._ids[row, : self._starts[row]].tolist() for row in rows.tolist()]
        written = [self._ids[row, self._starts[row] : self._lengths[row]].tolist() for row in rows.tolist()]
        texts = decode_completions(self._vocabulary.tokenizer, before, written)
        for row, text in zip(rows.tolist(), texts, strict=True):
            # Without special tokens a text may contain a stop string that it did not contain as it was written.
            self._turns[row].append(text if stopped[row] is None else self._stops.cut(text))

    def _answer(self, rows: NDArray[np.int64], dialogue: Dialogue) -> NDArray[np.int64]:
        """Append the environment's answers to rows whose turn is over; the rows that get none are finished."""
        asked = [row for row in rows.tolist() if len(self._turns[row]) < 2 * dialogue.max_turns - 1]
        if not asked:
            return rows
        answers = dialogue.answer(
            [self._prompts[row] for row in asked],
            [self._turns[row] for row in asked],
            [self._endings[row] for row in asked],
        )
        for row, answer in zip(asked, answers, strict=True):
            if answer is None:
                continue
            self._turns[row].append(answer.text)
            begin, end = self._lengths[row], self._lengths[row] + len(answer.ids)
            self._ids[row, begin:end] = answer.ids
            self._lengths[row] = self._starts[row] = end
            rows = rows[rows != row]
        return rows
