"""A run that is killed and resumed goes on as if nothing had happened, bit for bit."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

STEPS = 48
TUNE = Path(sys.executable).with_name("tune")
COMPARED = ("step", "loss", "penalty", "grad_norm", "lr", "live_ranks", "tokens")


def command(config: Path, output: Path, ranks: int, *overrides: str) -> list[str]:
    launch = [str(TUNE), "run"]
    if ranks > 1:
        launch += ["--nproc_per_node", str(ranks)]
    launch += ["hyper-tune/hyperadalora_full", "--config", str(config)]
    return [*launch, f"output_dir={output}", f"max_steps={STEPS}", "epochs=20", *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


def rows(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_after(output: Path, launched: list[str], steps: int) -> int:
    """Start a run, kill every process of it once it has logged ``steps``, return how far it got."""
    process = psutil.Popen(
        launched, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    deadline = time.monotonic() + 120
    while len(rows(output)) < steps:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for victim in [*process.children(recursive=True), process]:
        victim.kill()
    assert process.wait() == -9
    return len(rows(output))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_resumes_bit_for_bit(
    tmp_path: Path, make_config: Callable[..., Path], ranks: int
) -> None:
    config = make_config(save_every_n_steps=4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(config, whole, ranks), check=True, env=environment())

    reached = kill_after(killed, command(config, killed, ranks), steps=9)
    assert 9 <= reached < STEPS
    resume = command(config, killed, ranks, "resume_from_checkpoint=True")
    subprocess.run(resume, check=True, env=environment())

    expected, found = ([{k: row[k] for k in COMPARED} for row in rows(f)] for f in (whole, killed))
    assert found == expected
    assert expected[0]["live_ranks"] > expected[8]["live_ranks"] > expected[-1]["live_ranks"]
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    for name in ("state.safetensors", "state.json"):
        assert (killed / last / name).read_bytes() == (whole / last / name).read_bytes()
    again = OmegaConf.load(killed / "config.yaml")
    assert (again.max_steps, again.resume_from_checkpoint) == (STEPS, True)
    adapter = Path("adapter/adapter_model.safetensors")
    assert (killed / adapter).read_bytes() == (whole / adapter).read_bytes()


def test_successive_checkpoints_differ(
    tmp_path: Path, make_config: Callable[..., Path], run: Callable[..., None]
) -> None:
    run(make_config(save_every_n_steps=1, max_steps=5))
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    states = [load_file(folder / "state.safetensors") for folder in folders]
    assert len(states) == 3
    for before, after in pairwise(states):
        moved = [key for key in before if not before[key].equal(after[key])]
        assert any("hypernetwork" in key for key in moved)
        assert any("exp_avg" in key for key in moved)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path: Path,
    make_config: Callable[..., Path],
    run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config()
    run(config)
    expected = [{key: row[key] for key in COMPARED} for row in rows(tmp_path / "run")]
    newest = tmp_path / "run" / "checkpoints" / "step-00000012" / "state.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-5] ^= 1
    newest.write_bytes(bytes(damaged))

    run(config, "resume_from_checkpoint=True")

    said = capsys.readouterr().err
    assert "step-00000012" in said
    assert "from step 8 of 12" in said
    assert [{key: row[key] for key in COMPARED} for row in rows(tmp_path / "run")] == expected


def test_a_checkpoint_of_another_run_is_refused(
    make_config: Callable[..., Path], run: Callable[..., None]
) -> None:
    config = make_config()
    run(config)
    message = (
        r"the checkpoint is of another run: method\.init_rank was 4 and is now 3, "
        "method.alpha was 4.0 and is now 3.0, seed was 0 and is now 1, "
        r"total_steps \(from epochs, max_steps, the samples and the batch\) was 12 and is now 11; "
        "restore the settings"
    )
    changed = ["seed=1", "method.init_rank=3", "max_steps=11"]
    with pytest.raises(ValueError, match=message):
        run(config, "resume_from_checkpoint=True", *changed)


def test_another_base_is_refused_and_moved_data_is_not(
    make_config: Callable[..., Path],
    run: Callable[..., None],
    llama: dict[str, Any],
    records: Path,
    tmp_path: Path,
) -> None:
    config = make_config(max_steps=4)
    run(config)
    moved = tmp_path / "moved.jsonl"
    shutil.copyfile(records, moved)
    run(config, "resume_from_checkpoint=True", f"dataset.path={moved}")
    moved.write_text(records.read_text().replace("0 plus 0", "0 plus 1"))
    with pytest.raises(ValueError, match="another run: the digest of the dataset's tokens was"):
        run(config, "resume_from_checkpoint=True", f"dataset.path={moved}")

    folder = shutil.copytree(llama["checkpointer"]["checkpoint_dir"], tmp_path / "base")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(ValueError, match="another run: the digest of the base's weights and token"):
        run(config, "resume_from_checkpoint=True", f"checkpointer.checkpoint_dir={folder}")


def test_resuming_without_a_checkpoint_says_that_it_starts_anew(
    make_config: Callable[..., Path],
    run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(make_config(max_steps=4), "resume_from_checkpoint=True")
    assert re.search(
        r"no checkpoint in .*/run/checkpoints; starting at step 0", capsys.readouterr().err
    )


def test_another_tokenizer_setting_is_refused_where_tokens_are_not_compared(
    make_config: Callable[..., Path], run: Callable[..., None], records: Path
) -> None:
    pairs = {"_component_": "torchtune.datasets.instruct_dataset", "source": "json"}
    columns = {"input": "question", "output": "answer"}
    config = make_config(
        dataset={**pairs, "data_files": str(records), "split": "train", "column_map": columns},
        method={"name": "lora", "init_rank": 2},
        max_steps=3,
    )
    run(config)
    run(config, "resume_from_checkpoint=True")
    template = "tokenizer.prompt_template=torchtune.data.QuestionAnswerTemplate"
    with pytest.raises(ValueError, match=r"tokenizer\.prompt_template was None and is now '"):
        run(config, "resume_from_checkpoint=True", template)
