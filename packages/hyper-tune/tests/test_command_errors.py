"""What a person sees who gets something wrong: one message, status 2, no traceback."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hyper_tune.packaged import packaged_configs
from hyper_tune.torchtune.cli import main

Failing = Callable[..., str]


@pytest.fixture
def fails(
    make_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Failing:
    """Return what runs the command, expects status 2, and returns the message."""

    def run(*overrides: str, config: str | None = None, **keys: Any) -> str:
        chosen = config or str(make_config(**keys))
        monkeypatch.setattr(sys, "argv", ["recipe", "--config", chosen, *overrides])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr().err
        assert stop.value.code == 2, said
        assert "Traceback" not in said
        message = said[said.index("error: ") :]
        return message.removeprefix("error: ").rstrip()

    return run


def test_an_unknown_config_lists_the_packaged_ones(fails: Failing) -> None:
    message = fails(config="lama3_1_8b")
    names = ", ".join(packaged_configs())
    assert message == (
        "--config lama3_1_8b is neither a file nor a configuration of this package, which has "
        f"{names}. Did you mean llama3_1_8b?"
    )


def test_missing_weights_name_the_folder_and_the_download(
    fails: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = fails(config="llama3_1_8b")
    assert str(tmp_path / "models/Llama-3.1-8B-Instruct") in message
    assert "the folder does not exist (5 of 5 files missing)" in message
    assert (
        "tune download meta-llama/Llama-3.1-8B-Instruct --output-dir "
        'models/Llama-3.1-8B-Instruct --ignore-patterns "original/consolidated*"'
    ) in message


@pytest.mark.parametrize("name", [name for name in packaged_configs() if name != "tiny_llama"])
def test_every_packaged_config_is_valid_up_to_its_weights(
    fails: Failing, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fails(config=name).startswith(f"no base model in {tmp_path}/models/")


def test_a_weight_file_that_may_be_a_pickle_is_refused(fails: Failing) -> None:
    message = fails("checkpointer.checkpoint_files=[pytorch_model.bin]")
    assert message == (
        "checkpointer.checkpoint_files names pytorch_model.bin, which may be a pickle; "
        "only .safetensors files are read."
    )


def test_a_missing_tokenizer_is_named(fails: Failing, tmp_path: Path) -> None:
    message = fails(f"tokenizer.path={tmp_path}/none.model")
    assert message.startswith(
        f"no tokenizer: tokenizer.path is {tmp_path}/none.model, which does not exist."
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.name=hyperadalor", "method.name is 'hyperadalor', but must be one of lora, "),
        ("method.init_rank=0", "method.init_rank is 0, but must be at least 1; "),
        ("method.budget=5", "method.budget is 5, but must be above 0 and at most "),
        ("method.bugdet=1", "method has no key 'bugdet'; did you mean 'budget'?"),
        ("batchsize=1", "configuration has no key 'batchsize'; did you mean 'batch_size'?"),
        ("batch_size=0", "batch_size is 0, but must be a whole number of at least 1; "),
        ("batch_size=two", "batch_size is 'two', but must be a whole number of at least 1; "),
        ("optimizer=adam", "optimizer: adam cannot be built"),
        ("method=lora", "configuration: method must be a section of keys, such as name."),
        ("optimizer._component_=torch.optim.Adamm", "optimizer: torch.optim.Adamm cannot be built"),
        ("device=tpu", "device is 'tpu'; expected cpu or cuda."),
        ("device=cuda", "device is 'cuda', but this machine has no usable GPU; set device=cpu."),
        ("dataset.path=none.jsonl", "none.jsonl"),
        ("resume_from_checkpoint", "'resume_from_checkpoint' is not understood; overrides are "),
        ("output_dir=runs/lr=1", "'output_dir=runs/lr=1' is not understood; overrides are "),
        ("~dataset.pth", "'~dataset.pth' is not understood; overrides are "),
        ("~checkpointer.checkpoint_dir", "checkpointer.checkpoint_dir is missing; "),
        ("exact_match.path=null", "exact_match.path is missing; "),
        ("exact_match.file=x", "exact_match has no key 'file'; "),
        ("model.vocab_size=200", "records.jsonl:1: the tokenizer makes token 2"),
        ("method.hypernetwork.preset=big", "method.hypernetwork.preset is 'big', but must be one"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(fails: Failing, override: str, message: str) -> None:
    assert message in fails(override)


def test_options_that_contradict_the_method_are_refused(fails: Failing) -> None:
    message = fails(method={"name": "lora", "pruning": {"interval": 10}})
    assert message == (
        "method.pruning is set, but method.name 'lora' has none; remove it or choose adalora or "
        "hyperadalora."
    )


def test_targets_that_match_nothing_say_what_there_is(fails: Failing) -> None:
    message = fails("method.target_modules=[q_pro]")
    assert "q_pro" in message
    for there_is in ("q_proj", "v_proj", "w1"):
        assert there_is in message


def test_a_rank_above_a_matrix_names_the_matrix(fails: Failing) -> None:
    message = fails("method.init_rank=17", "method.budget=2")
    assert re.search(r"layers\.0\.attn\.k_proj.*17.*16", message), message


def test_a_checkpoint_of_another_model_is_refused(fails: Failing) -> None:
    message = fails("model.intermediate_dim=64")
    assert "is of another model: layers.0.mlp.w1.base.weight is (48, 32) there, but (64, 32)" in (
        message
    )


def test_a_sample_longer_than_the_model_reads_is_named(fails: Failing, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"question": "Why?", "answer": "So."}, {"question": "Why?", "answer": "so " * 200}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = fails(f"dataset.path={path}")
    assert message.startswith(f"{path}:2: ")
    assert "but the model reads at most 256; set tokenizer.max_seq_len to 256" in message


def test_malformed_data_names_file_and_line(fails: Failing, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "Why?", "answer": "So."}\n{"question": \n')
    assert f"{path}:2" in fails(f"dataset.path={path}")


def test_an_output_folder_in_use_is_refused(
    fails: Failing, run: Callable[..., None], make_config: Callable[..., Path]
) -> None:
    run(make_config(max_steps=4))
    message = fails()
    assert "resume_from_checkpoint=True" in message
    assert "output_dir" in message


def test_losses_that_are_not_finite_end_the_run_and_keep_the_checkpoint(
    fails: Failing, tmp_path: Path
) -> None:
    message = fails("optimizer.lr=1e30", "max_skipped_steps=2", "save_every_n_steps=1")
    assert re.match(r"steps \d+ to \d+ had no finite loss or gradient", message)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows[-3:]] == [False, True, True]
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved[-1] == f"step-{rows[-3]['step']:08d}"


def test_pruning_that_never_reaches_the_budget_warns(
    make_config: Callable[..., Path], run: Callable[..., None]
) -> None:
    config = make_config(method=OmegaConf.create({"name": "adalora", "init_rank": 4}))
    with pytest.warns(UserWarning, match="leaves 56 of 56 ranks after 12 steps, above the budget"):
        run(config)
