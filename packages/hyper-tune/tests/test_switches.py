"""Each switch of a configuration does what it says."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from torchtune.modules import TransformerSelfAttentionLayer

from hyper_tune.errors import UserError
from hyper_tune.torchtune.loss import cross_entropy_sum
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings

FILE_DATASET = "hyper_tune.torchtune.data.file_dataset"
LAYERS, MICRO_BATCHES = 2, 2


def settings_of(config: Path) -> RecipeSettings:
    return RecipeSettings.from_config(OmegaConf.load(config))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def mean_loss(logits: Tensor, labels: list[int]) -> float:
    """The mean of -log softmax(logits)[label] of the next label, in float64, one at a time."""
    losses = [
        -torch.log_softmax(logits[position - 1].double(), dim=0)[label]
        for position, label in enumerate(labels)
        if label != -100
    ]
    return float(sum(losses) / len(losses))


@pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.bfloat16, 1e-6), (torch.float32, 1e-6), (torch.float64, 1e-14)]
)
def test_the_loss_is_computed_in_float32_or_better(dtype: torch.dtype, rel: float) -> None:
    torch.manual_seed(0)
    logits = 4 * torch.randn(1, 9, 50, dtype=torch.float64).to(dtype)
    labels = torch.randint(50, (9,))
    found = cross_entropy_sum(logits.chunk(2, dim=1), labels.unsqueeze(0))
    expected = mean_loss(logits[0], [-100, *labels.tolist()]) * 9
    assert float(found) == pytest.approx(expected, rel=rel)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torchtune's norm
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dtype_is_the_bases_and_no_others(
    tmp_path: Path, make_config: Callable[..., Path], dtype: str
) -> None:
    settings = settings_of(
        make_config(dtype=dtype, shuffle=False, batch_size=1, gradient_accumulation_steps=1)
    )
    expected = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    saved = load_file(f"{settings.checkpointer['checkpoint_dir']}/model.safetensors")
    with FineTuning(settings) as run:
        factors = {id(leaf) for leaf in run.method.stack.leaf_parameters()}
        base = [p for p in run.model.parameters() if id(p) not in factors]
        assert {p.dtype for p in base} == {expected}
        embeddings = saved["model.embed_tokens.weight"].to(expected)
        assert torch.equal(run.model.tok_embeddings.weight, embeddings)
        assert {p.dtype for p in run.method.parameters()} == {torch.float32}
        assert {p.dtype for p in run.method.stack.leaf_parameters()} == {torch.float32}
        sample = run.data.order.samples[0]
        with torch.no_grad():
            logits = torch.cat(run.model(torch.tensor([sample["tokens"]])), dim=1)[0]
        assert logits.dtype == expected
        run.train()
    first = rows(tmp_path / "run")[0]["loss"]
    assert first == pytest.approx(mean_loss(logits, sample["labels"]), rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_checkpointing_runs_each_block_once_more(
    make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    calls: Counter[str] = Counter()
    forward = TransformerSelfAttentionLayer.forward

    def counted(self: Any, *arguments: Any, **keys: Any) -> Any:
        calls["forward"] += 1
        return forward(self, *arguments, **keys)

    monkeypatch.setattr(TransformerSelfAttentionLayer, "forward", counted)
    settings = settings_of(make_config(enable_activation_checkpointing=checkpointing))
    with FineTuning(settings) as run:
        run.train()
    assert calls["forward"] == 12 * MICRO_BATCHES * LAYERS * (2 if checkpointing else 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_compiled_and_checkpointed_layers_train_as_the_others_do(
    tmp_path: Path, make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(keep, name="kept")
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "kept")
    path = tmp_path / "equally_long.jsonl"  # so that a layer is compiled once
    pairs = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(10, 22)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    logged = []
    for on in (False, True):
        config = make_config(
            compile=on,
            enable_activation_checkpointing=on,
            output_dir=str(tmp_path / str(on)),
            dataset={"_component_": FILE_DATASET, "path": str(path)},
            max_steps=4,
        )
        with FineTuning(settings_of(config)) as run:
            run.train()
        assert bool(graphs) is on
        logged.append([row["loss"] for row in rows(tmp_path / str(on))])
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("scaled_dot_product_attention" in target for target in targets)
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
    assert len(set(logged[0])) == 4


def train_with_bad_steps(config: Path, bad_steps: set[int]) -> None:
    """Train with logits that are not numbers in all micro-batches of some steps, from 1."""
    passes: Counter[str] = Counter()

    def spoil(model: torch.nn.Module, _: Any, logits: list[Tensor]) -> list[Tensor]:
        step = passes["all"] // MICRO_BATCHES + 1
        passes["all"] += 1
        return [part * float("nan") for part in logits] if step in bad_steps else logits

    with FineTuning(settings_of(config)) as run:
        run.model.register_forward_hook(spoil)
        run.train()


@pytest.mark.filterwarnings("ignore:the pruning schedule leaves")
def test_only_skipped_steps_in_a_row_end_a_run(
    tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    bad = {2, 3, 5, 7, 8, 10, 11}
    train_with_bad_steps(make_config(max_skipped_steps=3), bad)
    assert {row["step"] for row in rows(tmp_path / "run") if row["skipped"]} == bad
    assert len(rows(tmp_path / "run")) == 12

    config = make_config(max_skipped_steps=3, output_dir=str(tmp_path / "three"))
    message = r"steps 7 to 9 had no finite loss or gradient \(max_skipped_steps is 3\)"
    with pytest.raises(UserError, match=message):
        train_with_bad_steps(config, {2, 3, 5, 7, 8, 9})
    assert [row["step"] for row in rows(tmp_path / "three")] == list(range(1, 10))
