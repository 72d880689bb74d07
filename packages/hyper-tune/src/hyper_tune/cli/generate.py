"""`hyper-tune generate`: ask the trained model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hyper_tune.cli.options import Base, Device, Seed, Step, Temperature
from hyper_tune.errors import UserError


def generate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Questions; each line of the input without any.")
    ] = None,
    *,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of an answer, at most; 256, or what there is room for."),
    ] = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    step: Step = None,
    base: Base = None,
    device: Device = None,
) -> None:
    """Print the trained model's answer to each prompt."""
    lines = () if prompts or sys.stdin.isatty() else sys.stdin
    asked = list(prompts or [line.strip() for line in lines if line.strip()])
    if not asked:
        raise UserError("there is no prompt; give one as an argument, or lines as input.")
    from hyper_tune.torchtune.generation import answers
    from hyper_tune.torchtune.trained import open_trained

    texts = answers(
        open_trained(run, step=step, base=base, device=device),
        asked,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    for text in texts:
        typer.echo(text)
