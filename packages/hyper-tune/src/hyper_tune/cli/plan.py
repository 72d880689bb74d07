"""`hyper-tune plan`: what a run will take, before a GPU is asked for."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from hyper_tune.checks import require_choice
from hyper_tune.cli.table import print_table
from hyper_tune.layout import BaseLayout
from hyper_tune.method import METHODS
from hyper_tune.packaged import read_configuration
from hyper_tune.plan import USABLE, Rehearsal, gpu_bytes

if TYPE_CHECKING:
    from hyper_tune.torchtune.settings import RecipeSettings

DOES_NOT_FIT = 1


def plan(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, as key=value.")
    ] = None,
    *,
    config: Annotated[str, typer.Option(help="A packaged configuration, or a file.")],
    nproc: Annotated[
        int, typer.Option(min=1, help="GPUs in all; data_parallel_* say how the base lies on them.")
    ] = 1,
    method: Annotated[
        str | None, typer.Option(help="As hyper-tune/METHOD_full trains it, such as dora.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of each sample; the most that it may have without it."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Say whether it fits: a name with its GB, as h100-80.")
    ] = None,
) -> None:
    """Print parameters, memory per GPU by part and communication of a step; status 1: no fit."""
    if gpu is not None:
        gpu_bytes(gpu)  # refuses what names no memory, before the work
    from hyper_tune.torchtune.base_model import base_layout
    from hyper_tune.torchtune.rehearsal import longest_sample, rehearse
    from hyper_tune.torchtune.settings import COMPONENTS, RecipeSettings

    if method is not None:
        require_choice("--method", method, METHODS)
    chosen = read_configuration(config, overrides or [], COMPONENTS, method=method)
    settings = RecipeSettings.from_config(chosen)
    layout = base_layout(settings, nproc)
    tokens = length or longest_sample(settings)
    rehearsal = rehearse(settings, tokens)
    _print_plan(rehearsal, settings, layout, tokens)
    if gpu is not None and not _fits(sum(rehearsal.memory(layout).values()), gpu):
        raise typer.Exit(DOES_NOT_FIT)


def _print_plan(
    rehearsal: Rehearsal, settings: "RecipeSettings", layout: BaseLayout, tokens: int
) -> None:
    gpus = layout.shard * layout.replicate
    _print_parameters(rehearsal)
    peak = "peak on 1 GPU" if gpus == 1 else f"peak on each of {gpus} GPUs"
    title = f"memory per GPU, {settings.batch_size} x {tokens} tokens"
    _print_bytes(title, rehearsal.memory(layout), peak)
    host = {"largest weight, while loading": rehearsal.largest_weight()}
    if settings.fsdp_cpu_offload:
        host["base weights"] = rehearsal.shards(layout)
    _print_bytes("memory of the host, per process", host, "at most")
    if gpus > 1:
        steps = settings.gradient_accumulation_steps
        received = rehearsal.communication(layout, steps)
        _print_bytes(f"received per GPU and step of {steps} micro-batches", received, "in all")


def _fits(needed: int, gpu: str) -> bool:
    """Say whether so many bytes fit the named GPU."""
    share = needed / gpu_bytes(gpu)
    says = "fits" if share <= USABLE else "does not fit"
    typer.echo(f"{says} {gpu}: {share:.0%} of its memory; up to {USABLE:.0%} is usable")
    return share <= USABLE


def _print_parameters(rehearsal: Rehearsal) -> None:
    rows = {
        "base, frozen": rehearsal.base_parameters,
        "low-rank factors": rehearsal.factors,
        "hypernetworks": rehearsal.hypernetworks,
    }
    lines = [(name, f"{count:,}") for name, count in rows.items()]
    print_table(("parameters", "number"), lines, right=[1])
    typer.echo()


def _print_bytes(title: str, parts: Mapping[str, int], last: str) -> None:
    rows = {**{part: count for part, count in parts.items() if count}, last: sum(parts.values())}
    unit, size = ("GiB", 2**30) if rows[last] >= 2**30 else ("MiB", 2**20)
    lines = [(name, f"{count / size:.2f}") for name, count in rows.items()]
    print_table((title, unit), lines, right=[1])
    typer.echo()
