"""The packaged files: one text but for the model, and the memory that `plan` prints.

`python test_configs.py` writes the memory anew, after a change that moves it.
"""

import importlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from hyper_tune.cli.main import main
from hyper_tune.layout import BaseLayout
from hyper_tune.packaged import packaged_configs
from hyper_tune.plan import Rehearsal
from hyper_tune.torchtune.rehearsal import longest_sample, rehearse
from hyper_tune.torchtune.settings import RecipeSettings

CONFIGS = {name: path for name, path in packaged_configs().items() if name != "tiny_llama"}
PLANNED = re.compile(
    r"^#   hyper-tune (plan --config (\w+)(?: --nproc (\d+))?) +([\d.]+) GiB$", re.M
)
RUNS = re.compile(r"^#   tune run (?:--nproc_per_node (\d+) )?\S+ --config (\w+)$", re.M)


def masked(path: Path) -> str:
    """The text, with marks in place of all that names the model or follows from its size."""
    text = path.read_text()
    config = yaml.safe_load(text)
    title = re.match(r"# HyperAdaLoRA on (.*), with", text)
    assert title is not None
    text = RUNS.sub("#   <run>", PLANNED.sub("#   <plan>", text))
    text = re.sub(r"(#   <(run|plan)>\n)+", r"#   <\2>\n", text)
    text = re.sub(r"  checkpoint_files:.*?(?=  model_type)", "  <files>\n", text, flags=re.DOTALL)
    marks = {
        f"gradient_accumulation_steps: {config['gradient_accumulation_steps']} ": "<accumulation> ",
        f"quantize_base: {config['quantize_base']} ": "<quantised> ",
        config["model"]["_component_"]: "<builder>",
        f"model_type: {config['checkpointer']['model_type']}\n": "<type>\n",
        config["base_model"]: "<base>",
        config["model_dir"]: "<folder>",
        f"./runs/{path.stem} ": "<run> ",
        title[1]: "<title>",
    }
    for name, mark in marks.items():
        assert name in text, name
        text = text.replace(name, mark)
    return text


def test_the_files_differ_in_the_model_alone() -> None:
    texts = {name: masked(path) for name, path in CONFIGS.items()}
    for family in ("llama", "qwen"):
        of_family = {text for name, text in texts.items() if name.startswith(family)}
        assert len(of_family) == 1, family
    assert len({text[text.index("method:\n") :] for text in texts.values()}) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_knob_says_what_it_does(name: str) -> None:
    text = CONFIGS[name].read_text()
    below = text[text.index("\nmethod:\n") :].splitlines()
    knobs = [line for line in below if re.match(r" *[a-z]\w*: *\S", line)]
    assert len(knobs) > 30
    assert [line for line in knobs if "   # " not in line] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_names_agree_with_each_other(name: str) -> None:
    text = CONFIGS[name].read_text()
    config: Any = OmegaConf.load(CONFIGS[name])
    repository = config.base_model.split("/")[1]
    assert config.model_dir == f"models/{repository}"
    names = (
        repository.removesuffix("-Instruct"),
        text.splitlines()[0].split(" on ")[1].split(",")[0].removesuffix(" in NF4"),
        config.model._component_.rpartition(".")[2].removesuffix("_instruct"),
    )
    for spelling in names:
        assert re.sub(r"[-. _]", "", spelling.lower()) == re.sub("_qlora$|_", "", name)
    assert config.quantize_base == name.endswith("_qlora") == (" in NF4, " in text)
    assert {match[2] for match in RUNS.finditer(text)} == {name}
    assert f"tune download {config.base_model} --output-dir {config.model_dir}" in text


@pytest.mark.parametrize("name", CONFIGS)
def test_the_batch_is_the_papers_for_the_processes_of_the_first_command(name: str) -> None:
    text = CONFIGS[name].read_text()
    config: Any = OmegaConf.load(CONFIGS[name])
    processes = [int(match[1] or 1) for match in RUNS.finditer(text)]
    assert processes == sorted(set(processes))
    assert config.batch_size * config.gradient_accumulation_steps * processes[0] == 64
    assert [int(match[3] or 1) for match in PLANNED.finditer(text)] == processes


@cache
def rehearsed(model: tuple[Callable[..., Any], bool]) -> Rehearsal:
    """What `plan` measures of a model; all else is the same in the files."""
    (path, *_) = (path for path in CONFIGS.values() if model_of(path) == model)
    settings = RecipeSettings.from_config(OmegaConf.load(path))
    return rehearse(settings, longest_sample(settings))


def model_of(path: Path) -> tuple[Callable[..., Any], bool]:
    """What builds the model, and whether it is held in NF4."""
    config = OmegaConf.load(path)
    module, _, name = config.model._component_.rpartition(".")
    return getattr(importlib.import_module(module), name), bool(config.quantize_base)


def peak(path: Path, planned: re.Match[str]) -> str:
    """What a file's line should state, in GiB."""
    memory = rehearsed(model_of(path)).memory(BaseLayout.of(int(planned[3] or 1)))
    return f"{sum(memory.values()) / 2**30:.1f}"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_memory_is_that_of_the_plan(name: str) -> None:
    planned = list(PLANNED.finditer(CONFIGS[name].read_text()))
    assert planned
    for match in planned:
        assert (match[2], match[4]) == (name, peak(CONFIGS[name], match))


def test_the_command_in_a_file_prints_the_memory_that_it_states(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (match, *_) = PLANNED.finditer(CONFIGS["qwen2_5_0_5b"].read_text())
    assert main(match[1].split()) == 0
    (printed,) = re.findall(r"^peak on .* ([\d.]+)\s*$", capsys.readouterr().out, re.M)
    assert float(printed) == pytest.approx(float(match[4]), abs=0.051)


if __name__ == "__main__":
    for path in CONFIGS.values():
        text = path.read_text()
        for match in PLANNED.finditer(text):
            line = match[0].replace(f" {match[4]} GiB", f" {peak(path, match)} GiB")
            text = text.replace(match[0], line)
        path.write_text(text)
