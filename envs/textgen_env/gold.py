"""The gold scorer of the embedded task: what a review is really worth, to be compared with what a reward model says.

    score = novelty * mean over sentences of  grammatical * (1 + sentiment) / 2      in [0, 1]

* `grammatical` is 1 for a sentence that the review grammar derives for the domain named in the heading (without
  a heading: for whichever one domain suits the text best), else 0.
* `sentiment`, in [-1, 1], is the mean strength of the opinion phrases of a sentence: scaled by a degree word before
  them ("very" 1.3), times -0.6 after "not"; 0 where there are none.
* `novelty` is the share of sentences and opinion phrases that did not occur before in the text.

So gibberish, unfinished and empty texts score 0, neutral grammatical ones 0.5, and strong varied praise near 1.
Pure Python: nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from textgen_env.assets.grammar import WORD, is_sentence, split_header, split_sentences
from textgen_env.assets.lexicon import DEGREES, DOMAINS, opinions

NEGATION = -0.6

_OPINIONS = {tuple(phrase.split()): strength for phrase, strength in opinions().items()}
_LONGEST = max(map(len, _OPINIONS))


class GoldScore(NamedTuple):
    """The gold score of a text and its parts.

    :param score: in [0, 1], the product described above.
    :param sentiment: mean over sentences, in [-1, 1].
    :param grammaticality: share of sentences that are grammatical, in [0, 1].
    :param novelty: share of sentences and opinions that are not repetitions, in [0, 1].
    """

    score: float
    sentiment: float
    grammaticality: float
    novelty: float


def gold_score(text: str) -> GoldScore:
    """Score a review, its heading included; any string is allowed."""
    domain, body = split_header(text)
    sentences = split_sentences(body)
    if not sentences:
        return GoldScore(0.0, 0.0, 0.0, 0.0)
    found = [_opinions_in(sentence) for sentence in sentences]
    sentiments = [sum(s for _, s in opinions) / len(opinions) if opinions else 0.0 for opinions in found]
    grammatical = max(
        (
            [is_sentence(sentence, candidate) for sentence in sentences]
            for candidate in ([domain] if domain else DOMAINS)
        ),
        key=sum,
    )
    said = [*sentences, *(phrase for opinions in found for phrase, _ in opinions)]
    novelty = len(set(said)) / len(said)
    worth = sum(g * (1 + s) / 2 for g, s in zip(grammatical, sentiments, strict=True)) / len(sentences)
    return GoldScore(novelty * worth, sum(sentiments) / len(sentiments), sum(grammatical) / len(grammatical), novelty)


def gold_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """The gold score as a reward function: `TextGenEnv(reward_model=gold_reward)`.

    :param prompts: strings, or message lists of which the last one's content is continued.
    :param completions: strings, or message lists with one message each.
    """
    return [
        gold_score(_content(prompt) + ("" if isinstance(prompt, str) else " ") + _content(completion)).score
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _content(text: Any) -> str:
    return text if isinstance(text, str) else str(text[-1]["content"])


def _opinions_in(sentence: str) -> list[tuple[str, float]]:
    """The opinion phrases of a sentence, longest match first from the left, with their strengths in context."""
    words = [word.lower() for word in WORD.findall(sentence)]
    found = []
    start = 0
    while start < len(words):
        for length in range(_LONGEST, 0, -1):
            phrase = tuple(words[start : start + length])
            if phrase in _OPINIONS:
                strength = _OPINIONS[phrase] * _context(words[:start])
                found.append((" ".join(phrase), max(-1.0, min(1.0, strength))))
                start += len(phrase) - 1
                break
        start += 1
    return found


def _context(before: list[str]) -> float:
    """The factor that a negation and a degree word directly before a phrase put on its strength."""
    factor = 1.0
    if before and before[-1] in DEGREES:
        factor *= DEGREES[before[-1]]
        before = before[:-1]
    return factor * NEGATION if before and before[-1] == "not" else factor
