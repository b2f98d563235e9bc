"""The distribution of the next token: restrictions, chunks, and that writing and training agree on it."""

from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import TopKLogitsWarper, TopPLogitsWarper

from sb3_safe.functional import unlikelihood
from sb3_safe.language import tokens as tokens_module
from sb3_safe.language.tokens import SUPPRESSED, TokenDistribution, in_chunks
from sb3_safe.trust_bound import trained_parameters

from .test_agreement import rollout, text_model


class OutputLayer:
    """What a distribution asks of a language model; logits are the hidden states themselves."""

    def __init__(self, size: int) -> None:
        self.layer: Any = nn.Identity()
        self.config = self
        self.vocab_size = size

    def get_output_embeddings(self) -> Any:
        return self.layer

    def get_text_config(self) -> Any:
        return self


def log_probs(logits: th.Tensor, chosen: th.Tensor | None = None, **kwargs: Any) -> th.Tensor:
    lm = OutputLayer(logits.shape[-1])
    return TokenDistribution(**kwargs).log_probs(lm, logits, th.zeros(len(logits), dtype=th.long), chosen)


@given(st.integers(0, 1000), st.integers(1, 9), st.floats(0.05, 1.0), st.floats(0.2, 3.0))
def test_what_is_left_is_the_most_probable_and_is_normalised(seed: int, top_k: int, top_p: float, t: float) -> None:
    logits = th.randn(4, 9, generator=th.Generator().manual_seed(seed)) * 2
    actual = log_probs(logits, top_k=top_k, top_p=top_p, temperature=t).exp().numpy()
    whole = np.exp(logits.numpy() / t)
    whole /= whole.sum(-1, keepdims=True)
    for row, expected in zip(actual, whole, strict=True):
        order = np.argsort(-expected)[:top_k]
        expected = expected / expected[order].sum()
        kept = 1
        while kept < len(order) and (top_p == 1 or expected[order[:kept]].sum() < top_p - 1e-6):
            kept += 1
        assert set(np.flatnonzero(row > 0)) == set(order[:kept])
        np.testing.assert_allclose(row[order[:kept]], expected[order[:kept]] / expected[order[:kept]].sum(), rtol=1e-4)


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("top_k", [3, 10, 60])
def test_top_k_and_top_p_together_leave_what_they_leave_in_generate(top_k: int, top_p: float) -> None:
    logits = th.randn(100, 50, generator=th.Generator().manual_seed(0))
    scores = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits))
    np.testing.assert_allclose(log_probs(logits, top_k=top_k, top_p=top_p).exp(), scores.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("ends", [3, [3], [1, 3]])
def test_no_end_token_is_possible_before_the_minimum(ends: Any) -> None:
    lm, new_tokens = OutputLayer(5), th.tensor([0, 1, 2])
    actual = TokenDistribution(min_new_tokens=2, eos_token_id=ends).log_probs(lm, th.zeros(3, 5), new_tokens).exp()
    expected = th.ones(3, 5)
    expected[:2, ends] = 0
    np.testing.assert_allclose(actual, expected / expected.sum(-1, keepdim=True), atol=1e-6)


def test_the_token_that_was_chosen_always_stays() -> None:
    logits = th.tensor([[5.0, 4.0, -3.0]])
    assert log_probs(logits, top_k=2)[0, 2] < SUPPRESSED / 2
    kept = log_probs(logits, chosen=th.tensor([2]), top_k=2)
    np.testing.assert_allclose(kept, th.log_softmax(logits, -1), atol=1e-6)


def test_the_kl_is_that_of_the_whole_vocabulary_though_few_of_it_may_be_chosen() -> None:
    logits, reference = th.randn(2, 4, 9, generator=th.Generator().manual_seed(0))
    lm, new_tokens = OutputLayer(9), th.zeros(4, dtype=th.long)
    kl = TokenDistribution(temperature=0.7, top_k=3, top_p=0.5).kl(lm, logits, lm, reference, new_tokens)
    ours, theirs = (
        np.exp(x / 0.7) / np.exp(x / 0.7).sum(-1, keepdims=True) for x in (logits.numpy(), reference.numpy())
    )
    np.testing.assert_allclose(kl, (ours * np.log(ours / theirs)).sum(-1), rtol=1e-4)


def test_probabilities_are_in_single_precision_whatever_the_model_is_in() -> None:
    logits = th.randn(4, 50, generator=th.Generator().manual_seed(0)).bfloat16()
    actual = log_probs(logits)
    assert actual.dtype == th.float32
    np.testing.assert_allclose(actual, th.log_softmax(logits.double(), -1), atol=1e-5)


@pytest.mark.parametrize("restriction", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8, "temperature": 1.3}])
def test_writing_and_training_agree_under_restrictions(restriction: Any, env_kwargs: dict[str, Any]) -> None:
    """Also after updates, where what is left may have changed: ratios stay finite."""
    model = text_model(env_kwargs, policy_kwargs=restriction, learning_rate=1e-2)
    for _ in range(3):
        buffer = rollout(model)
        for batch in buffer.get(20):
            with th.no_grad():
                log_prob = model.policy.evaluate(batch.observations, batch.actions).log_prob
            np.testing.assert_allclose(log_prob, batch.old_log_prob, atol=1e-5)
            assert batch.reference_log_prob.min() > -30
        model.train()
        assert np.isfinite(model.measured_kl)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": None}, "top_k must be at least 1, or 0 for all tokens, got None"),
        ({"top_k": 0.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": None}, r"top_p must be in \(0, 1\], 1 for all tokens, got None"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_new_tokens": 2}, "eos_token_id"),
        ({"min_new_tokens": 2, "eos_token_id": []}, "eos_token_id"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenDistribution(**arguments)


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 50))
def test_chunks_change_nothing(size: int, rows: int) -> None:
    inputs = th.randn(size, 3, dtype=th.double, requires_grad=True)
    weight = th.randn(3, 7, dtype=th.double, requires_grad=True)

    def function(x: th.Tensor) -> tuple[th.Tensor, ...]:
        y = (x @ weight).log_softmax(-1)
        return y[:, 0], (y.exp() * y).sum(-1)

    results = []
    for chunk in (rows, size):
        outputs = in_chunks(function, chunk, inputs)
        results.append((*outputs, *th.autograd.grad(sum(o.square().sum() for o in outputs), [inputs, weight])))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one.detach(), other.detach(), atol=1e-12)


@pytest.mark.parametrize("chunk", [2**24, 20])
def test_the_probability_of_all_other_tokens_is_had_however_certain_one_is(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "CHUNK_LOGITS", chunk)
    logits = th.randn(6, 9, generator=th.Generator().manual_seed(0))
    log_odds = th.tensor([-2.0, 0.0, 12.0, 20.0, 30.0, 40.0])
    chosen = th.tensor([0, 8, 3, 3, 2, 5])
    rest = logits.scatter(-1, chosen[:, None], -th.inf).logsumexp(-1)
    logits.scatter_(-1, chosen[:, None], (rest + log_odds)[:, None])
    logits.requires_grad_()
    others = TokenDistribution().log_others(OutputLayer(9), logits, th.zeros(6, dtype=th.long), chosen)
    np.testing.assert_allclose(others.detach(), -np.logaddexp(0, log_odds.numpy()), rtol=1e-5)
    (gradient,) = th.autograd.grad(others.sum(), logits)
    expected = -1 / (1 + np.exp(-log_odds.numpy()))
    np.testing.assert_allclose(gradient.gather(-1, chosen[:, None])[:, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("restriction", [{"top_k": 1}, {"top_p": 0.01}, {"min_new_tokens": 2, "eos_token_id": [1, 2]}])
def test_a_token_that_is_all_that_is_left_is_not_pushed_down(restriction: Any) -> None:
    logits = th.tensor([[5.0, 4.0, -3.0], [5.0, 4.0, 7.0]], requires_grad=True)
    chosen, new_tokens = th.tensor([0, 0]), th.zeros(2, dtype=th.long)
    others = TokenDistribution(**restriction).log_others(OutputLayer(3), logits, new_tokens, chosen)
    loss = unlikelihood(others)
    (gradient,) = th.autograd.grad(loss.sum(), logits)
    assert th.isfinite(gradient).all()
    assert loss[0] == 0 and not gradient[0].any()
    assert th.isfinite(loss).all()


@pytest.mark.parametrize("estimator", ["k2", "exact"])
def test_no_distribution_of_a_whole_minibatch_is_kept(
    estimator: str, env_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loss keeps for its gradient does not grow by a vocabulary for every token."""
    model = text_model(env_kwargs, n_steps=64, batch_size=1000, kl_estimator=estimator, kl_controller="fixed")
    batch = next(iter(rollout(model).get(1000)))
    model._objective = model._make_objective()
    gradients, largest = [], []
    for logits in (2**24, 300 * 16):
        monkeypatch.setattr(tokens_module, "CHUNK_LOGITS", logits)
        kept: list[int] = []
        with th.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # noqa: B023
            loss, _ = model._loss(batch)
        gradients.append(th.autograd.grad(loss, [p for p in trained_parameters(model.policy)], allow_unused=True))
        largest.append(max(kept))
    assert largest[0] >= 300 * len(batch.actions)
    assert largest[1] < 300 * len(batch.actions)
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
