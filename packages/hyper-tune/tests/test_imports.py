"""Importing the package imports no trainer and no optional library, shown in a fresh process."""

import subprocess
import sys
from pathlib import Path

FORBIDDEN = ("torchtune", "torchao", "transformers", "peft", "datasets", "accelerate", "matplotlib")
MODULES = (
    *("assembly", "checkpoint", "parallel", "records", "run_folder", "sampling", "step"),
    *("cli.main", "evaluate.evaluation", "merged", "memory", "plan", "provenance", "report"),
)


def forbidden_after(statement: str, cwd: Path) -> list[str]:
    """Names of `FORBIDDEN` that are loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*(n for n in {FORBIDDEN!r} if n in sys.modules))"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=cwd
    ).stdout.split()


def test_hyper_tune_imports_no_trainer(tmp_path: Path) -> None:
    statement = "import hyper_tune, " + ", ".join(f"hyper_tune.{name}" for name in MODULES)
    assert forbidden_after(statement, tmp_path) == []


def test_the_check_can_fail(tmp_path: Path) -> None:
    (tmp_path / "torchao.py").write_text("")
    statement = "sys.path.insert(0, '.')\nimport torchao"
    assert forbidden_after(statement, tmp_path) == ["torchao"]
