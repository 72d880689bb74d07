"""`hyper-tune evaluate`: what the answers of a trained model are worth."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hyper_tune.cli.options import Base, Device, Seed, Step, Temperature
from hyper_tune.cli.table import print_table
from hyper_tune.errors import UserError
from hyper_tune.evaluate.evaluation import Extent
from hyper_tune.evaluate.evaluation import evaluate as evaluation
from hyper_tune.evaluate.generation import Decoding, LanguageModel
from hyper_tune.evaluate.sandbox import Limits, Sandbox
from hyper_tune.evaluate.tasks import Gsm8kTask, HumanEvalTask, Task, TextTask
from hyper_tune.parallel import usable_device


class TaskName(StrEnum):
    """What is asked and counted."""

    TEXT = "text"
    GSM8K = "gsm8k"
    HUMANEVAL = "humaneval"


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run folder, or a Hugging Face model's.")],
    *,
    task: Annotated[
        TaskName,
        typer.Option(help="text: BLEU-4, ROUGE-1; gsm8k: exact match; humaneval: pass@k."),
    ],
    data: Annotated[Path, typer.Option(help="The questions, with references or tests.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Where answers and results go; RUN/evaluation/TASK without it."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are read at a time.")] = 8,
    step: Step = None,
    base: Base = None,
    device: Device = None,
    execute_generated_code: Annotated[
        bool,
        typer.Option(
            "--execute-generated-code", help="Run what the model writes, in a sandbox: humaneval."
        ),
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Programs that are run at a time.")] = 1,
    timeout: Annotated[
        int, typer.Option(min=1, help="Seconds of processor time of one program.")
    ] = 10,
) -> None:
    """Answer every question of a file, and print what the answers are worth."""
    _require_consent(task, given=execute_generated_code)
    if not data.is_file():
        raise UserError(f"--data {data} is not a file.")
    with _task(task, data, timeout) as chosen:
        opened, run = _open(model, step=step, base=base, device=device)
        if output is None and not run:
            raise UserError(f"{model} is not a run folder; say where results go, with --output.")
        folder = output or model / "evaluation" / task.value
        metrics = evaluation(
            opened,
            chosen,
            folder,
            decoding=Decoding(max_new_tokens, temperature, seed),
            extent=Extent(samples, limit),
            batch_size=batch_size,
            jobs=jobs,
        )
    rows = [(metric.name, f"{metric.value:.2f}", metric.signature) for metric in metrics]
    print_table(("metric", "value", "signature"), rows, right=[1])
    typer.echo(f"{folder / 'results.json'}")


def _require_consent(task: TaskName, *, given: bool) -> None:
    """Refuse to run programs that nobody asked to run, and to be asked where there are none."""
    if given and task is not TaskName.HUMANEVAL:
        raise UserError(f"--task {task} runs no code; leave --execute-generated-code out.")
    if not given and task is TaskName.HUMANEVAL:
        raise UserError(
            "--task humaneval runs programs that the model writes, in a sandbox; read what it "
            "promises, then add --execute-generated-code."
        )


@contextmanager
def _task(name: TaskName, data: Path, timeout: int) -> Iterator[Task]:
    """Read the questions, and open what judges the answers to them."""
    if name is TaskName.HUMANEVAL:
        sandbox = Sandbox(Limits(cpu_seconds=timeout, wall_seconds=6 * timeout))
        task = HumanEvalTask(data, sandbox)
        with sandbox:
            yield task
    else:
        yield TextTask(data) if name is TaskName.TEXT else Gsm8kTask(data)


def _open(
    model: Path, *, step: int | None, base: Path | None, device: str | None
) -> tuple[LanguageModel, bool]:
    """Return the model, without its weights, and whether it is a run's."""
    if (model / "config.yaml").is_file():
        from hyper_tune.torchtune.generation import RunModel
        from hyper_tune.torchtune.trained import open_trained

        return RunModel(open_trained(model, step=step, base=base, device=device)), True
    from hyper_tune.hf.generation import FolderModel

    if step is not None or base is not None:
        raise UserError(f"{model} is not a run folder; --step and --base are for runs.")
    return FolderModel(model, device=str(usable_device(device or "cpu"))), False
