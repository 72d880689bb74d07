"""`hyper-tune ls`: what the package ships."""

from typing import Any

from hyper_tune.cli.table import print_table
from hyper_tune.packaged import packaged_configs, packaged_recipes, read_config


def ls() -> None:
    """List the recipes and configurations, to run, copy or plan."""
    rows = []
    for recipe in packaged_recipes():
        for number, (name, path) in enumerate(packaged_configs().items()):
            config: Any = read_config(path)
            rows.append(("" if number else recipe, name, str(config.base_model)))
    print_table(("recipe", "configuration", "base model"), rows)
