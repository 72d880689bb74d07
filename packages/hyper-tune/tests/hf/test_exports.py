"""What is saved, exported and pushed is plain LoRA in PEFT's layout; other families of models."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
)
from transformers import (
    trainer as trainer_module,
)

from hyper_tune import UserError
from hyper_tune.hf import adapt
from lowrank_adapters import import_peft_

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DECODERS = {
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    "llama": {"num_key_value_heads": 1},
}
ENCODERS = {
    "roberta": {"heads": ["classifier"], "layers": 12, "max_position_embeddings": 20},
    "deberta-v2": {
        "heads": ["pooler", "classifier"],
        "layers": 12,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 4,
        "max_position_embeddings": 20,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
}
WORDS = torch.randint(2, 40, (16, 6), generator=torch.Generator().manual_seed(0))


def decoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    more = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SMALL, **DECODERS[kind], **more), dtype=torch.float32
    )


def encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    options = {k: v for k, v in ENCODERS[kind].items() if k not in ("heads", "layers")}
    config = AutoConfig.for_model(kind, **SMALL, **options, num_labels=3)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def train(
    hf: SimpleNamespace, folder: Path, model: nn.Module, data: list[dict[str, Any]], **options: Any
) -> Any:
    adapted = adapt(model, hf.configure())
    trainer = Trainer(
        model,
        hf.arguments(folder, max_steps=8, per_device_train_batch_size=8, **options),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[adapted.callback()],
        optimizers=adapted.optimizers(lr=3e-3),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    return adapted, trainer


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=WORDS)["logits"]
    return found


@pytest.mark.parametrize("kind", DECODERS)
def test_language_model_learns_and_its_export_computes_the_same(
    hf: SimpleNamespace, tmp_path: Path, kind: str
) -> None:
    data = [{"input_ids": line, "labels": line} for line in WORDS]
    adapted, trainer = train(hf, tmp_path, decoder(kind), data)
    assert not adapted.method.modules_to_save
    assert len(adapted.method.layers) == 14
    trainer.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (config["task_type"], config["peft_type"]) == ("CAUSAL_LM", "LORA")
    fresh = decoder(kind)
    import_peft_(fresh, tmp_path / "saved")
    torch.testing.assert_close(logits(fresh), logits(adapted.model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(decoder(kind)), logits(fresh), atol=1e-3)
    ours = adapted.model.generate(WORDS[:2], max_new_tokens=4, do_sample=False)
    assert torch.equal(fresh.generate(WORDS[:2], max_new_tokens=4, do_sample=False), ours)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_learns_with_its_head_and_its_export_computes_the_same(
    hf: SimpleNamespace, tmp_path: Path, kind: str
) -> None:
    data = [{"input_ids": line, "labels": int(line[0]) % 3} for line in WORDS]
    adapted, _ = train(hf, tmp_path, encoder(kind), data)
    assert list(adapted.method.modules_to_save) == ENCODERS[kind]["heads"]
    assert len(adapted.method.layers) == ENCODERS[kind]["layers"]
    adapted.export(tmp_path / "adapter")
    fresh = encoder(kind)
    import_peft_(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), logits(adapted.model), rtol=1e-5, atol=1e-5)


def test_saving_keeps_what_else_is_in_the_folder(hf: SimpleNamespace, tmp_path: Path) -> None:
    adapted = adapt(decoder("llama"), hf.configure())
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        adapted.model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.txt",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    adapted.model.save_pretrained(tmp_path / "other rank", is_main_process=False)
    assert not (tmp_path / "other rank").exists()
    with pytest.raises(UserError, match=r"push_to_hub=True\) is not offered; use push_to_hub"):
        adapted.model.save_pretrained(tmp_path, push_to_hub=True)


def test_export_within_a_step_loses_no_gradient(hf: SimpleNamespace, tmp_path: Path) -> None:
    adapted = adapt(decoder("llama"), hf.configure(), total_steps=6)
    optimizer, _ = adapted.optimizers(lr=1e-2)
    loss = adapted.model(input_ids=WORDS, labels=WORDS)["loss"]
    adapted.export(tmp_path / "adapter")  # nothing has been accumulated yet
    loss = adapted.model(input_ids=WORDS, labels=WORDS)["loss"]
    loss.backward()
    with pytest.raises(UserError, match=r"a step is under way, whose gradients an export would"):
        adapted.export(tmp_path / "adapter")
    optimizer.step()
    assert adapted.steps == 1
    adapted.export(tmp_path / "adapter")


class Hub:
    """Stands for the hub: keeps what each upload would have sent."""

    def __init__(self) -> None:
        self.uploads: list[set[str]] = []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(self, *, folder_path: str, ignore_patterns: list[str], **options: Any) -> Any:
        assert "checkpoint-*" in ignore_patterns
        names = {path.name for path in Path(folder_path).iterdir()}
        self.uploads.append({n for n in names if not n.startswith(("_", "checkpoint-"))})
        return SimpleNamespace(done=lambda: True, result=lambda: None)


def test_push_sends_the_adapter_alone(
    hf: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(trainer_module, "hf_api", lambda *args, **options: hub)
    data = [{"input_ids": line, "labels": line} for line in WORDS]
    options = {"push_to_hub": True, "hub_strategy": "end", "save_strategy": "steps"}
    _, trainer = train(hf, tmp_path, decoder("qwen3"), data, **options)
    trainer.push_to_hub()
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert hub.uploads[-1] == adapter | {"README.md", "training_args.bin"}
