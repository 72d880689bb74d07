"""`hyper-tune export`: a checkpoint as an adapter or a model that others read."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hyper_tune.cli.options import Base, Step
from hyper_tune.durable import write_text
from hyper_tune.errors import UserError
from hyper_tune.model_card import CARD, model_card
from hyper_tune.run_record import RunRecord

if TYPE_CHECKING:
    from hyper_tune.torchtune.trained import TrainedRun


class Format(StrEnum):
    """What `export` writes."""

    PEFT = "peft"
    MERGED = "merged"


class Dtype(StrEnum):
    """Of the tensors of a merged model."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    *,
    format_: Annotated[
        Format,
        typer.Option("--format", help="peft: plain LoRA; merged: the whole Hugging Face model."),
    ] = Format.PEFT,
    step: Step = None,
    base: Base = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of a merged model; each weight keeps its own without it.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of dylora and hyperdylora: how many ranks; all without it.")
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="An adapter with each matrix' own rank; PEFT alone.")
    ] = False,
) -> None:
    """Write a run's checkpoint as a LoRA adapter or a merged model, with a model card."""
    merged = format_ is Format.MERGED
    _refuse_misuse(output, merged=merged, dtype=dtype, compact=compact)
    record = RunRecord.read(run)
    from hyper_tune.torchtune import exports
    from hyper_tune.torchtune.trained import open_trained

    trained = open_trained(run, step=step, base=base)
    card = model_card(record, _ranks(trained, rank), step=trained.step, merged=merged)
    if merged:
        chosen = None if dtype is None else exports.DTYPES[dtype]
        exports.export_merged(trained, output, dtype=chosen, texts={CARD: card}, rank=rank)
    else:
        exports.export_adapter(
            trained.method,
            trained.model,
            trained.settings,
            output,
            rank=rank,
            form="compact" if compact else "padded",
        )
        write_text(output / CARD, card)
    typer.echo(f"{output}: {format_}, of step {trained.step}")


def _refuse_misuse(output: Path, *, merged: bool, dtype: Dtype | None, compact: bool) -> None:
    """Refuse options of the other format, and a folder that is there, before anything is read."""
    if output.exists():
        raise UserError(f"{output} exists; give a folder that does not.")
    if dtype is not None and not merged:
        raise UserError(f"--dtype {dtype} is for --format merged; an adapter is float32.")
    if compact and merged:
        raise UserError("--compact is for --format peft; a merged model has no ranks.")


def _ranks(trained: "TrainedRun", rank: int | None) -> dict[str, int]:
    """Return how many components of each matrix are written; refuse a ``rank`` that cannot be."""
    ranks = trained.method.ranks()
    if rank is None:
        return ranks
    with trained.method.at_rank(rank):
        return dict.fromkeys(ranks, rank)
