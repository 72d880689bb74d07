"""Generation quality, as in the paper's Tables 1, 3 and 9: train, evaluate, one table.

    python recipes/generation/generation.py --scale tiny --output generation-run
    python recipes/generation/generation.py --scale real --data data --output generation-run

`tiny` trains the quickstart's small Llama on rows in the data sets' schemas; `real` trains
Llama 3.1 8B on what recipes/generation/data.py wrote. What is finished is not done again.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import rows

from data import SOURCES, write
from hyper_tune import METHODS

PAPERS = ("adalora", "hyperadalora")
# The paper does not say what HumanEval's model was trained on; HumanEval itself is a test.
TRAINED_ON = {"humaneval": "alpaca"}
_TINY_ROWS, _TINY_TEST = 300, 20
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Scale:
    """A configuration, what is changed in it ({data} is the folder), how answers are asked for."""

    config: str
    overrides: tuple[str, ...]
    asking: tuple[str, ...]


SCALES = {
    "tiny": Scale(
        "tiny_llama",
        ("max_steps=150", "~exact_match", "dataset_val.path={data}/test.jsonl"),
        ("--max-new-tokens", "24", "--limit", str(_TINY_TEST), "--batch-size", "20"),
    ),
    "real": Scale("llama3_1_8b", (), ("--max-new-tokens", "512", "--batch-size", "32")),
}


def main() -> None:
    """Train and evaluate every data set and method that is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--output", type=Path, default=Path("generation-run"))
    parser.add_argument("--data", type=Path, help="what data.py wrote; made for tiny without it")
    parser.add_argument("--sets", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(PAPERS))
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    scale, output = SCALES[arguments.scale], arguments.output
    data, overrides = arguments.data, [*scale.overrides, *arguments.override]
    if arguments.scale == "tiny":
        overrides += [f"model_dir={output / 'base'}"]
        make_base(output / "base")
        data = data or make_data(output / "data", arguments.sets)
    if data is None:
        sys.exit("--scale real needs --data: the folder that recipes/generation/data.py wrote.")
    found = {}
    for name in arguments.sets:
        for method in arguments.methods:
            run = output / f"{TRAINED_ON.get(name, name)}-{method}"
            train(run, scale.config, method, data / TRAINED_ON.get(name, name), overrides)
            found[name, method] = evaluate(run, name, data, scale.asking)
    text = table(found)
    (output / "table.md").write_text(text)
    print(text)


def make_base(folder: Path) -> None:
    """Make the quickstart's base, unless it is there."""
    _run([sys.executable, str(_HERE.parent / "quickstart" / "base.py"), "--output", str(folder)])


def make_data(folder: Path, names: list[str]) -> Path:
    """Write small rows of every data set that is asked for, and of those trained on instead."""
    options = argparse.Namespace(held_out=_TINY_TEST, seed=0)
    for name in {*names, *(TRAINED_ON.get(name, name) for name in names)}:
        made = rows(name, _TINY_ROWS)
        test = rows(name, _TINY_TEST, seed=1) if SOURCES[name].test else None
        write(folder / name, SOURCES[name], made if SOURCES[name].trains else [], test, options)
    return folder


def train(run: Path, config: str, method: str, data: Path, overrides: list[str]) -> None:
    """Train a method on a data set, or go on with it; a finished run is left as it is."""
    if (run / "summary.json").exists():
        return
    command = [
        str(Path(sys.executable).with_name("tune")),
        *("run", f"hyper-tune/{method}_full", "--config", config),
        *(f"output_dir={run}", "resume_from_checkpoint=True"),
        "dataset=hyper_tune.torchtune.data.file_dataset",
        f"dataset.path={data / 'train.jsonl'}",
        *(override.replace("{data}", str(data)) for override in overrides),
    ]
    _run(command)


def evaluate(run: Path, name: str, data: Path, asking: tuple[str, ...]) -> dict[str, Any]:
    """Evaluate a run on a data set's test, and return what `results.json` holds."""
    folder = run / "evaluation" / name
    source = SOURCES[name]
    command = [
        *(sys.executable, "-m", "hyper_tune", "evaluate", str(run), "--task", source.task),
        *("--data", str(data / name / "test.jsonl"), "--output", str(folder), *asking),
    ]
    if source.task == "humaneval":
        command += ["--execute-generated-code", "--jobs", "2"]
    _run(command)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def table(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Return a Markdown table: a row for each data set and figure, a column for each method."""
    methods = list(dict.fromkeys(method for _, method in found))
    lines = [f"| data | metric | {' | '.join(methods)} |", "|---|---|" + "---:|" * len(methods)]
    for name in dict.fromkeys(name for name, _ in found):
        columns = [
            {metric["name"]: metric["value"] for metric in found[name, method]["metrics"]}
            for method in methods
        ]
        lines += [
            f"| {name} | {metric} | {' | '.join(f'{column[metric]:.2f}' for column in columns)} |"
            for metric in columns[0]
        ]
    return "\n".join(lines) + "\n"


def _run(command: list[str]) -> None:
    print("$", *command, flush=True)
    if subprocess.run(command, check=False).returncode:
        sys.exit("That command did not finish; its message is above.")


if __name__ == "__main__":
    main()
