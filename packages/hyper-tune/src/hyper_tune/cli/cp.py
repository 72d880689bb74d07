"""`hyper-tune cp`: a packaged recipe, configuration or data set as a file of one's own."""

import difflib
from pathlib import Path
from typing import Annotated

import typer

from hyper_tune.durable import write_text
from hyper_tune.errors import UserError
from hyper_tune.packaged import packaged_configs, packaged_data, packaged_recipes


def cp(
    name: Annotated[str, typer.Argument(help="A name that `hyper-tune ls` shows.")],
    destination: Annotated[Path, typer.Argument(help="A file to write, or a folder.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a recipe, a configuration or a data set (data=NAME), to change it."""
    data = {f"data={key}": path for key, path in packaged_data().items()}
    there = packaged_recipes() | packaged_configs() | data
    if name not in there:
        short = {key.removeprefix("hyper-tune/"): key for key in there}
        near = difflib.get_close_matches(name.removeprefix("hyper-tune/"), short, n=1)
        hint = f" Did you mean {short[near[0]]}?" if near else ""
        raise UserError(f"the package ships no {name!r}; it has {', '.join(there)}.{hint}")
    source = there[name]
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() and not force:
        raise UserError(f"{target} exists; give another name, or --force to overwrite it.")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is not a folder; make it first.")
    write_text(target, source.read_text(encoding="utf-8"))
    typer.echo(str(target))
