"""The embedded reward model: a Bradley-Terry model of noisy comparisons of the language model's own texts.

It is good where the language model writes and blind elsewhere: it sees few pairs, some labelled wrongly, and hardly
any text that is ungrammatical or repeats itself. That is what makes the task one of *over*-optimisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2ForSequenceClassification

from textgen_env.assets.language import Sample, warmup_then_cosine
from textgen_env.gold import gold_score


class Pair(NamedTuple):
    """Two texts for one prompt, the preferred one first."""

    chosen: str
    rejected: str


def text_of(sample: Sample) -> str:
    """The text that a reward model reads."""
    return sample.prompt + sample.completion


def label(pairs: Sequence[tuple[Sample, Sample]], rng: Random, temperature: float, flip: float) -> list[Pair]:
    """Noisy human judgement: preferred with probability sigmoid(gold difference / temperature), then flipped at random.

    :param temperature: in units of the gold score; 0 for a judge that never errs on texts of different worth.
    :param flip: the share of labels that are turned round.
    """
    labelled = []
    for one, other in pairs:
        first, second = text_of(one), text_of(other)
        difference = gold_score(first).score - gold_score(second).score
        if difference == 0:
            continue
        prefers_first = (
            difference > 0 if temperature == 0 else rng.random() < 1 / (1 + math.exp(-difference / temperature))
        )
        if rng.random() < flip:
            prefers_first = not prefers_first
        labelled.append(Pair(first, second) if prefers_first else Pair(second, first))
    return labelled


def train_reward_model(
    config: Any,
    language_model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    epochs: int,
    batch_size: int = 32,
    peak_rate: float = 1e-3,
) -> Any:
    """Maximise log sigmoid(score of the chosen - score of the rejected), with a small pull of the scores to mean 0.

    The pull (Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244) centres the scores, since the head has no bias.

    :param config: of a classifier with one label.
    :param language_model: lends its embeddings, which know which words are alike: thousands of pairs then suffice.
    :return: the classifier, in evaluation mode.
    """
    model = Qwen2ForSequenceClassification(config)
    model.model.embed_tokens.load_state_dict(language_model.get_input_embeddings().state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=0.05)
    steps = epochs * math.ceil(len(pairs) / batch_size)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(pairs)).tolist()
        for start in range(0, len(pairs), batch_size):
            batch = [pairs[index] for index in order[start : start + batch_size]]
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * warmup_then_cosine(step, steps)
            better, worse = scores(
                model, tokenizer, [text for pair in zip(*batch, strict=True) for text in pair]
            ).chunk(2)
            loss = -F.logsigmoid(better - worse).mean() + 0.01 * (better + worse).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
    return model.eval()


def scores(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The reward model's scores of texts: [number of texts]."""
    result: Tensor = model(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits[:, 0]
    return result


def scale_to_unit_spread(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Fold into the head the factor that gives the scores of `texts` a standard deviation of 1."""
    with torch.no_grad():
        model.score.weight /= scores(model, tokenizer, texts).std()


def pair_accuracy(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """The share of pairs in which the model scores the chosen text higher."""
    with torch.no_grad():
        better, worse = scores(model, tokenizer, [text for pair in zip(*pairs, strict=True) for text in pair]).chunk(2)
    return float((better > worse).float().mean())
