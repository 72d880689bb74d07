"""Tiny checkpoints of both model families, made on the spot, and configurations that train them."""

import base64
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tokenizers.pre_tokenizers import ByteLevel
from torchtune.models.llama3._tokenizer import SPECIAL_TOKENS
from torchtune.models.qwen2_5._tokenizer import QWEN2_5_SPECIAL_TOKENS
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hyper_tune.cli.main import main
from hyper_tune.torchtune.cli import main as tune
from hyper_tune.torchtune.fine_tune import fine_tune

SIZES = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "feed_forward": 48, "length": 256}


def _save_special_tokens(folder: Path, names: list[str]) -> int:
    tokens = [{"content": name, "id": 256 + index} for index, name in enumerate(names)]
    (folder / "special_tokens.json").write_text(json.dumps({"added_tokens": tokens}))
    return 256 + len(names)


def _hf_config(vocabulary: int, seed: int, *, tied: bool = False) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "vocab_size": vocabulary,
        "hidden_size": SIZES["hidden"],
        "num_hidden_layers": SIZES["layers"],
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv_heads"],
        "intermediate_size": SIZES["feed_forward"],
        "max_position_embeddings": SIZES["length"],
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
    }


def _component(name: str, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "_component_": name,
        "vocab_size": vocabulary,
        "num_layers": SIZES["layers"],
        "num_heads": SIZES["heads"],
        "num_kv_heads": SIZES["kv_heads"],
        "embed_dim": SIZES["hidden"],
        "intermediate_dim": SIZES["feed_forward"],
        "max_seq_len": SIZES["length"],
        **more,
    }


def _save_llama_tokenizer(folder: Path) -> tuple[dict[str, Any], int]:
    ranks = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "tokenizer.model").write_text("\n".join(ranks) + "\n")
    vocabulary = _save_special_tokens(folder, list(SPECIAL_TOKENS))
    component = {
        "_component_": "torchtune.models.llama3.llama3_tokenizer",
        "path": str(folder / "tokenizer.model"),
        "special_tokens_path": str(folder / "special_tokens.json"),
    }
    return component, vocabulary


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration of a Llama of 30 thousand random weights with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer, vocabulary = _save_llama_tokenizer(folder)
    hf = LlamaConfig(**_hf_config(vocabulary, 0), rms_norm_eps=1e-5, rope_theta=500_000.0)
    LlamaForCausalLM(hf).save_pretrained(folder)
    return {
        "model": _component("torchtune.models.llama3.llama3", vocabulary),
        "tokenizer": tokenizer,
        "checkpointer": _checkpointer(folder, "LLAMA3"),
    }


@pytest.fixture(scope="session")
def llama3_2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of a Llama 3.2, with one table of embeddings for input and output, and its rotation.

    Of a head's four rotations, one is slowed 32 times, one less, two not at all.
    """
    folder = tmp_path_factory.mktemp("llama3_2")
    tokenizer, vocabulary = _save_llama_tokenizer(folder)
    rotation = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf = LlamaConfig(
        **_hf_config(vocabulary, 2, tied=True), rms_norm_eps=1e-5, rope_parameters=rotation
    )
    LlamaForCausalLM(hf).save_pretrained(folder)
    return {
        "model": _component("torchtune.models.llama3_2.llama3_2", vocabulary),
        "tokenizer": tokenizer,
        "checkpointer": _checkpointer(folder, "LLAMA3_2"),
    }


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration of a Qwen of 30 thousand random weights with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    letters = sorted(ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    vocabulary = _save_special_tokens(folder, list(QWEN2_5_SPECIAL_TOKENS))
    hf = Qwen2Config(**_hf_config(vocabulary, 1), rms_norm_eps=1e-6, rope_theta=1_000_000.0)
    Qwen2ForCausalLM(hf).save_pretrained(folder)
    more = {"norm_eps": 1e-6, "rope_base": 1_000_000.0, "tie_word_embeddings": False}
    return {
        "model": _component("torchtune.models.qwen2.qwen2", vocabulary, **more),
        "tokenizer": {
            "_component_": "torchtune.models.qwen2_5.qwen2_5_tokenizer",
            "path": str(folder / "vocab.json"),
            "merges_file": str(folder / "merges.txt"),
            "special_tokens_path": str(folder / "special_tokens.json"),
        },
        "checkpointer": _checkpointer(folder, "QWEN2"),
    }


@pytest.fixture(scope="session")
def tied_qwen(tmp_path_factory: pytest.TempPathFactory, qwen: dict[str, Any]) -> dict[str, Any]:
    """A Qwen as 2.5's small ones are: one table for input and output; its weights in two files."""
    folder = tmp_path_factory.mktemp("tied_qwen")
    hf = Qwen2Config(
        **_hf_config(qwen["model"]["vocab_size"], 3, tied=True),
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
    )
    Qwen2ForCausalLM(hf).save_pretrained(folder, max_shard_size="60KB")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    return {
        **qwen,
        "model": {**qwen["model"], "tie_word_embeddings": True},
        "checkpointer": _checkpointer(folder, "QWEN2") | {"checkpoint_files": files},
    }


def _checkpointer(folder: Path, model_type: str) -> dict[str, Any]:
    return {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(folder),
        "checkpoint_files": ["model.safetensors"],
        "model_type": model_type,
    }


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-two questions of unequal length, with answers."""
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    rows = [
        {"question": f"What is {a} plus {a * a}?", "answer": f"{a + a * a} " + "!" * (a % 5)}
        for a in range(22)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ConfigMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def write_config(llama: dict[str, Any], records: Path) -> ConfigMaker:
    """Return what writes a configuration file into a folder; keywords override its keys."""

    def write(folder: Path, **overrides: Any) -> Path:
        config = {
            "output_dir": str(folder / "run"),
            **llama,
            "method": {
                "name": "hyperadalora",
                "init_rank": 4,
                "budget": 2,
                "hypernetwork": {"preset": "attention-small"},
                "pruning": {"interval": 3},
            },
            "dataset": {
                "_component_": "hyper_tune.torchtune.data.file_dataset",
                "path": str(records),
            },
            "optimizer": {"_component_": "torch.optim.Adam", "lr": 1e-3},
            "lr_scheduler": {
                "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 2,
            },
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 12,
            "save_every_n_steps": 4,
            "epochs": 10,
        }
        config.update(overrides)
        path = folder / "config.yaml"
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        return path

    return write


@pytest.fixture
def make_config(tmp_path: Path, write_config: ConfigMaker) -> ConfigMaker:
    """Return what writes a configuration file; keyword arguments override its keys."""
    return partial(write_config, tmp_path)


def run_in_process(config: Path, *overrides: str) -> None:
    """Run a configuration in this process, without the command line."""
    merged = OmegaConf.merge(OmegaConf.load(config), OmegaConf.from_dotlist(list(overrides)))
    fine_tune(cast("DictConfig", merged))


@pytest.fixture(scope="session")
def run() -> Callable[..., None]:
    """Return what runs a configuration in this process."""
    return run_in_process


@pytest.fixture
def fails(
    make_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Return what runs the command, expects status 2, and returns the message."""

    def run(*overrides: str, config: str | None = None, **keys: Any) -> str:
        chosen = config or str(make_config(**keys))
        monkeypatch.setattr(sys, "argv", ["recipe", "--config", chosen, *overrides])
        with pytest.raises(SystemExit) as stop:
            tune()
        said = capsys.readouterr().err
        assert stop.value.code == 2, said
        assert "Traceback" not in said
        message = said[said.index("error: ") :]
        return message.removeprefix("error: ").rstrip()

    return run


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch from starting threads for matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what runs a command that succeeds, and returns what it prints."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        status = main([str(word) for word in arguments])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what runs a command that is refused, and returns its one line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
        return printed.err.removeprefix("error: ").rstrip()

    return run
