"""A rollout buffer that yields whole texts.

Storage is SB3's, but for observations: a text's tokens are its first observation and the actions that follow, so one
observation a segment is kept, not one a token. A segment is what was written of one text within one rollout. A
minibatch holds whole segments, packed into few rows for one forward pass, and every per-token tensor flat, with
prompts and padding already gone: a loss needs no masks, and standardising advantages is masked whitening for free.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictRolloutBuffer
from torch import Tensor

from sb3_safe.buffers import AnnotatedRollout, SafeSamples

PACKED_WIDTH = 128
MICRO_BATCH_SIZE = 4096
"""Tokens that go through the model at a time unless it is said otherwise."""
SMALLEST_SHARE = 1 / 4
"""Of ``batch_size``, that a minibatch has at least."""

Indices = NDArray[np.int64]


@dataclass
class Segment:
    """What was written of one text within one rollout."""

    env: int
    start: int
    """Step of the rollout at which it begins."""
    context: Indices
    """Token ids that were there before, ``[length]``."""
    inserted: list[tuple[int, Indices]] = field(default_factory=list)
    """Tokens that the environment wrote between two actions, and where in the text they begin."""


class Piece(NamedTuple):
    """Segments that go through the model together."""

    observations: dict[str, Tensor]
    """See :meth:`~sb3_safe.language.policy.LanguagePolicy.evaluate`."""
    flat_index: Tensor
    """``[B]``, where in the flat order of the rollout each of its actions is."""


class SegmentBuffer(AnnotatedRollout, DictRolloutBuffer):  # type: ignore[misc]
    """Rollout buffer for observations ``Dict(input_ids, length, prompt_length)`` and token actions.

    ``batch_size`` counts actions: the rollout is cut into the nearest number of minibatches of about equal size,
    between segments. Where texts are longer than that, some would get a few actions, whose advantages say nothing
    beside one another: what is smaller than a quarter of ``batch_size`` joins its smaller neighbour. It is cut once, at
    random, and every pass takes the same minibatches in another order: a model of low precision then rounds the same
    way each time, so that a probability ratio begins at exactly 1.

    Tokens by which a text grew between two actions beside the action itself, such as the answer of a user or a tool,
    were written by the environment. They are part of the context, and of no loss. Where an environment has changed or
    shortened the text before, or written another token than was chosen, a segment begins with the text as it is now.

    :param micro_batch_size: tokens, prompts and padding included, that go through the model at a time, but one row at
        least; a minibatch that has more is computed in pieces, with the same result. ``None``: all at once, which
        nothing limits: where texts end early, a minibatch has many, each with its prompt.
    :raises ValueError: it is not positive.
    """

    segments: list[Segment]
    _last_ids: np.ndarray

    def __init__(self, *args: Any, micro_batch_size: int | None = MICRO_BATCH_SIZE, **kwargs: Any) -> None:
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, or None for no limit, got {micro_batch_size}")
        self.micro_batch_size = micro_batch_size
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Forget the rollout."""
        # SB3 allocates one observation a step for each of these shapes.
        self.obs_shape = {}
        super().reset()
        self.segments = []
        self._current: list[Segment] = []
        #: Tokens of the text, and of its prompt, before each action ``[T, N]``.
        self.lengths = np.zeros((self.buffer_size, self.n_envs), dtype=np.int64)
        self.prompt_lengths = np.zeros_like(self.lengths)
        self._minibatches: dict[int, list[list[Piece]]] = {}

    def add(  # type: ignore[override]
        self,
        obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: Tensor,
        log_prob: Tensor,
    ) -> None:
        """Store one step of every environment; arguments as SB3's."""
        lengths = obs["length"][:, 0].astype(np.int64)
        if self.pos == 0:
            self._current = [self._begin(env, obs, lengths) for env in range(self.n_envs)]
        else:
            begins = np.asarray(episode_start, dtype=bool) | ~self._goes_on(obs["input_ids"], lengths)
            expected = self.lengths[self.pos - 1] + 1
            for env in np.flatnonzero(begins | (lengths != expected)).tolist():
                if begins[env]:
                    self._current[env] = self._begin(env, obs, lengths)
                else:
                    first = int(expected[env])
                    tokens = obs["input_ids"][env, first : lengths[env]].astype(np.int64)
                    self._current[env].inserted.append((first, tokens))
        self._last_ids = obs["input_ids"].copy()
        self.lengths[self.pos] = lengths
        self.prompt_lengths[self.pos] = obs["prompt_length"][:, 0]
        super().add(obs, action, reward, episode_start, value, log_prob)

    def _goes_on(self, ids: np.ndarray, lengths: Indices) -> np.ndarray:
        """Whether each text ``[N]`` begins with the one before and the action that was chosen then."""
        last, expected = self.lengths[self.pos - 1], self._last_ids
        expected[np.arange(len(ids)), np.minimum(last, ids.shape[1] - 1)] = self.actions[self.pos - 1, :, 0]
        goes_on = (ids == expected).all(axis=1)  # most are what is expected behind their end as well
        for env in np.flatnonzero(~goes_on):
            goes_on[env] = (ids[env, : last[env] + 1] == expected[env, : last[env] + 1]).all()
        return goes_on & (lengths > last)  # type: ignore[no-any-return]

    def _begin(self, env: int, obs: dict[str, np.ndarray], lengths: Indices) -> Segment:
        segment = Segment(env, self.pos, obs["input_ids"][env, : lengths[env]].astype(np.int64))
        self.segments.append(segment)
        return segment

    def _flat_observations(self) -> dict[str, Tensor]:
        return {}

    def minibatches(self, batch_size: int) -> Iterator[list[SafeSamples]]:
        """Minibatches in random order, each as pieces of at most ``micro_batch_size`` tokens."""
        minibatches = self._cut(batch_size)
        for number in np.random.permutation(len(minibatches)):
            yield [self._samples(piece) for piece in minibatches[number]]

    def _batches(self, permutation: Tensor | None, batch_size: int) -> Generator[SafeSamples, None, None]:
        """All pieces one by one; ``permutation`` (of actions) only says whether to shuffle the minibatches."""
        minibatches = self._cut(batch_size)
        count = len(minibatches)
        for number in range(count) if permutation is None else np.random.permutation(count):
            yield from map(self._samples, minibatches[number])

    def _samples(self, piece: Piece) -> SafeSamples:
        picked = {name: tensor[piece.flat_index] for name, tensor in self._flat_tensors().items()}
        return SafeSamples(
            piece.observations,
            picked["actions"].long().view(-1),
            picked["values"],
            picked["log_probs"],
            picked["advantages"],
            picked["returns"],
            picked.get("reference_log_prob"),
            picked.get("old_critic_values"),
            picked.get("lost"),
            piece.flat_index,
        )

    def _cut(self, batch_size: int) -> list[list[Piece]]:
        """The rollout as minibatches of whole segments, each as pieces; made once."""
        if batch_size not in self._minibatches:
            ends = [self.buffer_size] * self.n_envs
            lengths = np.zeros(len(self.segments), dtype=np.int64)
            for number in range(len(self.segments) - 1, -1, -1):  # a segment ends where the environment's next begins
                segment = self.segments[number]
                lengths[number] = ends[segment.env] - segment.start
                ends[segment.env] = segment.start
            order = np.random.permutation(len(self.segments))
            total = int(lengths.sum())
            n_batches = min(len(order), max(1, round(total / batch_size)))
            # A segment belongs to the minibatch in which its middle action falls.
            middle = np.cumsum(lengths[order]) - lengths[order] / 2
            owner = np.minimum((middle * n_batches / total).astype(int), n_batches - 1)
            groups = [order[owner == number] for number in np.unique(owner)]
            self._minibatches[batch_size] = [
                self._pieces([self.segments[i] for i in group], lengths[group])
                for group in merge_small(groups, lengths, batch_size * SMALLEST_SHARE)
            ]
        return self._minibatches[batch_size]

    def _pieces(self, segments: list[Segment], lengths: Indices) -> list[Piece]:
        """Pack segments into rows ``[R, W]``, and cut between rows."""
        # The last action of a segment is predicted, but nothing is predicted from it.
        text_lengths = np.array(
            [self.lengths[segment.start + n - 1, segment.env] for segment, n in zip(segments, lengths, strict=True)]
        )
        rows, offsets, width = pack(text_lengths)
        per_piece = rows.max() + 1 if self.micro_batch_size is None else max(1, self.micro_batch_size // width)
        pieces = []
        for first in range(0, int(rows.max()) + 1, int(per_piece)):
            chosen = np.flatnonzero((rows >= first) & (rows < first + per_piece))
            theirs = [segments[i] for i in chosen]
            pieces.append(self._piece(theirs, lengths[chosen], rows[chosen] - first, offsets[chosen], width))
        return pieces

    def _piece(self, segments: list[Segment], lengths: Indices, rows: Indices, offsets: Indices, width: int) -> Piece:
        # A token of the texts is padding too: at one that is embedded as zeros, the gradient of a norm would be NaN.
        ids = np.full((int(rows.max()) + 1, width), segments[0].context[0])
        positions = np.zeros_like(ids)  # where there is padding, each 0 begins a text of its own that nobody reads
        cols, new_tokens, index = [], [], []
        for segment, n, row, offset in zip(segments, lengths.tolist(), rows, offsets.tolist(), strict=True):
            steps = slice(segment.start, segment.start + n)
            before = self.lengths[steps, segment.env]
            text = np.empty(before[-1], dtype=np.int64)
            text[: len(segment.context)] = segment.context
            text[before[:-1]] = self.actions[steps, segment.env, 0][:-1]
            for position, tokens in segment.inserted:
                text[position : position + len(tokens)] = tokens
            ids[row, offset : offset + len(text)] = text
            positions[row, offset : offset + len(text)] = np.arange(len(text))
            cols.append(offset + before - 1)
            new_tokens.append(before - self.prompt_lengths[steps, segment.env])
            index.append(segment.env * self.buffer_size + segment.start + np.arange(n))
        observations = {
            "input_ids": ids,
            "position_ids": positions,
            "rows": np.repeat(rows, lengths),
            "cols": np.concatenate(cols),
            "new_tokens": np.concatenate(new_tokens),
        }
        tensors = {name: self.to_torch(array) for name, array in observations.items()}
        return Piece(tensors, self.to_torch(np.concatenate(index)))


def merge_small(groups: list[Indices], lengths: Indices, least: float) -> list[Indices]:
    """Join groups of segments that have too few actions, the smallest first, with the smaller of their neighbours.

    :param groups: which segments ``[G]`` belong to each.
    :param lengths: ``[S]``, actions of every segment.
    :param least: actions of a group; one group may have less if it is the only one.
    """
    groups, sizes = list(groups), [int(lengths[group].sum()) for group in groups]
    while len(groups) > 1 and min(sizes) < least:
        smallest = sizes.index(min(sizes))
        neighbours = [number for number in (smallest - 1, smallest + 1) if 0 <= number < len(groups)]
        first = min(smallest, min(neighbours, key=sizes.__getitem__))
        groups[first : first + 2] = [np.concatenate(groups[first : first + 2])]
        sizes[first : first + 2] = [sum(sizes[first : first + 2])]
    return groups


def pack(lengths: Indices) -> tuple[Indices, Indices, int]:
    """Put texts one behind the other into rows of one width, longest first, each where it first fits.

    A model tells the texts of a row apart by their positions, which begin anew with each. Rows are as wide as the
    longest text, at least :data:`PACKED_WIDTH`: wider rows waste less on padding, but attention pays for their width.

    :param lengths: ``[S]``, tokens of each text.
    :return: row ``[S]`` and offset ``[S]`` of each text, and the width.
    """
    width = max(int(lengths.max()), PACKED_WIDTH)
    rows, offsets = np.zeros_like(lengths), np.zeros_like(lengths)
    room: list[int] = []
    for text in np.argsort(-lengths, kind="stable"):
        row = next((row for row, left in enumerate(room) if left >= lengths[text]), len(room))
        if row == len(room):
            room.append(width)
        rows[text], offsets[text] = row, width - room[row]
        room[row] -= int(lengths[text])
    return rows, offsets, width
