"""A context-free grammar of short reviews that writes them and recognises them.

One set of rules serves both, so what the corpus contains is by construction what the gold scorer accepts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from random import Random

from textgen_env.assets.lexicon import (
    ADJECTIVES,
    DEGREES,
    DOMAINS,
    FEELINGS,
    HEADERS,
    LEADS,
    NEUTRAL_LEADS,
    PEOPLE,
    PLACES_IN_TIME,
    STARS,
    VERDICTS,
    Domain,
    opinions,
)

Rules = Mapping[str, Sequence[tuple[float, str]]]
WORD = re.compile(r"[A-Za-z]+|[^\sA-Za-z]")
CAPITALISED = frozenset({"I", "Sunday", "March"})
VOWELS = "aeiou"
#: Chances of a positive, negative, mixed and neutral sentence in a review of each mood, and of the mood.
MOODS = (
    (0.40, (0.84, 0.01, 0.05, 0.10)),
    (0.40, (0.01, 0.84, 0.05, 0.10)),
    (0.12, (0.35, 0.35, 0.20, 0.10)),
    (0.08, (0.25, 0.25, 0.05, 0.45)),
)
MAX_REVIEW_WORDS = 28


class Grammar:
    """A context-free grammar without left recursion.

    :param rules: for each nonterminal, written `<name>`, its productions as (weight, space-separated symbols).
    """

    def __init__(self, rules: Rules) -> None:
        self._weights = {symbol: [weight for weight, _ in options] for symbol, options in rules.items()}
        self._options = {symbol: [tuple(text.split()) for _, text in options] for symbol, options in rules.items()}
        # Most productions are single words: looking them up by their first word keeps recognition fast.
        self._by_word: dict[tuple[str, str], list[tuple[str, ...]]] = {}
        self._open: dict[str, list[tuple[str, ...]]] = {symbol: [] for symbol in rules}
        for symbol, options in self._options.items():
            for option in options:
                if option[0] in rules:
                    self._open[symbol].append(option)
                else:
                    self._by_word.setdefault((symbol, option[0]), []).append(option)

    def write(self, symbol: str, rng: Random) -> list[str]:
        """A random derivation of `symbol`, as words."""
        if symbol not in self._options:
            return [symbol]
        (option,) = rng.choices(self._options[symbol], self._weights[symbol])
        return [word for part in option for word in self.write(part, rng)]

    def recognises(self, symbol: str, words: Sequence[str]) -> bool:
        """Whether `symbol` derives exactly `words`."""
        memo: dict[tuple[str, int], set[int]] = {}

        def ends(symbol: str, start: int) -> set[int]:
            """Every position at which a derivation of `symbol` that begins at `start` can end."""
            if symbol not in self._open:
                return {start + 1} if start < len(words) and words[start] == symbol else set()
            if (symbol, start) not in memo:
                found: set[int] = set()
                first = words[start] if start < len(words) else ""
                for option in self._open[symbol] + self._by_word.get((symbol, first), []):
                    positions = {start}
                    for part in option:
                        positions = {end for position in positions for end in ends(part, position)}
                    found |= positions
                memo[symbol, start] = found
            return memo[symbol, start]

        return len(words) in ends(symbol, 0)


def _words(options: Iterable[str], weight: float = 1.0) -> list[tuple[float, str]]:
    return [(weight, option) for option in options]


def _side(table: Mapping[str, float], sign: str) -> list[str]:
    return [word for word, strength in table.items() if (strength > 0) == (sign == "+")]


@cache
def grammar_of(domain: Domain) -> Grammar:
    """The grammar of sentences about one domain; `<sentence>` is any of them.

    `<s+>`, `<s->`, `<sx>` and `<s0>` are positive, negative, mixed and neutral ones.
    """
    rules: dict[str, list[tuple[float, str]]] = {
        "<sentence>": _words(("<s+>", "<s->", "<sx>", "<s0>")),
        "<sx>": [
            *[(2, f"<cl{a}> , but <cl{b}> .") for a, b in ("+-", "-+")],
            *[(1, f"although <cl{a}> , <cl{b}> .") for a, b in ("+-", "-+")],
        ],
        "<s0>": [
            (4, "<who> <did> <when> ."),
            (1, "<who> <did> because of the <noun> ."),
            (1, "three stars from me ."),
            (2, "a friend told me about it <when> ."),
            (1, "this is about the <noun> and the <noun> ."),
        ],
        "<who>": _words(PEOPLE),
        "<did>": _words(domain.did),
        "<when>": _words(PLACES_IN_TIME),
        "<again>": _words((*domain.again, "recommend it")),
        "<noun>": _words(domain.aspects),
        "<nouns>": _words(domain.plural_aspects),
        "<any-noun>": [(3, "the <noun>"), (1, "the <nouns>"), (1, f"this {domain.name}")],
        "<lead>": _words(NEUTRAL_LEADS),
        "<degree>": _words(DEGREES),
        "<looked>": _words(("looked", "seemed", "felt")),
        "<thing>": _words((domain.name, *domain.aspects)),
    }
    adjectives = {**ADJECTIVES, **domain.adjectives}
    for sign, other in ("+-", "-+"):
        side = _side(adjectives, sign)
        rules |= {
            f"<s{sign}>": [
                (8, f"<cl{sign}> ."),
                (0.8, f"<cl{sign}> and <cl{sign}> ."),
                (2, f"<lead> , <cl{sign}> ."),
                (0.5, f"<lead{sign}> , <cl{sign}> ."),
                (0.3, f"<feel{sign}> because <cl{sign}> ."),
                (1.5, f"what <a{sign}> <thing> !"),
                (2, f"<who> <would{sign}> <again> ."),
                (1, f"<stars{sign}> from me ."),
            ],
            f"<cl{sign}>": [
                (5, f"the <noun> was <ap{sign}>"),
                (3, f"the <nouns> were <ap{sign}>"),
                (2, f"this {domain.name} was <ap{sign}>"),
                (1, f"the <noun> <looked> <ap{sign}>"),
                (1.5, f"it had <a{sign}> <noun>"),
                (1.5, f"<who> thought the <noun> was <ap{sign}>"),
                (3, f"<feel{sign}>"),
            ],
            f"<feel{sign}>": [(1, f"<who> <felt{sign}> <any-noun>")],
            f"<ap{sign}>": [
                (8, f"<adj{sign}>"),
                (4, f"<degree> <adj{sign}>"),
                (1, f"not <adj{other}>"),
                (0.5, f"not very <adj{other}>"),
                (0.5, f"<adj{sign}> and <adj{sign}>"),
            ],
            f"<adj{sign}>": [(3.0 if word in domain.adjectives else 1.0, word) for word in side],
            f"<a{sign}>": [(1, f"{'an' if word[0] in VOWELS else 'a'} {word}") for word in side],
            f"<felt{sign}>": _words(_side(FEELINGS, sign)),
            f"<would{sign}>": _words(_side(VERDICTS, sign)),
            f"<stars{sign}>": _words(_side(STARS, sign)),
            f"<lead{sign}>": _words(_side(LEADS, sign)),
        }
    return Grammar(rules)


@lru_cache(maxsize=100_000)
def is_sentence(sentence: str, domain: Domain) -> bool:
    """Whether the grammar of `domain` derives `sentence`, capital letter and final stop included."""
    words = WORD.findall(sentence)
    if not words or not words[0][0].isupper():
        return False
    if words[0] not in CAPITALISED:
        words[0] = words[0][0].lower() + words[0][1:]
    return grammar_of(domain).recognises("<sentence>", words)


def split_header(text: str) -> tuple[Domain | None, str]:
    """Take a review's heading off: (the domain it names or None, the rest)."""
    text = " ".join(text.split())
    for domain in DOMAINS:
        for header in headers(domain):
            if text.startswith(header):
                return domain, text[len(header) :].lstrip()
    return None, text


def split_sentences(text: str) -> list[str]:
    """The sentences of a text; what follows the last stop is a sentence too."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


@cache
def headers(domain: Domain) -> tuple[str, ...]:
    """The headings that a review of `domain` may have."""
    return tuple(_capitalised(header.format(domain.name)) for header in HEADERS)


@dataclass(frozen=True)
class Review:
    """A review: its heading, such as `Review of a hotel:`, and its sentences."""

    header: str
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.header, *self.sentences))


def write_review(rng: Random) -> Review:
    """Draw a review of one to three sentences that states no opinion twice."""
    domain = rng.choice(DOMAINS)
    (kinds,) = rng.choices([kinds for _, kinds in MOODS], [weight for weight, _ in MOODS])
    (length,) = rng.choices((1, 2, 3), (0.15, 0.5, 0.35))
    grammar = grammar_of(domain)
    while True:
        symbols = rng.choices(("<s+>", "<s->", "<sx>", "<s0>"), kinds, k=length)
        sentences = [grammar.write(symbol, rng) for symbol in symbols]
        words = [word for sentence in sentences for word in sentence]
        content = [word for word in words if word in _ONCE or word in domain.aspects]
        if len(words) <= MAX_REVIEW_WORDS and len(content) == len(set(content)):
            return Review(rng.choice(headers(domain)), tuple(_spell(sentence) for sentence in sentences))


#: Words that a review uses once: opinions, and the marks of verdicts, stars and feelings that span several words.
_ONCE = frozenset(opinions()) | {"would", "from", "did", "could"}


def _spell(words: Sequence[str]) -> str:
    return _capitalised(re.sub(r" (?=[.,!])", "", " ".join(words)))


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
