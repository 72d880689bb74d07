"""Options that several verbs have, written once."""

from pathlib import Path
from typing import Annotated

import typer

from hyper_tune.errors import UserError

PICTURES = (".pdf", ".png", ".svg")


def _picture(path: Path | None) -> Path | None:
    """Refuse a file that nothing can be drawn into, before anything is read."""
    if path is None:
        return None
    if path.suffix.lower() not in PICTURES:
        raise UserError(
            f"--png is {str(path)!r}, but must end in one of {', '.join(PICTURES)}; choose one."
        )
    if path.is_dir() or not path.parent.is_dir():
        wrong = f"{path} is a folder" if path.is_dir() else f"{path.parent} is not a folder"
        raise UserError(f"--png is {str(path)!r}, but {wrong}; name a file in one that exists.")
    return path


Step = Annotated[int | None, typer.Option(help="Of this step's checkpoint, not the newest.")]
Base = Annotated[Path | None, typer.Option(help="Where the base model is now, if it was moved.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; that of the run without it.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")]
Seed = Annotated[int, typer.Option(help="Of the draws, where the temperature is not 0.")]
Picture = Annotated[
    Path | None,
    typer.Option("--png", callback=_picture, help="Draw it into this .pdf, .png or .svg, too."),
]
