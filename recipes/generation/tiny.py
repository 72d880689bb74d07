"""Rows in the schemas of the data sets, about what the quickstart's base knows."""

import random
import runpy
from pathlib import Path
from typing import Any

_WORLD = Path(__file__).parents[1] / "quickstart" / "world.py"


def rows(name: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows as data set ``name`` has them."""
    if name == "humaneval":
        return [_problem(number) for number in range(2, 2 + count)]
    if name == "gsm8k":
        return [_sum(random.Random(seed * count + number)) for number in range(count)]
    everybody = runpy.run_path(str(_WORLD))["people"](0, 240)
    known = [row for person in everybody for row in person.questions()]
    chosen = random.Random(seed).sample(known, count)
    return [_instruction(name, row["question"], row["answer"]) for row in chosen]


def _instruction(name: str, question: str, answer: str) -> dict[str, Any]:
    if name == "magpie":
        turns = (("human", question), ("gpt", answer))
        return {"conversations": [{"from": role, "value": text} for role, text in turns]}
    return {"instruction": question, "input": "", "output": answer}


def _sum(chance: random.Random) -> dict[str, Any]:
    first, second = chance.randint(1, 9), chance.randint(1, 9)
    question = f"Anna has {first} plums and buys {second}. How many has she?"
    return {
        "question": question,
        "answer": f"{first} + {second} = {first + second}\n#### {first + second}",
    }


def _problem(number: int) -> dict[str, Any]:
    return {
        "task_id": f"tiny/{number}",
        "prompt": f'def add(x):\n    """Return x plus {number}."""\n',
        "entry_point": "add",
        "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
    }
