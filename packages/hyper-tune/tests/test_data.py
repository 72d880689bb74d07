"""Local files of every format become samples whose prompts carry no loss."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hyper_tune.errors import UserError
from hyper_tune.torchtune.batches import collate
from hyper_tune.torchtune.components import build, build_tokenizer
from hyper_tune.torchtune.data import FileDataset

GSM8K = Path(__file__).parent / "data" / "gsm8k.jsonl"
QUESTION, ANSWER = "What is 2 + 2?", "4"
FORMATS = {
    "pairs.jsonl": json.dumps({"question": QUESTION, "answer": ANSWER}),
    "chat.jsonl": json.dumps(
        {
            "messages": [
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": ANSWER},
            ]
        }
    ),
    "alpaca.json": json.dumps([{"instruction": QUESTION, "input": "", "output": ANSWER}]),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_only_the_answer_and_its_end_carry_loss(
    tmp_path: Path, request: pytest.FixtureRequest, family: str, name: str
) -> None:
    path = tmp_path / name
    path.write_text(FORMATS[name])
    tokenizer = build("tokenizer", request.getfixturevalue(family)["tokenizer"])
    sample = FileDataset(tokenizer, str(path))[0]
    learned = [label for label in sample["labels"] if label != -100]
    text = tokenizer.decode(learned, skip_special_tokens=False)
    assert re.fullmatch(r"<\|[a-z_]+\|>assistant(<\|[a-z_]+\|>)?\n+4<\|[a-z_]+\|>\n?", text), text
    assert QUESTION not in text
    assert any(token in tokenizer.stop_tokens for token in learned)
    assert QUESTION in tokenizer.decode(list(sample["tokens"]), skip_special_tokens=False)
    assert [t for t, label in zip(sample["tokens"], sample["labels"], strict=True) if label == t]


def test_with_train_on_input_the_question_carries_loss_too(
    tmp_path: Path, llama: dict[str, Any]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(FORMATS["pairs.jsonl"])
    tokenizer = build("tokenizer", llama["tokenizer"])
    sample = FileDataset(tokenizer, str(path), train_on_input=True)[0]
    learned = [label for label in sample["labels"] if label != -100]
    assert QUESTION in tokenizer.decode(learned, skip_special_tokens=False)


def test_a_tokenizer_is_read_from_its_file_each_time(
    tmp_path: Path, llama: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    source = Path(llama["tokenizer"]["path"]).read_text().splitlines()
    path = tmp_path / "tokenizer.model"
    component = {**llama["tokenizer"], "path": str(path)}
    path.write_text("\n".join(source) + "\n")
    assert build_tokenizer(component).encode("a", add_bos=False, add_eos=False) == [97]
    other = [*source[:97], "Yg== 97", "YQ== 98", *source[99:]]  # "a" and "b" exchanged
    path.write_text("\n".join(other) + "\n")
    assert build_tokenizer(component).encode("a", add_bos=False, add_eos=False) == [98]


def test_padding_and_shift() -> None:
    samples = [
        {"tokens": [1, 2, 3], "labels": [-100, 2, 3]},
        {"tokens": [4, 5], "labels": [-100, 5]},
    ]
    batch = collate(samples, 9, torch.device("cpu"))
    assert batch.tokens.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch.places == {}
    assert batch.labels.tolist() == [[2, 3, -100], [5, -100, -100]]


def test_a_record_cut_before_its_answer_is_refused(tmp_path: Path, llama: dict[str, Any]) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(FORMATS["pairs.jsonl"])
    tokenizer = build("tokenizer", {**llama["tokenizer"], "max_seq_len": 8})
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: none of the 8 tokens is the assistant's"):
        FileDataset(tokenizer, str(path))


def test_held_out_loss_on_gsm8k_falls(
    tmp_path: Path,
    make_config: Callable[..., Path],
    run: Callable[..., None],
    llama: dict[str, Any],
) -> None:
    rows = GSM8K.read_text().splitlines(keepends=True)
    paths = {"train": tmp_path / "train.jsonl", "held_out": tmp_path / "held_out.jsonl"}
    paths["train"].write_text("".join(rows[:48]))
    paths["held_out"].write_text("".join(rows[48:]))
    component = "hyper_tune.torchtune.data.file_dataset"
    run(
        make_config(
            model={**llama["model"], "max_seq_len": 2048},
            dataset={"_component_": component, "path": str(paths["train"])},
            dataset_val={"_component_": component, "path": str(paths["held_out"])},
            batch_size=4,
            max_steps=30,
        )
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"] - 1.0
