"""Importing imports no sibling, no trainer and no matplotlib, shown in a fresh process."""

import subprocess
import sys

FORBIDDEN = (
    "hyper_core",
    "lowrank_adapters",
    "hyper_tune",
    "matplotlib",
    "transformers",
    "torchtune",
)


def forbidden_after(statement, cwd):
    """Names of `FORBIDDEN` that are loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*(n for n in {FORBIDDEN!r} if n in sys.modules))"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=cwd
    ).stdout.split()


def test_rank_budget_imports_no_sibling(tmp_path):
    assert forbidden_after("import rank_budget", tmp_path) == []


def test_the_check_can_fail(tmp_path):
    (tmp_path / "hyper_core.py").write_text("")
    statement = "sys.path.insert(0, '.')\nimport hyper_core"
    assert forbidden_after(statement, tmp_path) == ["hyper_core"]
