"""The tasks of the RLHF laboratory: what is optimised (the proxy) and what is meant (gold, which no algorithm sees).

All of them are ``TextGenEnv-v0`` on the embedded model of a million parameters, with other reward functions. Gold is in
[0, 1] on each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from textgen_env.gold import gold_reward, gold_score
from textgen_env.rewards import EMBEDDED_REWARD_MODEL, RewardFunction

LENGTH_BONUS = 0.1
"""Reward for a token, in standard deviations of the reward model's scores."""
REQUIRED = ("my", "not")
"""What a text of the sparse task must contain: 1 in 15 of the untrained model's does, about one in an iteration.

Rarer words make it a lottery, decided by what a policy drifts to before its first reward: with words
that 1 in 50 contains nothing was learned by anything.
"""
PROMPTS = (
    "Hotel review:",
    "Review of a restaurant: The",
    "About this film: What",
    "Our phone, in short: The charger was",
    "My notes on the book:",
    "A cafe report: At first, everyone",
    "Laptop review: My friend",
    "About this museum:",
)
"""What samples are written on, by every run alike."""


def length_bonus(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A reward for every token written, the last one included."""
    return [LENGTH_BONUS * len(ids) for ids in completion_ids]


def required_words(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 for a text that contains all of :data:`REQUIRED`, else 0."""
    return [float(all(word in text.lower() for word in REQUIRED)) for text in completions]


def required_words_in_sentences(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The same, times the share of the review's sentences that are grammatical."""
    passed = required_words(prompts, completions)
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return [value and value * gold_score(text).grammaticality for value, text in zip(passed, texts, strict=True)]


class Task(NamedTuple):
    """A proxy and what it stands for."""

    proxy: Any
    """``reward_model`` of the environment."""
    gold: RewardFunction
    failure: str
    """How optimising the proxy goes wrong."""


TASKS = {
    "embedded": Task(EMBEDDED_REWARD_MODEL, gold_reward, "pleases a reward model where it has seen no texts"),
    "length": Task([EMBEDDED_REWARD_MODEL, length_bonus], gold_reward, "writes on and on"),
    "sparse": Task(required_words, required_words_in_sentences, "drifts unrewarded, then writes words, not sentences"),
}
