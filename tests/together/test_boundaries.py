"""Who may import whom: read from the sources, and compared with what each package declares."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    path.parent.name: path.parent for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
SIBLINGS = {name.replace("-", "_") for name in PACKAGES}
ARROWS = {
    "hyper_core": set(),
    "lowrank_adapters": set(),
    "rank_budget": set(),
    "hyper_tune": {"hyper_core", "lowrank_adapters", "rank_budget"},
}
# These import what an extra brings inside a function, and say what to install where it is missing.
ASK_FOR_THEIR_EXTRA = ("report.py", "tables.py")
TRAINERS = {"torchtune", "torchao", "transformers", "peft", "accelerate", "datasets"}


def imported(path: Path) -> Iterator[str]:
    """Yield the first part of every absolute import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def imports_of(source: Path) -> dict[Path, set[str]]:
    return {
        path: set(imported(path)) - sys.stdlib_module_names for path in sorted(source.rglob("*.py"))
    }


def forbidden_siblings(source: Path, module: str) -> list[str]:
    """Name every import of a sibling that `ARROWS` does not allow."""
    return [
        f"{path.relative_to(source)} imports {name}"
        for path, names in imports_of(source).items()
        for name in sorted(names & (SIBLINGS - {module} - ARROWS[module]))
    ]


def forbidden_trainers(source: Path) -> list[str]:
    """Name every import of a trainer outside a folder named after it."""
    return [
        f"{path.relative_to(source)} imports {name}"
        for path, names in imports_of(source).items()
        for name in sorted(names & TRAINERS)
        if not {"torchtune", "hf"} & set(path.relative_to(source).parts[:-1])
    ]


def declared(package: Path) -> tuple[set[str], set[str]]:
    """Return the names in ``dependencies``, and those with the extras' as well."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", line)[0].replace("-", "_").lower() for line in requirements}

    required = names(project["dependencies"])
    return required, required.union(*map(names, extras))


@pytest.mark.parametrize("name", PACKAGES)
def test_only_allowed_siblings_are_imported(name):
    assert forbidden_siblings(PACKAGES[name] / "src", name.replace("-", "_")) == []


@pytest.mark.parametrize("name", PACKAGES)
def test_trainers_are_imported_in_their_own_folder_alone(name):
    assert forbidden_trainers(PACKAGES[name] / "src") == []


@pytest.mark.parametrize("name", PACKAGES)
def test_every_import_is_declared(name):
    module = name.replace("-", "_")
    required, with_extras = declared(PACKAGES[name])
    for path, names in imports_of(PACKAGES[name] / "src").items():
        assert names - {module} <= with_extras, path
        if path.parent.name == module and path.name not in ASK_FOR_THEIR_EXTRA:
            assert names - {module} <= required, path


def test_a_leaf_package_needs_torch_and_at_most_safetensors():
    for name in ("hyper-core", "lowrank-adapters", "rank-budget"):
        assert {"torch"} <= declared(PACKAGES[name])[0] <= {"torch", "safetensors"}
    assert declared(PACKAGES["hyper-core"])[1] == {"torch"}


def test_the_checks_can_fail(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "layer.py").write_text("import torch\nfrom hyper_core.generated import x\n")
    (tmp_path / "other" / "module.py").write_text("def f():\n    import torchao.utils\n")
    assert forbidden_siblings(tmp_path, "lowrank_adapters") == ["layer.py imports hyper_core"]
    assert forbidden_siblings(tmp_path, "hyper_tune") == []
    assert forbidden_trainers(tmp_path) == ["other/module.py imports torchao"]
