"""Prompts: read from wherever the user keeps them, tokenised once, drawn by shuffled epochs."""

from __future__ import annotations

import json
import logging
import os
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from textgen_env.loading import blaming
from textgen_env.resolve import resolve
from textgen_env.transcripts import Messages, is_transcript, messages_of
from textgen_env.vocabulary import Vocabulary

EMBEDDED_PROMPTS = "textgen_env:assets/prompts.jsonl"
#: Arguments of reward functions that a column of the data cannot be called.
RESERVED = frozenset({"prompts", "completions", "completion_ids", "turns"})

LongPrompts = Literal["error", "truncate", "skip"]
PromptFormat = Literal["text", "chat"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    :param value: the text, or the chat messages.
    :param ids: its tokens, [P].
    :param columns: what else its row of the data holds, for reward functions.
    :param shown: tokens of `value`: more than P for a chat that was cut, which reward functions see whole.
    """

    value: str | Messages
    ids: NDArray[np.int64]
    columns: Mapping[str, Any]
    shown: int


class PromptReader:
    """Turns rows of data into tokenised prompts of bounded length.

    :param vocabulary: the language model's.
    :param column: the key under which a row holds its prompt.
    :param max_tokens: the longest prompt allowed; None for no bound.
    :param long_prompts: what happens to longer ones. `"truncate"` keeps the END of a prompt, since that is what the
        model continues (and its first token if the tokenizer begins every text with it), and shows reward functions
        the text that is left (chat messages are shown whole).
    :param prompt_format: `"text"` leaves strings as they are; `"chat"` makes messages of them: of a transcript its
        turns, of any other string one message of the user.
    :param columns: what every prompt has, None where its row lacks it; besides the columns of all rows.
    :raises ValueError: an unknown `long_prompts` or `prompt_format`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        column: str,
        max_tokens: int | None,
        long_prompts: LongPrompts,
        prompt_format: PromptFormat = "text",
        columns: Collection[str] = (),
    ) -> None:
        if long_prompts not in ("error", "truncate", "skip"):
            raise ValueError(f"long_prompts={long_prompts!r} must be 'error', 'truncate' or 'skip'")
        if prompt_format not in ("text", "chat"):
            raise ValueError(f"prompt_format={prompt_format!r} must be 'text' or 'chat'")
        self._tokenizer = vocabulary.tokenizer
        self._end_ids = vocabulary.end_ids
        self._column = column
        self._max_tokens = max_tokens
        self._long_prompts = long_prompts
        self._prompt_format = prompt_format
        self._columns = columns
        self.truncated = 0
        self.skipped = 0

    def read(self, source: Any, split: str = "train") -> list[Prompt]:
        """Load, tokenise and check prompts.

        :param source: see :class:`textgen_env.env.TextGenVectorEnv`; None for the embedded prompts.
        :param split: of a dataset.
        :raises ValueError: no prompts, an empty or too long prompt, a missing column, an unknown file type.
        """
        rows = rows_of(source, self._column, split)
        if not rows:
            raise ValueError("prompts is empty: pass at least one prompt")
        values = [self._value(row, index) for index, row in enumerate(rows)]
        # A function that asks for a column gets it whichever rows are in its batch.
        columns = dict.fromkeys([*self._columns, *chain.from_iterable(rows)])
        columns.pop(self._column, None)
        prompts = []
        for index, (row, value, ids) in enumerate(zip(rows, values, self._tokenise(values), strict=True)):
            if not ids:
                raise ValueError(f"prompts[{index}] is empty: it has no tokens; remove it or add text")
            shown = len(ids)
            if self._max_tokens is not None and len(ids) > self._max_tokens:
                if self._long_prompts == "error":
                    raise ValueError(
                        f"prompts[{index}] has {len(ids)} tokens, more than max_prompt_tokens={self._max_tokens}: "
                        "raise max_prompt_tokens, or pass long_prompts='truncate' or 'skip'"
                    )
                if self._long_prompts == "skip":
                    self.skipped += 1
                    continue
                self.truncated += 1
                ids, text = self._truncate(ids)
                if isinstance(value, str):
                    value, shown = text, len(ids)
            others = {name: row.get(name) for name in columns}
            prompts.append(Prompt(value, np.asarray(ids, dtype=np.int64), others, shown))
        if self.truncated or self.skipped:
            _log.warning("long prompts: %d truncated on the left, %d skipped", self.truncated, self.skipped)
        if not prompts:
            raise ValueError(
                f"prompts: all {len(rows)} are longer than max_prompt_tokens={self._max_tokens} and "
                "long_prompts='skip' leaves none; raise max_prompt_tokens"
            )
        return prompts

    def _value(self, row: Mapping[str, Any], index: int) -> str | Messages:
        if clash := RESERVED & row.keys():
            raise ValueError(f"prompts: rename the columns {sorted(clash)}; reward functions get these names already")
        if self._column in row:
            value = row[self._column]
        elif {"chosen", "rejected"} <= row.keys():
            value = shared_prompt(row["chosen"], row["rejected"])
        else:
            raise ValueError(f"prompts[{index}] has no column prompt_column={self._column!r}; there are {sorted(row)}")
        if isinstance(value, str):
            if self._prompt_format == "text":
                return value
            return messages_of(value) if is_transcript(value) else [{"role": "user", "content": value}]
        if _is_chat(value):
            chat: Messages = value
            return chat
        raise ValueError(
            f"prompts[{index}] is neither a string nor a list of messages with 'role' and 'content': {value!r}"
        )

    def _truncate(self, ids: list[int]) -> tuple[list[int], str]:
        """The last of a prompt's tokens, and their text; a token that begins every text stays."""
        assert self._max_tokens is not None
        begin = 1 if ids[0] == self._tokenizer.bos_token_id else 0
        rest = ids[len(ids) - (self._max_tokens - begin) :]
        return ids[:begin] + rest, self._tokenizer.decode(rest)

    def _tokenise(self, values: Sequence[str | Messages]) -> list[list[int]]:
        """Token ids of each prompt; texts get the special tokens that begin a text, chats their template's."""
        chats = [index for index, value in enumerate(values) if not isinstance(value, str)]
        if chats and not self._tokenizer.chat_template:
            raise ValueError(
                f"prompts[{chats[0]}] is a list of messages but the tokenizer has no chat template: set "
                "tokenizer.chat_template and pass tokenizer=..., or give prompts as strings and prompt_format='text'"
            )
        ids: list[list[int]] = [[] for _ in values]
        texts = [index for index, value in enumerate(values) if isinstance(value, str)]
        if texts:
            # The policy is to go on; an end token that is part of the text itself stays.
            ended = self._ends("a") and not self._ends("a", add_special_tokens=False)
            for index, row in zip(
                texts, self._tokenizer([values[i] for i in texts], verbose=False)["input_ids"], strict=True
            ):
                ids[index] = row[:-1] if ended else row
        if chats:
            try:
                rendered = self._tokenizer.apply_chat_template(
                    [values[i] for i in chats], tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # a template may raise anything
                raise ValueError(f"prompts: the tokenizer's chat template refuses their messages: {error}") from error
            for index, row in zip(
                chats, self._tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"], strict=True
            ):
                ids[index] = row
        return ids

    def _ends(self, text: str, **arguments: bool) -> bool:
        """Whether the tokenizer makes an end token the last of a text."""
        return self._tokenizer(text, **arguments)["input_ids"][-1:] in [[end] for end in self._end_ids]


class Deck:
    """Draws the numbers 0 to size - 1 in shuffled epochs: each comes once before any comes again.

    :param size: how many numbers there are.
    :param repeats: how many times in a row each is drawn.
    """

    def __init__(self, size: int, repeats: int = 1) -> None:
        self._size = size
        self._repeats = repeats
        self._left: list[int] = []

    def shuffle(self) -> None:
        """Forget the rest of the current epoch."""
        self._left = []

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """The next `count` numbers."""
        while len(self._left) < count:
            self._left = np.repeat(rng.permutation(self._size), self._repeats).tolist() + self._left
        return [self._left.pop() for _ in range(count)]


def rows_of(source: Any, column: str, split: str) -> list[Mapping[str, Any]]:
    """The rows of any supported source of prompts, as mappings.

    :raises ValueError: a file of unknown type, or a source that is none of those supported.
    :raises FileNotFoundError: a path that looks like a file of prompts and does not exist.
    """
    if source is None:
        source = EMBEDDED_PROMPTS
    if isinstance(source, str | os.PathLike):
        source = _rows_of_name(resolve(os.fspath(source)), column, split)
    elif hasattr(source, "keys") and split in source:  # a DatasetDict
        source = source[split]
    if hasattr(source, "to_list"):  # a Dataset
        source = source.to_list()
    if not isinstance(source, Sequence) or isinstance(source, str):
        raise ValueError(
            "prompts must be a list of strings, message lists or dicts, a dataset with the split "
            f"{split!r}, a hub dataset's name, or a path; not {type(source).__name__}"
        )
    return [item if isinstance(item, Mapping) else {column: item} for item in source]


def _rows_of_name(name: str, column: str, split: str) -> Any:
    """Rows of a file, or of the hub dataset of that name; `datasets` is imported only where it is needed."""
    path = Path(name)
    # A hub dataset's name has no suffix of a file; without this a mistyped path would be looked up on the hub.
    if path.suffix in {".jsonl", ".json", ".parquet", ".txt", ".csv", ".tsv"} and not path.is_file():
        raise FileNotFoundError(f"prompts={name!r}: there is no such file")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines, blaming("prompts", name):
            return [json.loads(line) for line in lines if line.strip()]
    if path.suffix == ".json":
        with blaming("prompts", name):
            return json.loads(path.read_text(encoding="utf-8"))
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"prompts={name!r}: unknown file type {path.suffix!r}; use .jsonl, .json or .parquet")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"prompts={name!r} needs the `datasets` package: pip install datasets") from error
    with blaming("prompts", name):
        if path.suffix == ".parquet":
            return datasets.Dataset.from_parquet(str(path))
        return datasets.load_dataset(name, split=split)


def shared_prompt(chosen: str | Messages, rejected: str | Messages) -> str | Messages:
    """The prompt of a preference pair: what both sides begin with.

    Of transcripts only as far as the last `Assistant:` of it, since two answers may begin alike; where there is none,
    as far as the last one of `chosen`. Of messages never the last one of a side: that is its answer.
    """
    # Prefixes are equal up to some length and unequal from there on.
    same = bisect_left(range(min(len(chosen), len(rejected))), True, key=lambda n: chosen[: n + 1] != rejected[: n + 1])
    if not isinstance(chosen, str):
        return [dict(message) for message in chosen[: min(same, len(chosen) - 1, len(rejected) - 1)]]
    answer = "\n\nAssistant:"
    turn = chosen.rfind(answer, 0, same)
    if turn < 0:
        turn = chosen.rfind(answer)
    return chosen[:same] if turn < 0 else chosen[: turn + len(answer)]


def copied(value: Any) -> Any:
    """A copy of data for a function of the user's, who may change it: lists and dicts in full, sets and arrays.

    Anything else is returned as it is: strings and numbers cannot be changed, other objects may not bear a copy.
    """
    if isinstance(value, list):
        return [copied(item) for item in value]
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value.copy() if isinstance(value, set | bytearray | np.ndarray) else value


def check_call(function: Callable[..., Any], name: str, given: Collection[str]) -> None:
    """Refuse a function of the user's that does not take the keyword arguments it will be given; it is not run.

    :param function: the function.
    :param name: what it is, for the message.
    :param given: names of the arguments.
    :raises ValueError: it takes others.
    """
    try:
        parameters = signature(function)
    except (TypeError, ValueError):  # some built-in functions do not tell
        return
    try:
        parameters.bind(**dict.fromkeys(given))
    except TypeError as error:
        arguments = ", ".join(f"{argument}=..." for argument in given)
        raise ValueError(
            f"{name} cannot be called with ({arguments}): {error}. It gets these by name, the prompts' other columns "
            "among them; end its parameters in **columns to take any"
        ) from error


def _is_chat(value: Any) -> bool:
    return (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )
