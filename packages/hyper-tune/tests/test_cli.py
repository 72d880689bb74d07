"""The command `hyper-tune`: what its verbs say and write, and its one line where they cannot."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.data import Message
from transformers import AutoModelForCausalLM

from hyper_tune.cli.main import main
from hyper_tune.method import METHODS
from hyper_tune.packaged import packaged_configs, packaged_data
from hyper_tune.torchtune.components import build_tokenizer
from hyper_tune.torchtune.trained import open_trained
from rank_budget.tables import rank_table

Run = Callable[..., None]
ConfigMaker = Callable[..., Path]


def test_ls_lists_every_recipe_configuration_and_data_set(said: Callable[..., str]) -> None:
    recipes, configs, data = (
        [line.split() for line in table.splitlines()] for table in said("ls").split("\n\n")
    )
    assert recipes[0] == ["recipe", "method"]
    assert sorted(recipes[1:]) == sorted([f"hyper-tune/{name}_full", name] for name in METHODS)
    assert configs[0] == ["configuration", "base", "model"]
    bases = {
        name: str(OmegaConf.load(path).base_model) for name, path in packaged_configs().items()
    }
    assert {line[0]: line[1] for line in configs[1:]} == bases
    assert [line[0] for line in data[1:]] == [f"data={name}" for name in packaged_data()]
    assert ["data=gsm8k", "openai/gsm8k"] in data


@pytest.mark.parametrize("name", ["llama3_1_8b", "hyper-tune/hyperadalora_full", "data=gsm8k"])
def test_cp_copies_and_overwrites_nothing_unasked(
    said: Callable[..., str], refused: Callable[..., str], tmp_path: Path, name: str
) -> None:
    target = tmp_path / "mine"
    assert said("cp", name, target) == f"{target}\n"
    text = target.read_text()
    assert "hyperadalora" in text
    target.write_text("changed")
    assert refused("cp", name, target) == (
        f"{target} exists; give another name, or --force to overwrite it."
    )
    assert target.read_text() == "changed"
    said("cp", name, target, "--force")
    assert target.read_text() == text
    written = Path(said("cp", name, tmp_path).strip())
    assert written.parent == tmp_path
    assert written.stem == re.split("[/=]", name)[-1]
    assert written.read_text() == text
    assert "is not a folder; make it first." in refused("cp", name, tmp_path / "no" / "mine")


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, write_config: ConfigMaker, run: Run, records: Path
) -> dict[str, Path]:
    """Two finished runs that differ in two settings, and one that has not ended."""
    folder = tmp_path_factory.mktemp("runs")
    folders = {name: folder / name for name in ("first", "second", "third")}
    data = {"_component_": "hyper_tune.torchtune.data.file_dataset", "path": str(records)}
    config = write_config(folder, max_steps=8, dataset_val=data, validate_every_n_steps=4)
    config.write_text(config.read_text().replace("interval: 3", "interval: 3\n    finish_by: 0.9"))
    run(config, f"output_dir={folders['first']}")
    run(config, f"output_dir={folders['second']}", "optimizer.lr=3e-3", "method.pruning.interval=4")
    shutil.copytree(folders["first"], folders["third"])
    (folders["third"] / "summary.json").unlink()
    return folders


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_ranks_are_those_of_the_run_or_of_a_checkpoint(
    trained: dict[str, Path],
    said: Callable[..., str],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    first, third = trained["first"], trained["third"]
    summary = json.loads((first / "summary.json").read_text())
    expected = rank_table(summary["ranks"], summary["initial_rank"]) + "\n"
    assert said("ranks", first) == expected
    assert said("ranks", third) == expected
    live = rows(first)[3]["live_ranks"]
    at_four = said("ranks", first, "--step", 4)
    assert at_four.endswith(f"{live} of 56 ranks\n")
    assert at_four != expected
    said("ranks", first, "--png", tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert refused("ranks", first, "--step", 5) == (
        f"{first / 'checkpoints'} has no checkpoint of step 5; it has 4, 8."
    )


def test_compare_puts_the_figures_of_runs_side_by_side(
    trained: dict[str, Path], said: Callable[..., str], tmp_path: Path
) -> None:
    paths = list(trained.values())
    printed = said("compare", *paths, "--png", tmp_path / "runs.png")
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    table = {line[0]: line[1:] for line in lines if len(line) == 4}
    losses = [[row["loss"] for row in rows(path)] for path in paths]
    assert table["training loss, mean of all steps"] == [f"{sum(r) / 8:.4f}" for r in losses]
    assert table["training loss, last tenth"] == [f"{r[-1]:.4f}" for r in losses]
    held_out = [min(rows(path)[3]["validation_loss"], rows(path)[7]["validation_loss"])
                for path in paths]  # fmt: skip
    assert table["held-out loss, lowest"] == [f"{value:.4f}" for value in held_out]
    summaries = [json.loads((path / "summary.json").read_text()) for path in paths[:2]]
    after = [f"{summary['after']['loss']:.4f}" for summary in summaries]
    assert table["held-out loss, after"] == [*after, "-"]
    assert table["live ranks"] == [str(rows(path)[-1]["live_ranks"]) for path in paths]
    assert table["steps"] == ["8", "8", "8, not finished"]
    seconds = [sum(row["seconds"] for row in rows(path)) for path in paths]
    assert table["seconds of all steps"] == [f"{value:.0f}" for value in seconds]
    assert table["optimizer.lr"] == ["0.001", "0.003", "0.001"]
    assert table["method.pruning.interval"] == ["3", "4", "3"]
    settings = printed[printed.index("differing settings") :].splitlines()[1:-2]
    assert len(settings) == 2
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_folder_explains_itself(trained: dict[str, Path], records: Path) -> None:
    folder = trained["second"]
    for picture in ("loss.png", "ranks.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    (start,) = (json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines())
    assert start["versions"]["torch"] == torch.__version__
    assert start["folder"] == str(Path.cwd())
    assert start["processes"] == 1
    inside = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert (start["git"] or {"commit": ""})["commit"] == inside.stdout.strip()
    assert OmegaConf.load(folder / "config.yaml").optimizer.lr == 3e-3
    card = (folder / "adapter" / "README.md").read_text()
    head = OmegaConf.create(card.split("---")[1])
    assert head.library_name == "peft"
    assert head.tags == ["hyper-tune", "hyperadalora", "lora"]
    summary = json.loads((folder / "summary.json").read_text())
    assert rank_table(summary["ranks"], summary["initial_rank"]) in card
    assert f"| held-out loss, after | {summary['after']['loss']:.4f} |" in card
    assert records.name in card
    assert str(records.parent) not in card
    assert str(folder) not in card


def test_a_resumed_run_has_a_line_for_each_start(
    tmp_path: Path, make_config: ConfigMaker, run: Run
) -> None:
    config = make_config(max_steps=4)
    run(config)
    run(config, "resume_from_checkpoint=True")
    assert len((tmp_path / "run" / "starts.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("family", ["llama", "tied_qwen"])
def test_generate_answers_as_the_exported_model_does(
    tmp_path: Path,
    make_config: ConfigMaker,
    run: Run,
    said: Callable[..., str],
    refused: Callable[..., str],
    request: pytest.FixtureRequest,
    family: str,
) -> None:
    run(make_config(**request.getfixturevalue(family), max_steps=20))
    folder, merged = tmp_path / "run", tmp_path / "merged"
    questions = ["What is 3 plus 9?", "Why?"]
    printed = said("generate", folder, *questions, "--max-new-tokens", 12)
    assert said("generate", folder, questions[0])  # as long as there is room for
    said("export", folder, merged, "--format", "merged")

    opened = open_trained(folder)
    tokenizer = build_tokenizer(opened.settings.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(merged)
    expected = []
    for question in questions:
        tokens = torch.tensor([prompt(tokenizer, question)])
        for _ in range(12):
            best = model(tokens).logits[0, -1].argmax()
            tokens = torch.cat([tokens, best.view(1, 1)], dim=1)
        new = tokens[0, len(prompt(tokenizer, question)) :].tolist()
        ends = [i for i, token in enumerate(new) if token in tokenizer.stop_tokens]
        expected.append(tokenizer.decode(new[: ends[0]] if ends else new).strip())
    assert printed == "".join(f"{answer}\n" for answer in expected)
    assert len(set(expected)) == 2

    draw = ("generate", folder, "Why?", "--temperature", 1.5, "--max-new-tokens", 12, "--seed")
    drawn = [said(*draw, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    cold = said("generate", folder, "Why?", "--temperature", 1e-4, "--max-new-tokens", 12)
    assert cold == f"{expected[1]}\n" != drawn[0]
    assert "but the model reads 256; shorten it" in refused("generate", folder, "Why? " * 60)


def prompt(tokenizer: Any, question: str) -> list[int]:
    turns = [Message(role="user", content=question), Message(role="assistant", content="")]
    tokens: list[int] = tokenizer({"messages": turns}, inference=True)["tokens"]
    while tokens[-1] in tokenizer.stop_tokens:  # Qwen's closes the empty turn
        tokens = tokens[:-1]
    return tokens


def test_a_moved_base_is_found_where_it_is_said_to_be(
    tmp_path: Path,
    make_config: ConfigMaker,
    run: Run,
    llama: dict[str, Any],
    said: Callable[..., str],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = Path(llama["checkpointer"]["checkpoint_dir"])
    here = tmp_path / "here"
    here.symlink_to(old)
    keys = json.loads(json.dumps(llama).replace(str(old), str(here)))
    run(make_config(**keys, max_steps=4))
    here.unlink()
    folder = tmp_path / "run"
    export = ["export", folder, tmp_path / "merged", "--format", "merged"]
    capsys.readouterr()
    assert main([str(word) for word in export]) == 2
    assert capsys.readouterr().err.startswith(f"error: no base model in {here}: the folder does ")
    said("export", folder, tmp_path / "adapter")
    said(*export, "--base", old)
    assert said("generate", folder, "Why?", "--base", old, "--max-new-tokens", 2)
    assert refused("export", folder, tmp_path / "adapter") == (
        f"{tmp_path / 'adapter'} exists; give a folder that does not."
    )
    assert "--dtype bf16 is for --format merged" in refused(
        "export", folder, tmp_path / "x", "--dtype", "bf16"
    )
