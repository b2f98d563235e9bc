"""A rollout buffer that yields whole texts.

Storage is SB3's, but for observations: a text's tokens are its first observation and the actions that follow, so one
observation a segment is kept, not one a token. A segment is what one environment wrote of one text within one
rollout. A minibatch holds whole segments, packed into few rows for one forward pass, and every per-token tensor flat,
with prompts and padding already gone: a loss needs no masks, and standardising advantages is masked whitening for free.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer
from torch import Tensor

from sb3_safe.buffers import AnnotatedRollout, SafeSamples

PACKED_WIDTH = 64


class Segment(NamedTuple):
    """What one environment wrote of one text within one rollout."""

    env: int
    start: int
    """Step of the rollout at which it begins."""
    context: np.ndarray
    """Token ids that were there before, ``[length]``."""
    prompt_length: int


class SegmentBuffer(AnnotatedRollout, DictRolloutBuffer):  # type: ignore[misc]
    """Rollout buffer for observations ``Dict(input_ids, length, prompt_length)`` and token actions.

    ``batch_size`` counts tokens: the rollout is cut into the nearest number of minibatches of about equal size,
    between segments.
    """

    segments: list[Segment]

    def reset(self) -> None:
        """Forget the rollout."""
        # SB3 allocates one observation a step for each of these shapes.
        self.obs_shape = {}
        super().reset()
        self.segments = []

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
        starts = range(self.n_envs) if self.pos == 0 else np.flatnonzero(episode_start)
        for env in starts:
            length = int(obs["length"][env, 0])
            context = obs["input_ids"][env, :length].astype(np.int64)
            self.segments.append(Segment(int(env), self.pos, context, int(obs["prompt_length"][env, 0])))
        super().add(obs, action, reward, episode_start, value, log_prob)

    def _flat_observations(self) -> dict[str, Tensor]:
        return {}

    def _batches(self, permutation: Tensor | None, batch_size: int) -> Generator[SafeSamples, None, None]:
        """Minibatches of whole segments; ``permutation`` (of tokens) only says whether to shuffle."""
        # In flat order, environment by environment, a segment ends where the next one begins.
        segments = sorted(self.segments, key=lambda segment: (segment.env, segment.start))
        starts = np.array([segment.env * self.buffer_size + segment.start for segment in segments])
        lengths = np.diff(starts, append=self.buffer_size * self.n_envs)
        order = np.arange(len(segments))
        if permutation is not None:
            # The order in which the segments' first tokens come in the permutation of all tokens.
            rank = th.empty_like(permutation)
            rank[permutation] = th.arange(len(permutation), device=permutation.device)
            order = np.argsort(rank[th.as_tensor(starts, device=rank.device)].cpu().numpy())
        flat = self._flat_tensors()
        total = int(lengths.sum())
        n_batches = min(len(segments), max(1, round(total / batch_size)))
        # A segment belongs to the minibatch in which its middle token falls.
        middle = np.cumsum(lengths[order]) - lengths[order] / 2
        owner = np.minimum((middle * n_batches / total).astype(int), n_batches - 1)
        for number in range(n_batches):
            chosen = order[owner == number]
            if len(chosen) > 0:
                yield self._samples([segments[i] for i in chosen], starts[chosen], lengths[chosen], flat)

    def _samples(
        self, segments: list[Segment], starts: np.ndarray, lengths: np.ndarray, flat: dict[str, Tensor]
    ) -> SafeSamples:
        """Pack segments into rows ``[R, W]`` and pick their B tokens out of the flat tensors."""
        contexts = np.array([len(segment.context) for segment in segments])
        # The last token of a segment is predicted, but nothing is predicted from it.
        rows, offsets, width = pack(contexts + lengths - 1)
        steps = np.concatenate([np.arange(length) for length in lengths])
        index = th.as_tensor(np.repeat(starts, lengths) + steps, device=self.device)
        written = flat["actions"][index].long().view(-1)
        ids = np.zeros((rows.max() + 1, width), dtype=np.int64)
        positions = np.zeros_like(ids)  # where there is padding, each 0 begins a text of its own that nobody reads
        tokens = np.split(written.cpu().numpy(), np.cumsum(lengths)[:-1])
        for segment, row, offset, new in zip(segments, rows, offsets, tokens, strict=True):
            text = np.concatenate([segment.context, new[:-1]])
            ids[row, offset : offset + len(text)] = text
            positions[row, offset : offset + len(text)] = np.arange(len(text))
        prompt_lengths = np.array([segment.prompt_length for segment in segments])
        observations = {
            "input_ids": ids,
            "position_ids": positions,
            "rows": np.repeat(rows, lengths),
            "cols": np.repeat(offsets + contexts - 1, lengths) + steps,
            "new_tokens": np.repeat(contexts - prompt_lengths, lengths) + steps,
        }
        picked: dict[str, Any] = {name: tensor[index] for name, tensor in flat.items() if name != "actions"}
        return SafeSamples(
            {name: self.to_torch(array) for name, array in observations.items()},
            written,
            picked["values"],
            picked["log_probs"],
            picked["advantages"],
            picked["returns"],
            picked.get("reference_log_prob"),
            picked.get("old_critic_values"),
        )


def pack(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
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
