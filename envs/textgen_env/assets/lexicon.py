"""The words of the embedded review language: opinion words with their strengths, and the things reviewed.

Strengths are in [-1, 1]. The positive and the negative side mirror each other, so that a language model of
the corpus is about balanced in sentiment.
"""

from __future__ import annotations

from dataclasses import dataclass

ADJECTIVES: dict[str, float] = {
    **dict.fromkeys(("fine", "decent", "okay"), 0.3),
    **dict.fromkeys(("good", "nice", "pleasant", "solid", "handy"), 0.5),
    **dict.fromkeys(("charming", "lovely", "impressive", "delightful", "great"), 0.75),
    **dict.fromkeys(("superb", "wonderful", "excellent", "perfect", "brilliant", "amazing"), 1.0),
    **dict.fromkeys(("plain", "dull", "ordinary"), -0.3),
    **dict.fromkeys(("bad", "poor", "weak", "cheap", "unpleasant"), -0.5),
    **dict.fromkeys(("ugly", "boring", "disappointing", "shabby", "messy"), -0.75),
    **dict.fromkeys(("awful", "terrible", "horrible", "dreadful", "useless", "appalling"), -1.0),
}
FEELINGS: dict[str, float] = {
    "did not mind": 0.3,
    "liked": 0.5,
    "enjoyed": 0.6,
    "praised": 0.7,
    "loved": 0.9,
    "adored": 1.0,
    "could not enjoy": -0.3,
    "disliked": -0.5,
    "did not like": -0.6,
    "criticised": -0.7,
    "hated": -0.9,
    "detested": -1.0,
}
VERDICTS: dict[str, float] = {
    "would probably": 0.5,
    "would happily": 0.8,
    "would gladly": 0.8,
    "would certainly": 0.9,
    "would hardly": -0.5,
    "would not": -0.8,
    "would rather not": -0.8,
    "would never": -0.9,
}
STARS: dict[str, float] = {"four stars": 0.7, "five stars": 1.0, "two stars": -0.7, "one star": -1.0}
LEADS: dict[str, float] = {"luckily": 0.3, "happily": 0.3, "sadly": -0.3, "unfortunately": -0.3}

DEGREES: dict[str, float] = {"very": 1.3, "really": 1.2, "truly": 1.2, "rather": 0.8, "fairly": 0.7, "slightly": 0.5}
NEUTRAL_LEADS = ("overall", "honestly", "in the end", "to be fair", "as always", "at first")
PEOPLE = ("I", "we", "my friend", "my sister", "everyone", "my partner")
PLACES_IN_TIME = ("on a Sunday", "in March", "last week", "in the morning", "with my family", "for the first time")


@dataclass(frozen=True, eq=False)
class Domain:
    """One kind of thing that is reviewed.

    :param name: the thing, a singular noun.
    :param aspects: singular nouns, its parts.
    :param plural_aspects: plural nouns, more of its parts.
    :param again: what a satisfied customer would do.
    :param did: what any customer did, in the past tense.
    :param adjectives: opinion adjectives that only this kind of thing takes, with strengths.
    """

    name: str
    aspects: tuple[str, ...]
    plural_aspects: tuple[str, ...]
    again: tuple[str, ...]
    did: tuple[str, ...]
    adjectives: dict[str, float]


DOMAINS: tuple[Domain, ...] = (
    Domain(
        "hotel",
        ("room", "bed", "lobby", "breakfast", "pool", "view", "bathroom"),
        ("towels", "hallways", "stairs"),
        ("stay there again", "book it again"),
        ("stayed there", "spent two nights there", "booked a room"),
        {"spotless": 0.8, "cosy": 0.6, "filthy": -0.9, "noisy": -0.6},
    ),
    Domain(
        "restaurant",
        ("soup", "steak", "service", "menu", "dessert", "wine", "salad"),
        ("waiters", "portions", "noodles"),
        ("eat there again", "book a table again"),
        ("had dinner there", "ordered the soup", "waited for a table"),
        {"delicious": 0.9, "tasty": 0.7, "bland": -0.6, "greasy": -0.7},
    ),
    Domain(
        "film",
        ("plot", "cast", "ending", "music", "script", "camera work", "dialogue"),
        ("actors", "costumes", "jokes"),
        ("watch it again", "see it again"),
        ("saw it", "watched it at home", "went to the cinema"),
        {"gripping": 0.9, "funny": 0.6, "predictable": -0.5, "shallow": -0.7},
    ),
    Domain(
        "phone",
        ("screen", "battery", "camera", "speaker", "case", "charger", "keyboard"),
        ("buttons", "photos", "updates"),
        ("buy it again", "order it again"),
        ("bought it", "used it", "got it as a present"),
        {"responsive": 0.7, "bright": 0.5, "laggy": -0.7, "fragile": -0.6},
    ),
    Domain(
        "book",
        ("story", "hero", "style", "cover", "opening", "last chapter", "translation"),
        ("characters", "pictures", "chapters"),
        ("read it again", "borrow it again"),
        ("read it", "borrowed it", "finished it on the train"),
        {"moving": 0.8, "witty": 0.7, "confusing": -0.6, "tedious": -0.8},
    ),
    Domain(
        "cafe",
        ("coffee", "cake", "terrace", "tea", "counter", "sandwich", "garden"),
        ("pastries", "tables", "cups"),
        ("go there again", "meet friends there"),
        ("had a coffee there", "sat outside", "met a friend there"),
        {"fresh": 0.6, "welcoming": 0.8, "stale": -0.8, "bitter": -0.5},
    ),
    Domain(
        "laptop",
        ("display", "touchpad", "processor", "fan", "hinge", "webcam", "memory"),
        ("ports", "keys", "drivers"),
        ("choose it again", "pay for it again"),
        ("took it to work", "bought it online", "set it up"),
        {"fast": 0.7, "reliable": 0.8, "slow": -0.7, "unstable": -0.8},
    ),
    Domain(
        "museum",
        ("tour", "collection", "building", "guide", "gift shop", "audio guide", "exhibition"),
        ("paintings", "statues", "signs"),
        ("visit it again", "take the tour again"),
        ("visited it", "took the tour", "bought a ticket"),
        {"fascinating": 0.9, "informative": 0.6, "crowded": -0.5, "gloomy": -0.7},
    ),
    Domain(
        "jacket",
        ("zip", "lining", "hood", "colour", "fabric", "collar", "fit"),
        ("pockets", "sleeves", "seams"),
        ("wear it again", "get another one"),
        ("wore it", "tried it on", "took it on a hike"),
        {"warm": 0.6, "comfortable": 0.8, "itchy": -0.7, "stiff": -0.5},
    ),
    Domain(
        "game",
        ("world", "map", "soundtrack", "boss fight", "tutorial", "combat", "main quest"),
        ("graphics", "puzzles", "levels"),
        ("play it again", "start it again"),
        ("played it", "finished the tutorial", "tried the demo"),
        {"addictive": 0.7, "thrilling": 0.9, "buggy": -0.8, "repetitive": -0.6},
    ),
)

HEADERS = (
    "review of a {}:",
    "about this {}:",
    "{} review:",
    "my notes on the {}:",
    "our {}, in short:",
    "a {} report:",
)


def opinions() -> dict[str, float]:
    """Every opinion phrase of the language with its strength in [-1, 1]."""
    table = {**ADJECTIVES, **FEELINGS, **VERDICTS, **STARS, **LEADS}
    for domain in DOMAINS:
        table.update(domain.adjectives)
    return table
