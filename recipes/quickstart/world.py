"""The quickstart's world: plain stories for the base, questions about stories for the adapter.

A story says who has what, then says it again in another order. A model that has read many stories
can go on with one; it has never seen a question.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = (
    "Ada Ben Cleo Dan Eve Finn Gina Hugo Ida Jack Kate Leo Mia Nick Olga Paul Quinn Rosa Sam Tess "
    "Uma Vera Will Xena Yara Zoe"
).split()
COLOURS = "red blue green yellow black white brown pink grey purple orange golden".split()
THINGS = (
    "kite drum book lamp boat coat ball cup key bell ring hat box map pen rope sword stone bag clock "
    "chair glove horn mask"
).split()


@dataclass(frozen=True)
class Fact:
    """Somebody has something of a colour."""

    name: str
    colour: str
    thing: str

    def __str__(self) -> str:
        """Return the sentence that states it."""
        return f"{self.name} has a {self.colour} {self.thing}."


@dataclass(frozen=True)
class Question:
    """A story, a question about one of its facts, and the sentence that answers it."""

    story: str
    question: str
    answer: str

    def record(self) -> dict[str, str]:
        """Return it as a line of a question/answer file."""
        return {"question": f"{self.story} {self.question}", "answer": self.answer}


def facts(rng: random.Random, count: int) -> list[Fact]:
    """Return facts about different people, with different things."""
    people = rng.sample(NAMES, count)
    things = rng.sample(THINGS, count)
    return [Fact(n, rng.choice(COLOURS), t) for n, t in zip(people, things, strict=True)]


def story(rng: random.Random) -> str:
    """Return one story: three to five facts, told three times, each time in another order."""
    told = facts(rng, rng.randint(3, 5))
    sentences = []
    for _ in range(3):
        rng.shuffle(told)
        sentences += [str(fact) for fact in told]
    return " ".join(sentences)


def stories(seed: int) -> Iterator[str]:
    """Yield stories without end; the same ones for the same seed."""
    rng = random.Random(f"stories {seed}")
    while True:
        yield story(rng)


def questions(seed: int, count: int) -> list[Question]:
    """Return questions about stories that differ from each other, the same for the same seed."""
    rng = random.Random(f"questions {seed}")
    found: dict[str, Question] = {}
    while len(found) < count:
        told = facts(rng, rng.randint(3, 5))
        text = " ".join(str(fact) for fact in told)
        asked = rng.choice(told)
        found.setdefault(text, Question(text, f"What does {asked.name} have?", str(asked)))
    return list(found.values())
