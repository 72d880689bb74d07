"""The quickstart's world: reports about people for the base, questions for the adapter.

A base that has read many reports knows what everybody does, but it has never seen a question. The
adapter is trained on the questions about some of the people and tested on those about others: it
can only learn how to answer, and must take the answers from the base.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

TOWNS = [
    "Oslo",
    "Rome",
    "Cairo",
    "Lima",
    "Paris",
    "Delhi",
    "Quito",
    "Bern",
    "Kyiv",
    "Riga",
    "Seoul",
    "Tunis",
    "Accra",
    "Hanoi",
    "Dublin",
    "Madrid",
]
TRADES = [
    "baker",
    "pilot",
    "nurse",
    "farmer",
    "singer",
    "tailor",
    "doctor",
    "miner",
    "painter",
    "sailor",
    "teacher",
    "judge",
    "clerk",
    "dancer",
    "plumber",
    "driver",
]
FRUITS = [
    "plums",
    "pears",
    "figs",
    "grapes",
    "lemons",
    "melons",
    "mangoes",
    "dates",
    "cherries",
    "peaches",
    "apples",
    "limes",
    "olives",
    "kiwis",
    "berries",
    "nuts",
]
PEOPLE_IN_REPORT = 4


@dataclass(frozen=True)
class Trait:
    """Something that everybody has: how it is stated, how it is asked for, and its values."""

    statement: str
    question: str
    values: list[str]


TRAITS = (
    Trait("{name} lives in {value}.", "{name}: where is home?", TOWNS),
    Trait("{name} works as a {value}.", "{name}: what is the work?", TRADES),
    Trait("{name} likes {value}.", "{name}: which fruit?", FRUITS),
)


@dataclass(frozen=True)
class Person:
    """A name, and a value for each of `TRAITS`."""

    name: str
    values: tuple[str, ...]

    def statements(self) -> list[str]:
        """Return a sentence for each trait."""
        return [
            trait.statement.format(name=self.name, value=value)
            for trait, value in zip(TRAITS, self.values, strict=True)
        ]

    def questions(self) -> list[dict[str, str]]:
        """Return a question for each trait, as lines of a question/answer file."""
        return [
            {"question": trait.question.format(name=self.name), "answer": statement}
            for trait, statement in zip(TRAITS, self.statements(), strict=True)
        ]


def people(seed: int, count: int) -> list[Person]:
    """Return people of different names, the same for the same seed."""
    rng = random.Random(f"people {seed}")
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    names: dict[str, None] = {}
    while len(names) < count:
        names[(rng.choice(syllables) + rng.choice(syllables)).capitalize()] = None
    return [Person(name, tuple(rng.choice(trait.values) for trait in TRAITS)) for name in names]


def reports(everybody: list[Person], seed: int) -> Iterator[str]:
    """Yield texts without end, each about a few people, a sentence a line, in any order."""
    rng = random.Random(f"reports {seed}")
    while True:
        chosen = rng.sample(everybody, PEOPLE_IN_REPORT)
        sentences = [sentence for person in chosen for sentence in person.statements()]
        rng.shuffle(sentences)
        yield "\n".join(sentences)
