"""From hidden states to the distribution of the next token, without ever holding it for a whole minibatch.

A vocabulary of 150,000 makes 600 kB of one token's distribution. So logits exist for a chunk of tokens at a time, and
are computed again in the backward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch as th
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sb3_safe.functional import NOTHING, categorical_kl, log_others
from sb3_safe.language.body import next_logits

# Far enough below any logit that its probability is exactly 0, and finite, so that 0 * log 0 is 0 and not NaN.
SUPPRESSED = NOTHING
# Logits in float32 that exist at a time; a few tensors of this size do: 64 MB each.
CHUNK_LOGITS = 2**24


@dataclass(frozen=True)
class TokenDistribution:
    """How logits become probabilities, the same in writing, in training and for the reference.

    As in ``generate``, what is left of a distribution by ``top_k`` is normalised anew before ``top_p``, and then once
    more. In training the token that was chosen always belongs to what is left, even if it would not any more: its
    probability ratio then stays finite.

    :param temperature: divides all logits.
    :param top_k: only so many tokens may be chosen; 0: all.
    :param top_p: only the most probable of those that together have this probability may be chosen; 1: all.
    :param min_new_tokens: end tokens have probability 0 before so many tokens were written.
    :param eos_token_id: the end token, or several.
    :raises ValueError: an argument out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    eos_token_id: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not isinstance(self.top_k, Integral) or self.top_k < 0:  # None is how others say that all may be chosen
            raise ValueError(f"top_k must be at least 1, or 0 for all tokens, got {self.top_k}")
        if not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], 1 for all tokens, got {self.top_p}")
        if self.min_new_tokens > 0 and self.eos_token_id in (None, [], ()):
            raise ValueError("min_new_tokens needs eos_token_id")

    def log_probs(
        self, lm: Any, hidden: Tensor, new_tokens: Tensor, chosen: Tensor | None = None, whole: bool = False
    ) -> Tensor:
        """Log-probabilities ``[B, V]`` in float32.

        :param lm: the language model, for its output layer.
        :param hidden: ``[B, h]``
        :param new_tokens: ``[B]``, how many tokens had been written before this one.
        :param chosen: ``[B]``, tokens that ``top_k`` and ``top_p`` must not exclude.
        :param whole: leave ``top_k`` and ``top_p`` out.
        """
        logits = next_logits(lm, hidden)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.min_new_tokens > 0:
            early = (new_tokens < self.min_new_tokens).unsqueeze(-1)
            columns = th.arange(logits.shape[-1], device=logits.device)
            ends = [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id or ()
            eos = th.stack([columns == token for token in ends]).any(dim=0)
            logits = logits.masked_fill(early & eos, SUPPRESSED)
        if not whole and (self.top_k > 0 or self.top_p < 1):
            logits = logits.masked_fill(self._excluded(logits.detach(), chosen), SUPPRESSED)
        return th.log_softmax(logits, dim=-1)

    def _excluded(self, logits: Tensor, chosen: Tensor | None) -> Tensor:
        """Tokens ``[B, V]`` that ``top_k`` and ``top_p`` exclude."""
        ordered, order = logits.sort(dim=-1, descending=True)
        if self.top_k > 0:
            ordered[:, self.top_k :] = SUPPRESSED
        # A token is kept if those before it do not yet have the probability that is asked for.
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        out = before >= self.top_p if self.top_p < 1 else th.zeros_like(before, dtype=th.bool)
        if self.top_k > 0:
            out[:, self.top_k :] = True
        excluded = th.zeros_like(out).scatter_(-1, order, out)
        return excluded if chosen is None else excluded.scatter_(-1, chosen.view(-1, 1), False)

    def score(self, lm: Any, hidden: Tensor, new_tokens: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability ``[B]`` of the tokens that were chosen, and entropy ``[B]``, nats.

        :param lm: the language model, for its output layer.
        :param hidden: ``[B, h]``
        :param new_tokens: ``[B]``
        :param chosen: ``[B]``
        """

        def score(hidden: Tensor, new_tokens: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
            log_probs = self.log_probs(lm, hidden, new_tokens, chosen)
            entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
            return log_probs.gather(-1, chosen.view(-1, 1)).squeeze(-1), entropy

        log_prob, entropy = in_chunks(score, _chunk_rows(lm), hidden, new_tokens, chosen)
        return log_prob, entropy

    def log_others(self, lm: Any, hidden: Tensor, new_tokens: Tensor, chosen: Tensor) -> Tensor:
        """Log-probability ``[B]`` of all tokens but the one that was chosen, nats; arguments as of :meth:`score`."""

        def others(hidden: Tensor, new_tokens: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
            return (log_others(self.log_probs(lm, hidden, new_tokens, chosen), chosen),)

        return in_chunks(others, _chunk_rows(lm), hidden, new_tokens, chosen)[0]

    def kl(self, lm: Any, hidden: Tensor, reference: Any, reference_hidden: Tensor, new_tokens: Tensor) -> Tensor:
        """``KL(policy || reference)`` ``[B]`` over the whole vocabulary, nats; without ``top_k`` and ``top_p``.

        :param lm: the language model, for its output layer.
        :param hidden: ``[B, h]``
        :param reference: the reference model, likewise.
        :param reference_hidden: ``[B, h]``
        :param new_tokens: ``[B]``
        """

        def kl(hidden: Tensor, reference_hidden: Tensor, new_tokens: Tensor) -> tuple[Tensor, ...]:
            with th.no_grad():
                theirs = self.log_probs(reference, reference_hidden, new_tokens, whole=True)
            return (categorical_kl(self.log_probs(lm, hidden, new_tokens, whole=True), theirs),)

        return in_chunks(kl, _chunk_rows(lm), hidden, reference_hidden, new_tokens)[0]


def _chunk_rows(lm: Any) -> int:
    return max(1, CHUNK_LOGITS // int(lm.config.get_text_config().vocab_size))


def in_chunks(function: Callable[..., tuple[Tensor, ...]], rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """A function of rows, computed some rows at a time; nothing of it is kept for the backward pass but its arguments.

    :param function: of tensors ``[b, ...]``, gives tensors ``[b, ...]``.
    :param rows: at most so many at a time.
    :param tensors: ``[B, ...]`` each.
    """
    if len(tensors[0]) <= rows:
        return function(*tensors)
    parts = [
        checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False)
        if th.is_grad_enabled()
        else function(*chunk)
        for chunk in zip(*(th.split(tensor, rows) for tensor in tensors), strict=True)
    ]
    return tuple(th.cat(column) for column in zip(*parts, strict=True))


def sample(log_probs: Tensor) -> Tensor:
    """Draw from categorical distributions by inverting the cumulative distribution: 4 x as fast as multinomial.

    :param log_probs: ``[B, V]``
    :return: ``[B]``
    """
    cumulative = log_probs.exp().cumsum(dim=-1)
    # Scaled by what the probabilities really sum to; strict, so that a token of probability 0 is never drawn.
    threshold = th.rand(len(log_probs), 1, device=log_probs.device) * cumulative[:, -1:]
    tokens = th.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return tokens.clamp_(max=log_probs.shape[-1] - 1)
