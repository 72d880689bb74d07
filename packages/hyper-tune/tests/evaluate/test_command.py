"""`hyper-tune evaluate`: from a run folder, and a Hugging Face model, to a table."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from hyper_tune.cli.main import main
from hyper_tune.errors import UserError
from hyper_tune.evaluate.sandbox import Sandbox
from hyper_tune.torchtune.exports import export_merged
from hyper_tune.torchtune.trained import open_trained

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    write_config: Callable[..., Path],
    run: Callable[..., None],
) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(write_config(folder))
    return folder / "run"


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """Questions that fit a model of 256 tokens."""
    path = tmp_path / "short.jsonl"
    rows = [{"question": f"{n}+{n}?", "answer": f"#### {2 * n}"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return what runs `evaluate`, and returns status, output and message."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["evaluate", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_a_run_is_evaluated_by_each_task(trained: Path, short: Path, command: Run) -> None:
    few = ("--max-new-tokens", 8, "--limit", 3)
    status, said, _ = command(trained, "--task", "text", "--data", short, *few)
    assert status == 0
    names = ["BLEU-4", "ROUGE-1", "BLEU-4 of characters"]
    _, *rows, last = said.splitlines()
    # With the extra jieba there is one more.
    assert [re.split(r"  +", row)[0] for row in rows][:3] == names
    assert last == str(trained / "evaluation" / "text" / "results.json")
    status, said, _ = command(trained, "--task", "gsm8k", "--data", short, *few)
    assert status == 0
    assert re.search(r"^exact match +\d+\.\d\d +final number", said, re.MULTILINE)
    results = json.loads((trained / "evaluation" / "gsm8k" / "results.json").read_text())
    assert results["rows"] == 3
    assert results["settings"]["model"] == f"{trained} at step 12"
    (found,) = results["metrics"]
    assert f"{found['value']:.2f}" in said


def test_a_runs_programs_are_run_if_asked_for(trained: Path, command: Run, tmp_path: Path) -> None:
    problems = tmp_path / "p.jsonl"
    row = json.loads((DATA / "problems.jsonl").read_text().splitlines()[0])
    problems.write_text(json.dumps(row | {"prompt": "def double(x):\n"}))
    asked = (trained, "--task", "humaneval", "--data", problems, "--max-new-tokens", 8)
    status, _, message = command(*asked)
    assert status == 2
    assert message.startswith("error: --task humaneval runs programs that the model writes, in a s")
    assert not (trained / "evaluation" / "humaneval").exists()
    try:
        with Sandbox():
            pass
    except UserError as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    status, said, message = command(
        *asked, "--execute-generated-code", "--samples", 2, "--temperature", 0.8, "--jobs", 2
    )
    assert status == 0, message
    assert re.search(r"^pass@1 +0\.00 ", said, re.MULTILINE)
    assert re.search(r"^pass@2 +0\.00 ", said, re.MULTILINE)
    scores = (trained / "evaluation" / "humaneval" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["passed"] for line in scores] == [False, False]


def test_a_merged_model_answers_as_its_run(
    trained: Path, short: Path, command: Run, tmp_path: Path
) -> None:
    folder = export_merged(open_trained(trained), tmp_path / "merged")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_tokenizer(), eos_token="<|eot_id|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    tokenizer.chat_template = "<|begin_of_text|>" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    asked = ("--task", "gsm8k", "--data", short, "--max-new-tokens", 12)
    status, _, message = command(folder, *asked)
    assert (status, message) == (
        2,
        f"error: {folder} is not a run folder; say where results go, with --output.\n",
    )
    for model, output in ((folder, tmp_path / "a"), (trained, tmp_path / "b")):
        status, _, message = command(model, *asked, "--output", output)
        assert status == 0, message
    first, second = ((tmp_path / name / "answers.jsonl").read_text() for name in "ab")
    assert first == second
    assert len(set(first.splitlines())) == 4


def bytes_tokenizer() -> Any:
    """The tiny Llama's tokenizer, of bytes and special tokens, as `transformers` reads it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from torchtune.models.llama3._tokenizer import SPECIAL_TOKENS

    shown = [letter for letter, _ in sorted(byte_letters().items(), key=lambda pair: pair[1])]
    made = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(shown)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    return made


def byte_letters() -> dict[str, int]:
    """Which byte a letter of a byte-level tokenizer stands for (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "gsm8k", "--data", "{none}"], "--data {none} is not a file."),
        (["--task", "gsm8k", "--data", "{problems}"], "{problems}:1: no known format has the keys"),
        (
            ["--task", "humaneval", "--data", "{short}", "--execute-generated-code"],
            "{short}:1: not a HumanEval problem: no task_id",
        ),
        (
            ["--task", "text", "--data", "{short}", "--execute-generated-code"],
            "--task text runs no code; leave --execute-generated-code out.",
        ),
        (["--task", "text", "--data", "{short}", "--samples", "2"], "2 samples at temperature 0 "),
        (["--task", "bleu", "--data", "{short}"], "Invalid value for '--task': "),
        (["--task", "text", "--data", "{short}", "--max-new-tokens", "256"], "{short}:1: the prom"),
        (
            ["--task", "text", "--data", "{short}", "--step", "5"],
            "{run}/checkpoints has no checkpo",
        ),
    ],
)
def test_mistakes_are_one_line_before_any_weight(
    trained: Path,
    short: Path,
    command: Run,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "hyper_tune.torchtune.trained.load_", lambda *_: pytest.fail("weights were loaded")
    )
    places = {"none": tmp_path / "no", "problems": DATA / "problems.jsonl", "short": short}
    places["run"] = trained

    def filled(text: str) -> str:
        for name, path in places.items():
            text = text.replace("{" + name + "}", str(path))
        return text

    output = tmp_path / "out"
    status, said, error = command(trained, *map(filled, arguments), "--output", output)
    assert (status, said) == (2, ""), error
    assert error.startswith(f"error: {filled(message)}")
    assert error.count("\n") == 1


def test_models_and_their_options_are_told_apart(
    command: Run, short: Path, tmp_path: Path, llama: dict[str, Any]
) -> None:
    asked = ("--task", "text", "--data", short)
    assert "is neither a run folder" in command(tmp_path, *asked)[2]
    folder = llama["checkpointer"]["checkpoint_dir"]
    assert "--step and --base are for runs." in command(folder, *asked, "--step", 3)[2]
