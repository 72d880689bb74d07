"""Every example runs: those of the docstrings and that of the README."""

import doctest
import importlib
import pkgutil
import re
import time
from pathlib import Path

import pytest
import torch

import hyper_core

README = Path(__file__).parents[1] / "README.md"
CONCEPTS = Path(__file__).parents[3] / "docs" / "concepts" / "hypernetworks.md"
MODULES = ["hyper_core"] + [
    module.name for module in pkgutil.walk_packages(hyper_core.__path__, "hyper_core.")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", sorted(set(hyper_core.__all__) - {"HyperError", "PRESETS"}))
def test_public_objects_have_an_example_and_their_errors(name):
    text = getattr(hyper_core, name).__doc__
    assert ">>> " in text
    assert "Raises:" in text


def test_all_is_what_the_readme_lists():
    table = README.read_text().split("## What there is")[1].split("| choice |")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(hyper_core.__all__)


def test_readme_examples_run_and_the_first_learns_in_seconds(capsys):
    code, *rest = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {"reuse_": hyper_core.reuse_, "diagnose": hyper_core.diagnose}
    started = time.process_time()
    exec(compile(code, str(README), "exec"), names)
    assert time.process_time() - started < 10
    losses = names["losses"]
    assert losses[0] > 0.2
    assert losses[-1] < 0.02
    assert capsys.readouterr().out.startswith(f"loss {losses[0]:.3f} at the start")
    for later in rest:  # read in the order of the page, as a reader does
        exec(compile(later, str(README), "exec"), names)
    assert re.search(r"\d+ tensors carried over; \d+ start afresh", capsys.readouterr().out)
    assert callable(names["hyperize"])


def numbers(text):
    """The whole numbers of a text whose thousands are set apart by spaces."""
    return [int(found.replace(" ", "")) for found in re.findall(r"\d{1,3}(?: \d{3})+", text)]


def test_parameter_counts_in_the_documentation_are_those_of_the_code():
    text = CONCEPTS.read_text()
    for name in ("attention-tinybert", "conv-resnet18", "mlp-15"):
        config = hyper_core.PRESETS[name]
        with torch.device("meta"):
            network = hyper_core.Hypernetwork([(60, 6, 768), (12, 6, 3072)], config)
        count = dict.fromkeys(("body", "projections", "embedding", "norm"), 0)
        for key, parameter in network.named_parameters():
            part = "projections" if "puts." in key else key.split(".")[-2 if "norm" in key else 0]
            part = "body" if key.startswith("trunk.body.") else part
            count[part] += parameter.numel()
        (row,) = re.findall(rf"\| `{name}` \|(.*)", text)
        shown = [count["body"], count["projections"], count["embedding"]]
        assert numbers(row) == [*shown, sum(count.values())], name


def test_the_papers_counts_are_those_of_the_arithmetic():
    text = CONCEPTS.read_text().split("## Parameter counts")[1]
    layer = sum(p.numel() for p in hyper_core.AttentionConfig().build(1).parameters())
    words = 30522 * 312 + 512 * 312 + 2 * 312 + 624 + 312**2 + 312
    tinybert = words + layer
    projections = 4 * 768 * 312
    stages = [
        4 * 9 * 64**2,
        *(9 * w // 2 * w + 3 * 9 * w**2 + w // 2 * w for w in (128, 256, 512)),
    ]
    norms = 2 * (64 + 4 * 64 + 5 * (128 + 256 + 512))
    resnet = 3 * 49 * 64 + sum(stages) + 512 * 1000 + 1000 + norms
    mlp = 256 * 512 + 512 * 1024 + 10 * 1024**2 + 1024 * 256
    shown = set(numbers(text))
    expected = {layer, tinybert, projections, tinybert + projections, resnet, mlp, norms, *stages}
    assert expected <= shown
    assert [round(n / 1e6, 2) for n in (tinybert + projections, resnet, mlp)] == [
        11.88,
        11.69,
        11.4,
    ]
