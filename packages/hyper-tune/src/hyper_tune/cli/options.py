"""Options that several verbs have, written once."""

from pathlib import Path
from typing import Annotated

import typer

Step = Annotated[int | None, typer.Option(help="Of this step's checkpoint, not the newest.")]
Base = Annotated[Path | None, typer.Option(help="Where the base model is now, if it was moved.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; that of the run without it.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")]
Seed = Annotated[int, typer.Option(help="Of the draws, where the temperature is not 0.")]
