"""What a package must have, and what the documents say about the repository, are true."""

import ast
import re
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest
import yaml
from build import ProjectBuilder

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
DEVIATIONS = (ROOT / "docs" / "deviations.md").read_text()
CONFIGS = sorted((ROOT / "packages/hyper-tune/src/hyper_tune/configs").glob("*.yaml"))


def project(name):
    return tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"]


def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line)


@cache
def functions_of(path):
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("name", PACKAGES)
def test_the_changelog_has_the_version(name):
    log = (ROOT / "packages" / name / "CHANGELOG.md").read_text()
    heading = re.search(r"^## (\S+)", log, flags=re.MULTILINE)
    assert heading[1] == project(name)["version"]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_direct_dependency_has_a_tested_version_within_its_bounds(name):
    extras = project(name).get("optional-dependencies", {}).values()
    for line in sum(extras, project(name)["dependencies"]):
        needed = re.split(r"[^\w-]", line)[0]
        assert needed in PACKAGES or needed.lower() in pinned(), line


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wheel_has_its_modules_its_types_and_nothing_of_the_tests(name, tmp_path):
    wheel = ProjectBuilder(ROOT / "packages" / name).build("wheel", tmp_path)
    files = zipfile.ZipFile(wheel).namelist()
    module = name.replace("-", "_")
    source = ROOT / "packages" / name / "src"
    wanted = {
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert f"{module}/py.typed" in wanted
    assert {file for file in files if ".dist-info/" not in file} == wanted


def rows_of_deviations():
    return [line for line in DEVIATIONS.splitlines() if line.startswith("|") and "::" in line]


def test_every_deviation_names_a_test_that_exists():
    assert len(rows_of_deviations()) > 20
    for row in rows_of_deviations():
        named = re.findall(r"`([\w-]+): ([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for package, file, test in named:
            assert test in functions_of(ROOT / "packages" / package / "tests" / file), row


def test_every_row_of_deviations_is_complete():
    for line in DEVIATIONS.splitlines():
        if line.startswith("|") and not line.startswith(("|-", "|:", "| paper")):
            assert line in rows_of_deviations(), line


def test_the_commands_in_the_readme_are_sessions():
    sessions = {
        node.name
        for node in ast.walk(ast.parse((ROOT / "noxfile.py").read_text()))
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    }
    named = set(re.findall(r"nox -s (\w+)", (ROOT / "README.md").read_text()))
    assert {"quickstart", "tests"} <= named <= sessions


def test_files_stay_short():
    for path in [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("recipes/**/*.py")]:
        assert len(path.read_text().splitlines()) <= 300, path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_choice_in_a_config_that_is_not_the_papers_says_why(path):
    text = path.read_text()
    config = yaml.safe_load(text)
    paper = {
        ("method", "orthogonality"): 0.1,
        ("method", "budget"): 3,
        ("method", "pruning", "interval"): 100,
        ("lr_scheduler", "num_warmup_steps"): 500,
        ("optimizer", "lr"): 1e-5,
    }
    for keys, value in paper.items():
        found = config
        for key in keys:
            found = found[key]
        line = next(line for line in text.splitlines() if re.match(rf"\s*{keys[-1]}: ", line))
        assert "paper" in line, line
        if path.stem == "llama3_1_8b":
            assert float(found) == value, line


def test_the_readme_shows_the_report_that_came_out():
    report = (ROOT / "docs/assets/quickstart/report.txt").read_text()
    assert f"<!-- quickstart -->\n```\n{report}```\n" in (ROOT / "README.md").read_text()


def test_the_documented_values_of_tiny_llama_are_those_of_its_file():
    text = (ROOT / "docs/guide/configuration.md").read_text()
    section = text.split("## What `tiny_llama` has instead")[1]
    config = yaml.safe_load((CONFIGS[0].parent / "tiny_llama.yaml").read_text())
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \|", section, flags=re.MULTILINE)
    assert len(rows) > 10
    for names, values in rows:
        for name, value in zip(names.split(", "), values.split(", "), strict=True):
            found = config
            for key in name.strip("`").split("."):
                found = found[key]
            assert str(found) == str(yaml.safe_load(value.strip("`"))), name
