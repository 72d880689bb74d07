"""Trains the small Llama that runs start from, on text of the data set that they are tuned on.

    python recipes/paper/small_llama.py --rows DATA/gsm8k/train.jsonl --output small-llama

It reads most rows, question and answer, as plain text, and is never shown a conversation's format.
OUTPUT/base is the model; OUTPUT/train.jsonl has the rows that it has not read, to fine-tune on.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hyper_tune.durable import make_folder, write_text
from hyper_tune.errors import PERSONS_MISTAKES
from hyper_tune.records import Conversation, read_records

sys.path.append(str(Path(__file__).parents[1] / "quickstart"))

from base import Corpus, Settings, train_base

_LEFT = 1 / 5  # of the rows
SETTINGS = Settings(tokens=2000, length=512, text=224, batch=16, steps=1000)


def main(
    *,
    rows: Annotated[Path, typer.Option(help="What is trained on.")],
    output: Annotated[Path, typer.Option(help="The folder of the base and of the rows left.")],
    steps: Annotated[int, typer.Option(min=1, help="Of the base's training.")] = SETTINGS.steps,
) -> None:
    """Train the base, and write the rows that it has not read."""
    try:
        read, left = divided(read_records(rows))
        make_folder(output)
    except PERSONS_MISTAKES as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    texts = [text(conversation) for conversation in read]
    unread = iter([text(conversation) for conversation in left])
    corpus = Corpus(texts, forever(texts, SETTINGS.seed), unread)
    write_text(output / "train.jsonl", "".join(map(line, left)))
    train_base(output / "base", replace(SETTINGS, steps=steps), corpus)


def divided(
    conversations: Sequence[Conversation],
) -> tuple[list[Conversation], list[Conversation]]:
    """Return what the base reads, and what is left to fine-tune on."""
    order = random.Random(SETTINGS.seed).sample(conversations, len(conversations))
    count = round(_LEFT * len(order))
    return order[count:], order[:count]


def text(conversation: Conversation) -> str:
    """Return a conversation as plain text."""
    return "\n\n".join(turn.content.strip() for turn in conversation.turns)


def line(conversation: Conversation) -> str:
    """Return a conversation as a line of a file of chats."""
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    return json.dumps({"messages": turns}) + "\n"


def forever(texts: Sequence[str], seed: int) -> Iterator[str]:
    """Yield the texts in another order each time, without end."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(texts, len(texts))


if __name__ == "__main__":
    typer.run(main)
