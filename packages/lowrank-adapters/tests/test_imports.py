"""Importing the package imports no sibling and no trainer, shown in a fresh process."""

import subprocess
import sys

FORBIDDEN = ("hyper_core", "rank_budget", "hyper_tune", "peft", "transformers", "torchtune", "gguf")


def forbidden_after(statement, cwd):
    """Names of `FORBIDDEN` that are loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*(n for n in {FORBIDDEN!r} if n in sys.modules))"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=cwd
    ).stdout.split()


def test_lowrank_adapters_imports_no_sibling(tmp_path):
    assert forbidden_after("import lowrank_adapters", tmp_path) == []


def test_the_check_can_fail(tmp_path):
    (tmp_path / "rank_budget.py").write_text("")
    statement = "sys.path.insert(0, '.')\nimport rank_budget"
    assert forbidden_after(statement, tmp_path) == ["rank_budget"]
