"""A base in NF4: what is multiplied, trained, resumed, exported, planned and refused."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hyper_tune.errors import UserError
from hyper_tune.layout import BaseLayout
from hyper_tune.memory import stored_parts
from hyper_tune.torchtune.base_model import base_layout
from hyper_tune.torchtune.exports import export_merged
from hyper_tune.torchtune.nf4 import as_quantised, quantised
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.rehearsal import rehearse
from hyper_tune.torchtune.settings import RecipeSettings
from hyper_tune.torchtune.trained import open_trained

# Shared with scripts that torchrun starts; test modules cannot import each other.
ALLOCATIONS = runpy.run_path(str(Path(__file__).with_name("allocations.py")))
WIDTH, LAYERS, HEADS = 128, 2, 4
ConfigMaker = Callable[..., Path]
# The values that a number in NF4 can have, as QLoRA's table has them to four digits.
TABLE = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
TABLE += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, llama: dict[str, Any]) -> dict[str, Any]:
    """A Llama whose matrices are large enough for NF4's blocks."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(4)
    vocabulary = llama["model"]["vocab_size"]
    hf = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=256,
        initializer_range=0.1,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(hf).save_pretrained(folder)
    sizes = {"num_heads": HEADS, "num_kv_heads": HEADS, "embed_dim": WIDTH}
    return {
        **llama,
        "model": llama["model"] | sizes | {"intermediate_dim": 2 * WIDTH},
        "checkpointer": llama["checkpointer"] | {"checkpoint_dir": str(folder)},
        "quantize_base": True,
    }


@pytest.fixture
def config(make_config: ConfigMaker, wide: dict[str, Any]) -> Callable[..., Path]:
    """Return what writes a configuration with a base in NF4."""
    return lambda **keys: make_config(**(wide | {"max_steps": 6} | keys))


def settings_of(path: Path) -> RecipeSettings:
    return RecipeSettings.from_config(OmegaConf.load(path))


def twin(weight: Tensor) -> Tensor:
    """Quantised and dequantised number by number: 64 share a scale, 256 scales another."""
    numbers = weight.double().flatten()
    scales = torch.stack([block.abs().max() for block in numbers.split(64)])
    mean = scales.mean()
    rough = []
    for group in (scales - mean).split(256):
        factor = 128 / group.abs().max()
        rough += [float((x * factor).round().clamp(-128, 127) / factor + mean) for x in group]
    found = []
    for block, scale, coarse in zip(numbers.split(64), scales, rough, strict=True):
        for number in block / scale:
            nearest = min(TABLE, key=lambda value: abs(value - float(number)))
            found.append(nearest * coarse)
    return torch.tensor(found, dtype=torch.float64).view_as(weight)


def test_what_is_stored_is_the_twins() -> None:
    torch.manual_seed(0)
    weight = torch.randn(128, 256)
    found = quantised(weight)
    torch.testing.assert_close(found.to(torch.float32).double(), twin(weight), rtol=1e-5, atol=1e-6)
    sizes = [part.nbytes for part in stored_parts(found)]
    assert sorted(sizes) == sorted([128 * 128, 128 * 256 // 64, 4 * 2, 4, 4 * 16])
    x = torch.randn(3, 256)
    torch.testing.assert_close(
        nn.functional.linear(x, found).double(), x.double() @ twin(weight).T, rtol=1e-4, atol=1e-4
    )


def dequantised_folder(wide: dict[str, Any], folder: Path, dtype: torch.dtype) -> str:
    """A checkpoint of the numbers that the twin multiplies by, in torchtune's order of rows."""
    source = Path(wide["checkpointer"]["checkpoint_dir"])
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if "proj" in name:
            rows = torch.arange(len(weight))
            if "q_proj" in name or "k_proj" in name:
                # Where transformers has two halves of a head, torchtune has neighbouring pairs.
                rows = rows.view(HEADS, 2, -1).transpose(1, 2).flatten()
            numbers = torch.empty_like(weight)
            numbers[rows] = quantised(weight[rows].to(dtype)).to(dtype).to(weight.dtype)
            assert not torch.equal(numbers, weight)
            weights[name] = numbers
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name in ("config.json",):
        (folder / name).write_text((source / name).read_text())
    return str(folder)


def test_training_is_that_on_the_dequantised_base(
    config: Callable[..., Path], wide: dict[str, Any], run: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    plain = dequantised_folder(wide, tmp_path / "plain", torch.float32)
    sgd = {"_component_": "torch.optim.SGD", "lr": 0.05}
    logged = {}
    for name, overrides in (
        ("nf4", []),
        ("numbers", ["quantize_base=False", f"checkpointer.checkpoint_dir={plain}"]),
        ("base", ["quantize_base=False"]),
    ):
        run(config(optimizer=sgd), f"output_dir={tmp_path / name}", *overrides)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        logged[name] = [(row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]
    assert logged["nf4"] == [pytest.approx(row, rel=2e-5) for row in logged["numbers"]]
    assert logged["nf4"][0] != pytest.approx(logged["base"][0], rel=1e-3)


@pytest.mark.parametrize("name", ["hyperadalora", "hyperdora"])
def test_the_merged_export_has_the_logits_of_the_training_model(
    config: Callable[..., Path], run: Callable[..., None], tmp_path: Path, name: str
) -> None:
    method: dict[str, Any] = {"name": name, "init_rank": 4, "target_modules": ["q_proj", "w1"]}
    method["hypernetwork"] = {"preset": "attention-small"}
    if name == "hyperadalora":
        method |= {"budget": 2, "pruning": {"interval": 3}}
    run(config(method=method, optimizer={"_component_": "torch.optim.Adam", "lr": 0.01}))
    trained = open_trained(tmp_path / "run")
    export_merged(trained, tmp_path / "merged")
    trained.load_base_()
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        expected = torch.cat(trained.model(tokens), dim=1)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert (expected - expected.mean()).abs().max() > 1


def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(
    config: Callable[..., Path], run: Callable[..., None], tmp_path: Path
) -> None:
    path = config(save_every_n_steps=3)
    state = "checkpoints/step-00000006/state.safetensors"
    run(path, f"output_dir={tmp_path / 'whole'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hyper_tune.torchtune.recipe.FineTuning._count_skipped", stop_at(4))
        with pytest.raises(KeyboardInterrupt):
            run(path, f"output_dir={tmp_path / 'parts'}")
    run(path, f"output_dir={tmp_path / 'parts'}", "resume_from_checkpoint=True")
    whole, parts = (load_file(tmp_path / name / state) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(UserError, match="quantize_base was True and is now False"):
        run(
            path,
            f"output_dir={tmp_path / 'parts'}",
            "resume_from_checkpoint=True",
            "quantize_base=False",
        )


def stop_at(step: int) -> Callable[..., None]:
    def count(run: Any, _: object) -> None:
        if run.step == step:
            raise KeyboardInterrupt

    return count


def test_the_order_of_rows_does_not_change_the_numbers() -> None:
    torch.manual_seed(1)
    weight = torch.randn(256, 128)
    order = torch.randperm(256)
    in_file = weight[order]
    expected = quantised(weight).to(torch.float32)[order]
    assert torch.equal(as_quantised(in_file, torch.float32, lambda rows: rows[order]), expected)
    assert not torch.equal(as_quantised(in_file, torch.float32, lambda rows: rows), expected)


def test_a_matrix_that_does_not_fill_whole_blocks_is_refused_by_name(
    make_config: ConfigMaker,
) -> None:
    with (
        pytest.raises(UserError) as caught,
        FineTuning(settings_of(make_config(quantize_base=True))),
    ):
        pass
    assert str(caught.value) == (
        "quantize_base is set, but layers.0.attn.q_proj is (32, 32), and NF4 takes multiples of "
        "16384 numbers; set quantize_base=False."
    )


def test_shards_of_a_base_in_nf4_are_refused(config: Callable[..., Path]) -> None:
    settings = settings_of(config())
    with pytest.raises(UserError) as caught:
        base_layout(settings, 4)
    assert str(caught.value) == (
        "quantize_base is set, and the base would be sharded over 4 processes, which NF4 weights "
        "are not; run one process, set data_parallel_shard_dim=1 and data_parallel_replicate_dim "
        "to their number, or set quantize_base=False."
    )
    assert base_layout(settings, 1).shard == 1


def test_two_processes_that_each_hold_the_base_train_on_a_stream_and_log_as_one(
    config: Callable[..., Path], run: Callable[..., None], records: Path, tmp_path: Path
) -> None:
    dataset = {
        "_component_": "hyper_tune.torchtune.streaming.StreamedDataset",
        "source": "json",
        "data_files": str(records),
        "shuffle_buffer": 5,
    }
    logger = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(tmp_path),
        "filename": "log",
    }
    sgd = {"_component_": "torch.optim.SGD", "lr": 0.05}
    path = config(dataset=dataset, optimizer=sgd, metric_logger=logger, log_every_n_steps=3)
    run(path, f"output_dir={tmp_path / 'one'}")
    (tmp_path / "log").rename(tmp_path / "log-of-one")
    tune = str(Path(sys.executable).with_name("tune"))
    command = [tune, "run", "--nproc_per_node", "2", "hyper-tune/hyperadalora_full"]
    overrides = [
        *("gradient_accumulation_steps=1", f"output_dir={tmp_path / 'two'}"),
        *("data_parallel_shard_dim=1", "data_parallel_replicate_dim=2"),
    ]
    finished = subprocess.run(
        [*command, "--config", str(path), *overrides],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for expected, found in zip(one, two, strict=True):
        assert found["tokens"] == expected["tokens"]
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=2e-5)
    logged = [(tmp_path / name).read_text().count("Step ") for name in ("log-of-one", "log")]
    assert logged == [2, 2]
    assert len(re.findall(r"^step \d/6: loss ", finished.stderr, re.M)) == 2


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_plan_is_within_a_fiftieth_of_what_a_real_step_takes(
    config: Callable[..., Path], tmp_path: Path, dtype: str, checkpointing: bool
) -> None:
    path = tmp_path / "even.jsonl"
    rows = [{"question": f"What is {n:03d}?", "answer": "x" * 60} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_of(
        config(
            dtype=dtype,
            gradient_accumulation_steps=1,
            method={"name": "lora", "init_rank": 1},
            enable_activation_checkpointing=checkpointing,
            dataset={
                "_component_": "hyper_tune.torchtune.data.file_dataset",
                "path": str(path),
            },
        )
    )
    with FineTuning(settings) as run:
        length = len(run.data.order.samples[0]["tokens"])
        run._optimize()
        run.step += 1
        state = [value for entry in run.optimizer.state.values() for value in entry.values()]
        there = [
            *(part for p in run.model.parameters() for part in stored_parts(p)),
            *run.model.buffers(),
            *run.method.owner.state_dict().values(),
            *state,
            run.method.stack.values,
            run.method.stack.grads,
        ]
        held = ALLOCATIONS["storage_bytes"](there)
        measured = held + ALLOCATIONS["allocated_at_most"](run._optimize)
    rehearsal = rehearse(settings, length)
    planned = rehearsal.memory(BaseLayout(1, 1))
    assert sum(planned.values()) == pytest.approx(measured, rel=0.02)
    wide = {"fp32": 4, "bf16": 2}[dtype]
    matrices = LAYERS * (4 * WIDTH * WIDTH + 3 * 2 * WIDTH * WIDTH)
    others = rehearsal.base_parameters - matrices
    # Half a byte a number, a byte for 64, and a number for each 256 of those; few for each matrix.
    expected = matrices // 2 + matrices // 64 + matrices // 64 // 256 * wide + others * wide
    assert planned["base weights"] == expected + LAYERS * 7 * (16 + 1) * wide
