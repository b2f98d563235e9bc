from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textgen_env.assets.grammar import Grammar, is_sentence, split_header, split_sentences, write_review
from textgen_env.assets.lexicon import DOMAINS, opinions
from textgen_env.gold import gold_score

REVIEWS = [str(review) for review in map(write_review, [Random(seed) for seed in range(300)])]
HOTEL = DOMAINS[0]


def test_the_grammar_recognises_every_sentence_that_it_writes() -> None:
    for review in REVIEWS:
        domain, body = split_header(review)
        assert domain is not None
        assert all(is_sentence(sentence, domain) for sentence in split_sentences(body)), review


@pytest.mark.parametrize(
    "sentence",
    [
        "the room was great.",
        "The room was great",
        "The room great was.",
        "The Room was great.",
        "The room was great and awful.",
        "The room was great and the bed was awful.",
        "The room was great, but the bed was superb.",
        "The soup was great.",
        "What a excellent room!",
        "The room was great. The bed was great.",
        "Great great great.",
        "",
    ],
)
def test_what_is_nearly_a_sentence_is_not_recognised(sentence: str) -> None:
    assert not is_sentence(sentence, HOTEL)


@pytest.mark.parametrize(
    "sentence",
    [
        "The room was great.",
        "I loved the bed.",
        "The room was great, but the bed was awful.",
        "What an excellent room!",
        "The towels were not very bad.",
    ],
)
def test_sentences_are_recognised(sentence: str) -> None:
    assert is_sentence(sentence, HOTEL)


def test_recognition_agrees_with_enumeration_on_a_small_grammar() -> None:
    grammar = Grammar(
        {"<s>": [(1, "<a> <a>"), (1, "x")], "<a>": [(1, "x"), (1, "x y"), (1, "<b> z")], "<b>": [(1, "y")]}
    )
    parts = ["x", "x y", "y z"]
    derived = {"x"} | {f"{first} {second}" for first in parts for second in parts}
    words = ["x", "y", "z"]
    texts = [[]]
    for _ in range(5):
        texts += [[*text, word] for text in texts for word in words if len(text) < 4]
    for text in texts:
        assert grammar.recognises("<s>", text) == (" ".join(text) in derived)


def test_reviews_are_grammatical_novel_and_balanced() -> None:
    scores = [gold_score(review) for review in REVIEWS]
    assert min(score.grammaticality for score in scores) == 1.0
    assert sum(score.novelty for score in scores) / len(scores) > 0.98
    assert 0.45 < sum(score.score for score in scores) / len(scores) < 0.55


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0.0),
        ("Hotel review:", 0.0),
        ("superb perfect wonderful", 0.0),
        ("Hotel review: I stayed there last week.", 0.5),
        ("Hotel review: The room was perfect.", 1.0),
        ("Hotel review: The room was awful.", 0.0),
        ("Hotel review: The room was good.", 0.75),
        ("Hotel review: The room was very good.", (1 + 0.5 * 1.3) / 2),
        ("Hotel review: The room was not good.", (1 - 0.5 * 0.6) / 2),
        ("Hotel review: The room was not bad.", (1 + 0.5 * 0.6) / 2),
        ("Hotel review: The room was perfect. The bed", 0.5),
        ("Hotel review: The soup was perfect.", 0.0),
        ("The soup was perfect.", 1.0),
    ],
)
def test_scores_follow_the_formula(text: str, score: float) -> None:
    assert gold_score(text).score == pytest.approx(score)


def test_repetition_is_worth_less() -> None:
    once = "Hotel review: The room was perfect."
    again = once + " The room was perfect." * 3
    assert gold_score(again).novelty == 0.25
    assert gold_score(again).score < gold_score(once).score / 2


@settings(max_examples=100, deadline=None)
@given(st.text() | st.lists(st.sampled_from([*opinions(), "The room", "was", "not", "very", ".", "!"])).map(" ".join))
def test_any_text_gets_a_score_in_range(text: str) -> None:
    score, sentiment, grammaticality, novelty = gold_score(text)
    assert 0 <= score <= 1
    assert -1 <= sentiment <= 1
    assert 0 <= grammaticality <= 1
    assert 0 <= novelty <= 1
