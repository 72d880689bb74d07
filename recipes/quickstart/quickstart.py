"""Fine-tunes a small Llama with HyperAdaLoRA, from nothing to an exported adapter.

    python recipes/quickstart/quickstart.py --output quickstart-run

Makes a base model (kept for the next time), writes questions that it cannot answer, runs
`tune run hyper-tune/hyperadalora_full --config tiny_llama`, and reports.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from base import Settings, make_base
from world import people

from rank_budget.tables import rank_table

# People, each of whom three questions are asked about; the rest of the base's people train.
HELD_OUT = {"validation": 30, "test": 50}


def main() -> None:
    """Run every part of the quickstart, in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("quickstart-run"))
    output = parser.parse_args().output
    base, data, run = output / "base", output / "data", output / "run"
    settings = Settings()
    make_base(base, settings)
    write_data(data, settings)
    fine_tune(base, data, run)
    report(run)
    check(run)


def check(run: Path) -> None:
    """Stop with a failure unless the adapter answers what the base could not."""
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["before"]["exact_match"], summary["after"]["exact_match"]
    if not before < 0.05 < 0.5 < after:
        sys.exit(
            f"Exact match went from {before:.1%} to {after:.1%}; it should rise from 0 to 90%."
        )


def write_data(folder: Path, settings: Settings) -> None:
    """Write questions about different people to each file, one JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    everybody = people(settings.seed, settings.people)
    first = 0
    for name, count in {**HELD_OUT, "train": len(everybody) - sum(HELD_OUT.values())}.items():
        rows = [row for person in everybody[first : first + count] for row in person.questions()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        first += count


def fine_tune(base: Path, data: Path, run: Path) -> None:
    """Run the recipe as a user would; an earlier run in the folder is removed."""
    shutil.rmtree(run, ignore_errors=True)
    command = [
        str(Path(sys.executable).with_name("tune")),
        *("run", "hyper-tune/hyperadalora_full", "--config", "tiny_llama"),
        *(f"output_dir={run}", f"model_dir={base}", f"data_dir={data}"),
    ]
    print("$", "tune", *command[1:], flush=True)
    if subprocess.run(command, check=False).returncode:
        sys.exit("The fine-tuning did not finish; its message is above.")


def report(run: Path) -> None:
    """Print the tables, say where things are and what to type next."""
    summary = json.loads((run / "summary.json").read_text())
    ranks = rank_table(summary["ranks"], summary["initial_rank"])
    text = f"{table(summary)}\n\n{ranks}\n"
    (run / "report.txt").write_text(text)
    print(f"\n{text}")
    print(f"Loss: {run / 'loss.png'}   ranks: {run / 'ranks.png'}")
    print(f"Plain LoRA in PEFT's layout: {summary['adapter']}")
    print("\nOn a real 8B model, with a GPU:")
    print('  pip install "hyper-tune[torchtune]"')
    print(
        "  tune download meta-llama/Llama-3.1-8B-Instruct --output-dir "
        'models/Llama-3.1-8B-Instruct --ignore-patterns "original/consolidated*"'
    )
    print("  tune run hyper-tune/hyperadalora_full --config llama3_1_8b")


def table(summary: dict[str, Any]) -> str:
    """Return the figures of the run, before and after."""
    before, after = summary["before"], summary["after"]
    lines = [
        ("", "before", "after"),
        ("held-out loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}"),
        ("held-out exact match", f"{before['exact_match']:.1%}", f"{after['exact_match']:.1%}"),
        ("ranks", str(summary["total_ranks"]), str(summary["live_ranks"])),
    ]
    figures = [
        ("base parameters, frozen", f"{summary['base_parameters']:,}"),
        ("trained (hypernetworks)", f"{summary['trainable_parameters']:,}"),
        ("in the adapter's factors", f"{summary['factor_parameters']:,}"),
        ("steps", f"{summary['steps']}"),
        ("time per step", f"{1000 * summary['seconds_per_step']:.0f} ms"),
        ("peak memory", f"{summary['peak_memory_mib']:.0f} MiB"),
        ("machine", f"{os.cpu_count()} CPU cores, {platform.machine()}"),
        ("torch", version("torch")),
    ]
    text = [f"{name:<26}{first:>12}{second:>12}" for name, first, second in lines]
    return "\n".join(text + [f"{name:<26}{value:>24}" for name, value in figures])


if __name__ == "__main__":
    main()
