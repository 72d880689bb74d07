"""`hyper-tune ls`: what the package ships."""

from typing import Any

import typer

from hyper_tune.cli.table import print_table
from hyper_tune.entry import RECIPES
from hyper_tune.packaged import packaged_configs, packaged_data, packaged_recipes, read_config


def ls() -> None:
    """List the recipes, configurations and data sets, to run, copy or plan."""
    methods = [(recipe, RECIPES[recipe]) for recipe in packaged_recipes()]
    print_table(("recipe", "method"), methods)
    typer.echo()
    configs: list[tuple[str, Any]] = [(n, read_config(p)) for n, p in packaged_configs().items()]
    rows = [(name, str(config.base_model)) for name, config in configs]
    print_table(("configuration", "base model"), rows)
    typer.echo()
    sources = [(f"data={name}", _source(name)) for name in packaged_data()]
    print_table(("data set", "source"), sources)


def _source(name: str) -> str:
    config: Any = read_config(packaged_data()[name])
    return str(config.dataset.get("source", "a file or folder of your own"))
