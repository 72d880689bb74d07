"""Data of the paper's generation tables, as files that training and evaluation read.

    python recipes/generation/data.py alpaca --output data
    python recipes/generation/data.py magpie --source magpie.parquet --output data

Writes DATA/NAME/train.jsonl and test.jsonl. Without --source the rows come from the hub.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A data set: its place on the hub, the columns that are kept, how answers are counted.

    ``test``: the name of its own test split; without one, rows of the only split are held out.
    ``trains``: false where there is nothing to train on.
    """

    hub: str
    columns: tuple[str, ...]
    task: str = "text"
    subset: str | None = None
    test: str | None = None
    trains: bool = True


SOURCES = {
    "alpaca": Source("tatsu-lab/alpaca", ("instruction", "input", "output")),
    "magpie": Source("Magpie-Align/Magpie-Pro-300K-Filtered", ("conversations",)),
    "open_platypus": Source("garage-bAInd/Open-Platypus", ("instruction", "input", "output")),
    "gsm8k": Source(
        "openai/gsm8k", ("question", "answer"), task="gsm8k", subset="main", test="test"
    ),
    "humaneval": Source(
        "openai/openai_humaneval",
        ("task_id", "prompt", "entry_point", "test"),
        task="humaneval",
        test="test",
        trains=False,
    ),
}


def main() -> None:
    """Write one data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--output", type=Path, default=Path("data"))
    parser.add_argument("--source", type=Path, nargs="*", help="local files: train, then test")
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = SOURCES[arguments.name]
    train, test = read(source, arguments.source)
    print(write(arguments.output / arguments.name, source, train, test, arguments))


def read(source: Source, files: list[Path] | None) -> tuple[Iterable[Row], Iterable[Row] | None]:
    """Return the rows to train on, and those to test on if the data set has them."""
    from datasets import load_dataset

    if files:
        parts = [_read_file(load_dataset, path) for path in files]
        if not source.trains:
            return [], parts[0]
        return parts[0], parts[1] if len(parts) > 1 else None
    try:
        found = load_dataset(source.hub, source.subset)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{source.hub} cannot be fetched ({_first_line(error)}); where there is a "
            f"network, run `hf download {source.hub} --repo-type dataset --local-dir "
            f"{source.hub.rpartition('/')[2]}`, and name its files with --source."
        ) from error
    return found["train"] if source.trains else [], found[source.test] if source.test else None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_file(load_dataset: Callable[..., Any], path: Path) -> Iterable[Row]:
    if not path.is_file():
        raise SystemExit(f"--source {path} does not exist.")
    kind = "parquet" if path.suffix == ".parquet" else "json"
    rows: Iterable[Row] = load_dataset(kind, data_files=str(path), split="train")
    return rows


def write(
    folder: Path,
    source: Source,
    train: Iterable[Row],
    test: Iterable[Row] | None,
    options: argparse.Namespace,
) -> str:
    """Write the rows' columns, and return how many there are of each.

    Where there is no test split, ``options.held_out`` rows that ``options.seed`` chooses are the
    test, and are not trained on; at most a tenth of all.
    """
    rows = [_kept(source, row) for row in train]
    if test is None:
        count = min(options.held_out, len(rows) // 10)
        chosen = set(random.Random(options.seed).sample(range(len(rows)), count))
        held = [row for number, row in enumerate(rows) if number in chosen]
        rows = [row for number, row in enumerate(rows) if number not in chosen]
    else:
        held = [_kept(source, row) for row in test]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows), ("test", held)):
        if part:
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return f"{folder}: {len(rows)} rows to train on, {len(held)} to test on"


def _kept(source: Source, row: Row) -> dict[str, Any]:
    missing = [column for column in source.columns if column not in row and column != "input"]
    if missing:
        raise SystemExit(f"{source.hub}: a row has no {missing[0]}; it has {', '.join(row)}.")
    return {column: row[column] for column in source.columns if column in row}


if __name__ == "__main__":
    main()
