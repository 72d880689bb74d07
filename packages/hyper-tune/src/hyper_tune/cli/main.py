"""Puts the verbs together and turns mistakes into one line and exit status 2."""

import logging
import sys
from collections.abc import Sequence

import typer

from hyper_tune.cli.compare import compare
from hyper_tune.cli.cp import cp
from hyper_tune.cli.evaluate import evaluate
from hyper_tune.cli.export import export
from hyper_tune.cli.generate import generate
from hyper_tune.cli.ls import ls
from hyper_tune.cli.plan import plan
from hyper_tune.cli.ranks import ranks
from hyper_tune.errors import EXIT_MISTAKE, PERSONS_MISTAKES, UserError

_EXTRAS = {
    **{"torchtune": "torchtune", "torchao": "torchtune", "matplotlib": "plot"},
    **{
        "transformers": "hf",
        "sacrebleu": "evaluate",
        "rouge_score": "evaluate",
        "nltk": "evaluate",
    },
}

app = typer.Typer(
    name="hyper-tune",
    help="Before and after a fine-tuning run; `tune run hyper-tune/…` is the run itself.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_VERBS = (ls, cp, plan, ranks, compare, export, generate, evaluate)
for verb in _VERBS:
    app.command()(verb)


@app.callback(invoke_without_command=True)
def _need_verb(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        names = ", ".join(verb.__name__ for verb in _VERBS)
        raise UserError(f"a verb is missing; there are {names}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status."""
    # torchao speaks of extensions that nothing here uses, each time it is imported.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        status = app(arguments, standalone_mode=False)
    except PERSONS_MISTAKES as error:
        return _report(str(error))
    except typer.TyperException as error:
        return _report(" ".join(error.format_message().split()))
    except OSError as error:
        return _report(f"{error}.")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        return _report(f"this needs {package}; pip install 'hyper-tune[{_EXTRAS[package]}]'.")
    return status if isinstance(status, int) else 0


def _report(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return EXIT_MISTAKE


if __name__ == "__main__":
    sys.exit(main())
