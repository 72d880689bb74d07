"""Every example runs: those of the docstrings and that of the README."""

import doctest
import importlib
import json
import pkgutil
import re
import time
from pathlib import Path

import pytest

import lowrank_adapters
from lowrank_adapters import AdapterError

README = Path(__file__).parents[1] / "README.md"
MODULES = ["lowrank_adapters"] + [
    module.name for module in pkgutil.walk_packages(lowrank_adapters.__path__, "lowrank_adapters.")
]
REFUSING = [
    "DoRA",
    "DoRALinear",
    "DyLoRALinear",
    "FactorStack",
    "GradientApproximation",
    "LoRALinear",
    "LowRankLinear",
    "LowRankMaker",
    "RankSampler",
    "SVDLinear",
    "ScaledLoRALinear",
    "collect_activations",
    "collect_gradients",
    "convert_to_lora_",
    "disable_adapters",
    "export_gguf",
    "export_peft",
    "import_peft_",
    "inject_adapters_",
    "load_adapter_",
    "load_adapter_state_dict_",
    "materialise_",
    "merge_",
    "merged",
    "set_rank_",
    "start_factors_",
    "unmerge_",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_modules_have_examples():
    tried = {name: doctest.testmod(importlib.import_module(name)).attempted for name in MODULES}
    without = {name.rpartition(".")[2] for name, count in tried.items() if not count}
    assert without == {"errors", "exchange", "lowrank_adapters", "peft"}


@pytest.mark.parametrize("name", REFUSING)
def test_what_refuses_says_so(name):
    text = getattr(lowrank_adapters, name).__doc__
    assert f"Raises:\n        {AdapterError.__name__}: " in text or (
        f"Raises:\n    {AdapterError.__name__}: " in text
    )


def test_all_is_what_the_readme_lists():
    table = README.read_text().split("## What there is")[1].split("| layer |")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted(lowrank_adapters.__all__)


def test_readme_example_learns_in_seconds(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    started = time.perf_counter()
    exec(compile(code, str(README), "exec"), names)
    assert time.perf_counter() - started < 10
    losses = names["losses"]
    assert losses[0] > 0.1
    assert losses[-1] < 0.01
    config = Path(names["folder"]) / "peft" / "adapter_config.json"
    assert json.loads(config.read_text())["r"] == 3
    assert capsys.readouterr().out.startswith("adapted 2: loss ")
