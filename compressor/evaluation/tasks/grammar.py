"""Minimal pairs: two sentences that differ in a word or two, of which one is English.

The model has it right if it finds the grammatical one likelier. Our own templates, so that they are on every machine.
"""

import random
from collections.abc import Callable

from compressor.evaluation.tasks.questions import Questions

PAIRS = 30  # of each phenomenon

NOUNS = (
    *(("teacher", "teachers"), ("doctor", "doctors"), ("farmer", "farmers"), ("child", "children"), ("woman", "women")),
    *(("artist", "artists"), ("driver", "drivers"), ("guest", "guests"), ("painter", "painters"), ("man", "men")),
)
THINGS = (
    ("book", "books"),
    ("car", "cars"),
    ("letter", "letters"),
    ("picture", "pictures"),
    ("box", "boxes"),
    ("key", "keys"),
)
VERBS = (
    ("sleeps", "sleep"),
    ("laughs", "laugh"),
    ("works", "work"),
    ("sings", "sing"),
    ("waits", "wait"),
    ("smiles", "smile"),
)
PAST = (("wrote", "written"), ("saw", "seen"), ("took", "taken"), ("gave away", "given away"), ("broke", "broken"))
ADJECTIVES = ("old", "new", "small", "heavy", "strange", "blue")
WHEN = ("yesterday", "last week", "after the game", "in the kitchen")
HE, SHE = ("John", "Peter", "Michael", "David"), ("Mary", "Anna", "Susan", "Laura")

Pair = tuple[str, str]  # grammatical, not grammatical


def _agreement(draw: random.Random) -> Pair:
    noun, verb, plural = draw.choice(NOUNS), draw.choice(VERBS), draw.randrange(2)
    sentence = f"The {noun[plural]} often {{}} in the garden."
    return sentence.format(verb[plural]), sentence.format(verb[1 - plural])


def _agreement_over_distance(draw: random.Random) -> Pair:
    noun, other = draw.sample(NOUNS, 2)
    verb, plural = draw.choice(VERBS), draw.randrange(2)
    sentence = f"The {noun[plural]} near the {other[1 - plural]} {{}} every day."
    return sentence.format(verb[plural]), sentence.format(verb[1 - plural])


def _agreement_over_clause(draw: random.Random) -> Pair:
    noun, other = draw.sample(NOUNS, 2)
    plural = draw.randrange(2)
    sentence = f"The {noun[plural]} that the {other[1 - plural]} met yesterday {{}} very tired."
    be = ("is", "are")
    return sentence.format(be[plural]), sentence.format(be[1 - plural])


def _determiner(draw: random.Random) -> Pair:
    thing, plural, adjective = draw.choice(THINGS), draw.randrange(2), draw.choice(ADJECTIVES)
    word = draw.choice((("this", "these"), ("that", "those")))[plural]
    sentence = f"{draw.choice(HE + SHE)} found {word} {adjective} {{}} on the table."
    return sentence.format(thing[plural]), sentence.format(thing[1 - plural])


def _reflexive_gender(draw: random.Random) -> Pair:
    she = draw.randrange(2)
    words = ("himself", "herself")
    sentence = f"{draw.choice((HE, SHE)[she])} {draw.choice(('hurt', 'praised', 'blamed', 'saw'))} {{}} {draw.choice(WHEN)}."
    return sentence.format(words[she]), sentence.format(words[1 - she])


def _reflexive_number(draw: random.Random) -> Pair:
    noun = draw.choice(NOUNS)[1]
    sentence = f"The {noun} {draw.choice(('hurt', 'praised', 'blamed', 'saw'))} {{}} {draw.choice(WHEN)}."
    return sentence.format("themselves"), sentence.format(draw.choice(("himself", "herself")))


def _participle(draw: random.Random) -> Pair:
    past, participle = draw.choice(PAST)
    noun, number = draw.choice(NOUNS), draw.randrange(2)
    sentence = f"The {noun[number]} {('has', 'have')[number]} {{}} the {draw.choice(THINGS)[0]}."
    return sentence.format(participle), sentence.format(past)


def _ever(draw: random.Random) -> Pair:
    noun, name = draw.choice(NOUNS)[1], draw.choice(HE + SHE)
    sentence = f"{{}} {noun} have ever met {name}."
    return sentence.format("No"), sentence.format("Some")


PHENOMENA: tuple[Callable[[random.Random], Pair], ...] = (
    _agreement,
    _agreement_over_distance,
    _agreement_over_clause,
    _determiner,
    _reflexive_gender,
    _reflexive_number,
    _participle,
    _ever,
)


def pairs(name: str, seed: int) -> Questions:
    """PAIRS different pairs of each phenomenon."""
    draw = random.Random(seed)
    rows = []
    for phenomenon in PHENOMENA:
        found: dict[Pair, None] = {}
        while len(found) < PAIRS:
            found[phenomenon(draw)] = None
        rows += [{"context": "", "choices": list(pair), "label": 0} for pair in found]
    return Questions(name, "pair", rows)
