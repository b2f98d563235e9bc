"""Strings that end a text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textgen_env.vocabulary import decode_completions


class StopStrings:
    """Finds strings in texts as they are written, special tokens included.

    :param strings: the strings, of any length and number of tokens.
    :param tokenizer: the language model's.
    :raises ValueError: no list of non-empty strings.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        is_list = isinstance(strings, Collection) and not isinstance(strings, str)
        if not is_list or not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop_strings={strings!r} must be a list of strings that are not empty, [] for none")
        self._strings = tuple(strings)
        self._tokenizer = tokenizer
        # Every token of a string spells at least one of its bytes, and its last one is new: no more need be decoded.
        self._window = max((len(string.encode()) for string in strings), default=0)

    def find(self, ids: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[str | None]:
        """The stop string that each row's last token completes, None for most.

        :param ids: tokens, [N, L].
        :param starts: where the text begins that may contain a string, [N].
        :param lengths: where it ends, [N].
        """
        if not self._strings:
            return [None] * len(ids)
        first = np.maximum(lengths - self._window, starts).tolist()
        rows = list(zip(ids, first, lengths.tolist(), strict=True))
        before = [row[start - 1 : start].tolist() for row, start, _ in rows]
        written = [row[start:stop].tolist() for row, start, stop in rows]
        return [self._first(text) for text in decode_completions(self._tokenizer, before, written, False)]

    def cut(self, text: str) -> str:
        """What comes before the first stop string."""
        string = self._first(text)
        return text if string is None else text[: text.index(string)]

    def _first(self, text: str) -> str | None:
        found = [string for string in self._strings if string in text]
        return min(found, key=text.index, default=None)
