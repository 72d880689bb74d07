"""Importing the package imports no sibling and no trainer, shown in a fresh process."""

import ast
import subprocess
import sys
from pathlib import Path

import hyper_core

FORBIDDEN = ("lowrank_adapters", "rank_budget", "hyper_tune", "transformers", "torchtune")


def forbidden_after(statement, cwd):
    """Names of `FORBIDDEN` that are loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*(n for n in {FORBIDDEN!r} if n in sys.modules))"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=cwd
    ).stdout.split()


def test_hyper_core_imports_no_sibling(tmp_path):
    assert forbidden_after("import hyper_core", tmp_path) == []


def test_hyper_core_needs_torch_alone():
    """Of what its files import, and not of what torch itself loads."""
    package = Path(hyper_core.__file__).parent
    imported = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "hyper_core"}


def test_the_check_can_fail(tmp_path):
    (tmp_path / "rank_budget.py").write_text("")
    statement = "sys.path.insert(0, '.')\nimport rank_budget"
    assert forbidden_after(statement, tmp_path) == ["rank_budget"]
