"""What a person sees who gets something wrong: one message, status 2, no traceback."""

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hyper_tune.packaged import packaged_configs
from hyper_tune.torchtune.cli import main

Failing = Callable[..., str]


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


def test_two_kinds_of_held_out_data_are_refused(fails: Failing, records: Path) -> None:
    component = {"_component_": "hyper_tune.torchtune.data.file_dataset", "path": str(records)}
    assert fails("validation_fraction=0.1", dataset_val=component) == (
        "validation_fraction and dataset_val are both set; leave one of them null."
    )


def test_options_that_contradict_the_method_are_refused(fails: Failing) -> None:
    message = fails(method={"name": "lora", "pruning": {"interval": 10}, "budget": 2})
    assert message == (
        "method.name 'lora' has no method.budget, method.pruning; leave them out (on the command "
        "line of a recipe: '~method.budget' '~method.pruning'), or choose a method that has them."
    )


def test_targets_that_match_nothing_say_what_there_is(fails: Failing) -> None:
    message = fails("method.target_modules=[q_pro]")
    assert "q_pro" in message
    for there_is in ("q_proj", "v_proj", "w1"):
        assert there_is in message


def test_a_rank_above_a_matrix_names_the_matrix(fails: Failing) -> None:
    message = fails("method.init_rank=17", "method.budget=2")
    assert re.search(r"layers\.0\.attn\.k_proj.*17.*16", message), message


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model.safetensors", "half", "cannot be read: "),
        ("config.json", "{", "config.json is not JSON: "),
        ("config.json", "{}", "config.json has no num_attention_heads; "),
        (
            "tokenizer.model",
            "half",
            "tokenizer: torchtune.models.llama3.llama3_tokenizer cannot be",
        ),
        ("special_tokens.json", "{}", "cannot be built: KeyError('added_tokens')"),
    ],
)
def test_a_damaged_file_of_the_base_is_named(
    fails: Failing, llama: dict[str, Any], tmp_path: Path, file: str, text: str, message: str
) -> None:
    folder = shutil.copytree(llama["checkpointer"]["checkpoint_dir"], tmp_path / "base")
    (folder / file).write_text(text)
    said = fails(
        f"checkpointer.checkpoint_dir={folder}",
        f"tokenizer.path={folder}/tokenizer.model",
        f"tokenizer.special_tokens_path={folder}/special_tokens.json",
    )
    assert message in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["dataset.packed=True"],
            "dataset.packed is set, and tokenizer.max_seq_len, the length of a pack, is None; ",
        ),
        (
            ["dataset.pakced=True", "~dataset.packed"],
            "dataset has no key 'pakced'; did you mean 'packed'?",
        ),
        (
            ["dataset.split=train[:0]"],
            "dataset: torchtune.datasets.chat_dataset cannot be built: Ins",
        ),
        (["dataset.split=test"], "dataset: torchtune.datasets.chat_dataset cannot be built: Unk"),
        (["dataset.field=rows"], "dataset: torchtune.datasets.chat_dataset cannot be built: "),
        (["dataset.conversation_column=talk"], "column 'talk'; there are messages. Name the col"),
        ([], "dataset, sample 1: "),
    ],
)
def test_a_data_set_of_torchtune_that_does_not_fit_is_refused(
    fails: Failing, tmp_path: Path, overrides: list[str], message: str
) -> None:
    path = tmp_path / "chat.json"
    turns = ["Why?", "So."], ["Why?", "so " * 200]
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in turns
    ]
    path.write_text(json.dumps(rows))
    keys = {"source": "json", "data_files": str(path), "split": "train", "packed": False}
    dataset = {"_component_": "torchtune.datasets.chat_dataset", "conversation_style": "openai"}
    dataset |= {"conversation_column": "messages", **keys}
    assert message in fails(*overrides, dataset=dataset)


def test_a_disk_that_is_full_is_one_message(
    fails: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "state.safetensors")

    monkeypatch.setattr("hyper_tune.torchtune.recipe.write_checkpoint", refuse)
    assert fails() == (
        "[Errno 28] No space left on device: 'state.safetensors'; nothing half-written is left, "
        "what was saved stays."
    )


def test_a_sample_longer_than_the_model_reads_is_named(fails: Failing, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"question": "Why?", "answer": "So."}, {"question": "Why?", "answer": "so " * 200}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = fails(f"dataset.path={path}")
    assert message.startswith(f"{path}:2: ")
    assert "but the model reads at most 256 (1 of 2 records are longer); set tokenizer." in message


def test_a_question_that_leaves_no_room_for_its_answer_is_named(
    fails: Failing, records: Path
) -> None:
    message = fails(f"exact_match.path={records}", "exact_match.max_new_tokens=250")
    assert re.match(
        rf"{records}:1: a question of \d+ tokens and exact_match.max_new_tokens = 250 are more "
        "than the 256 tokens that the model reads; ",
        message,
    ), message


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
    assert message.endswith(
        "/run/checkpoints are untouched. Lower optimizer.lr, or set clip_grad_norm."
    )
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved[-1] == f"step-{rows[-3]['step']:08d}"


def test_pruning_that_never_reaches_the_budget_warns(
    make_config: Callable[..., Path], run: Callable[..., None]
) -> None:
    config = make_config(method=OmegaConf.create({"name": "adalora", "init_rank": 4}))
    with pytest.warns(UserWarning, match="leaves 56 of 56 ranks before the last of 12 steps"):
        run(config)


def test_losses_that_are_never_finite_say_that_nothing_was_saved(fails: Failing) -> None:
    message = fails("optimizer.lr=1e30", "max_skipped_steps=2", "save_every_n_steps=100")
    assert message.endswith(
        "no checkpoint was saved before. Lower optimizer.lr, or set clip_grad_norm."
    )


def test_an_interruption_says_how_to_go_on(
    make_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hyper_tune.torchtune.recipe.FineTuning.train", interrupt)
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(make_config())])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert "interrupted; resume with resume_from_checkpoint=True." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"max_steps": 2},
            r"num_warmup_steps is 2, but the run has 2 steps, so that the learning rate never",
        ),
        (
            {"validate_every_n_steps": 2},
            "dataset_val is null and validation_fraction too",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the pruning schedule leaves")
def test_settings_without_effect_are_warned_of(
    make_config: Callable[..., Path], run: Callable[..., None], keys: dict[str, int], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        run(make_config(**keys))


@pytest.mark.filterwarnings("ignore:the first pruning")  # a rate of 0 learns nothing
def test_a_loss_that_did_not_fall_is_said(
    make_config: Callable[..., Path],
    run: Callable[..., None],
    records: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    component = "hyper_tune.torchtune.data.file_dataset"
    keys: dict[str, Any] = {"dataset_val": {"_component_": component, "path": str(records)}}
    for lr, expected in ((0.0, True), (1e-3, False)):
        run(make_config(**keys, output_dir=f"{records.parent}/{lr}"), f"optimizer.lr={lr}")
        assert ("the held-out loss did not fall" in capsys.readouterr().err) is expected
