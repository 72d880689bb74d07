"""A run, exported as a merged model, is what lm-evaluation-harness evaluates.

It needs `lm_eval`, which is installed by `nox -s lm_eval`.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hyper_tune.cli.main import main
from hyper_tune.torchtune.trained import open_trained

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="no lm_eval; nox -s lm_eval has it"
)
TASK = """
task: own_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{answer}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def add_tokenizer(folder: Path, keys: dict[str, Any]) -> None:
    """Write a Qwen's tokenizer of bytes in the form that every folder of the hub has."""
    vocabulary = json.loads(Path(keys["tokenizer"]["path"]).read_text())
    special = json.loads(Path(keys["tokenizer"]["special_tokens_path"]).read_text())
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    names = [AddedToken(token["content"], special=True) for token in special["added_tokens"]]
    made.add_special_tokens(names)
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=end, pad_token=end
    ).save_pretrained(folder)


def test_the_harness_sees_the_runs_own_probabilities(
    tmp_path: Path,
    qwen: dict[str, Any],
    make_config: Callable[..., Path],
    run: Callable[..., None],
    records: Path,
) -> None:
    base = tmp_path / "base"
    shutil.copytree(qwen["checkpointer"]["checkpoint_dir"], base)
    add_tokenizer(base, qwen)
    keys = json.loads(json.dumps(qwen).replace(qwen["checkpointer"]["checkpoint_dir"], str(base)))
    run(make_config(**keys))
    merged = tmp_path / "merged"
    assert main(["export", str(tmp_path / "run"), str(merged), "--format", "merged"]) == 0
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own_answers.yaml").write_text(TASK.format(data=records))

    found = harness(tmp_path, merged)

    expected = log_likelihoods(tmp_path / "run", keys, records)
    assert found["perplexity,none"] == pytest.approx(
        math.exp(-sum(expected) / len(expected)), rel=1e-4
    )
    assert len(set(expected)) > 1


def harness(folder: Path, merged: Path) -> dict[str, Any]:
    """Run the command that the documentation gives, without a network; return its figures."""
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf"),
        *("--model_args", f"pretrained={merged},dtype=float32", "--device", "cpu"),
        *("--include_path", str(folder / "tasks"), "--tasks", "own_answers"),
        *("--output_path", str(folder / "harness")),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (results,) = (folder / "harness").rglob("results*.json")
    found: dict[str, Any] = json.loads(results.read_text())["results"]["own_answers"]
    return found


@torch.no_grad()
def log_likelihoods(folder: Path, keys: dict[str, Any], records: Path) -> list[float]:
    """The twin: of the run's own model, token by token of each answer and its space before."""
    opened = open_trained(folder)
    opened.load_base_()
    opened.model.set_num_output_chunks(0)
    vocabulary = json.loads(Path(keys["tokenizer"]["path"]).read_text())
    letters = {byte: letter for letter, byte in byte_letters().items()}

    def tokens(text: str) -> list[int]:
        return [vocabulary[letters[byte]] for byte in text.encode()]

    sums = []
    for line in records.read_text().splitlines():
        row = json.loads(line)
        asked, answer = tokens(row["question"]), tokens(f" {row['answer']}")
        logs = torch.log_softmax(opened.model(torch.tensor([asked + answer]))[0].double(), -1)
        sums.append(sum(float(logs[len(asked) + i - 1, t]) for i, t in enumerate(answer)))
    return sums


def byte_letters() -> dict[str, int]:
    """Which byte a letter of a byte-level tokenizer stands for (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }
