"""torchtune's dense text models: each is loaded, adapted, trained and exported, or refused."""

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchtune.models
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm
from transformers import AutoModelForCausalLM, Gemma2Config

from hyper_tune.cli.main import main
from hyper_tune.errors import UserError
from hyper_tune.torchtune.model_types import MODEL_TYPES, REFUSED_TYPES
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings

TOKENS = torch.arange(3, 61).reshape(2, 29)
HEAD_DIM = 12  # not hidden / heads, where a model may choose
# Those whose decoder other tests train, or that are sizes of another's; those that are refused; and
# what is no text decoder.
ELSEWHERE = {"llama3", "llama3_2", "llama3_3", "qwen2", "qwen2_5", "code_llama2"}
REFUSED = {"gemma2": "GEMMA2", "phi3": "PHI3_MINI", "phi4": "PHI4"}
OTHER = {"clip", "flux", "t5", "llama3_2_vision", "convert_weights"}
# By builder: the type of its checkpoints, the configuration of transformers, what both have more.
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama2.llama2": ("LLAMA2", "Llama", {"rms_norm_eps": 1e-5}, {}),
    "llama3_1.llama3_1": (
        "LLAMA3",
        "Llama",
        {
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {},
    ),
    "mistral.mistral": (
        "MISTRAL", "Mistral", {"rms_norm_eps": 1e-5, "sliding_window": None}, {}
    ),
    "gemma.gemma": (
        "GEMMA", "Gemma", {"head_dim": HEAD_DIM, "hidden_activation": "gelu_pytorch_tanh"},
        {"head_dim": HEAD_DIM},
    ),
}  # fmt: skip


def base_of(builder: str, folder: Path, llama: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a base of random weights, on the byte tokenizer of the tiny Llama."""
    model_type, family, hf_more, more = MODELS[builder]
    sizes = {key: value for key, value in llama["model"].items() if key != "_component_"}
    torch.manual_seed(0)
    hf = getattr(transformers, f"{family}Config")(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["embed_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        intermediate_size=sizes["intermediate_dim"],
        max_position_embeddings=sizes["max_seq_len"],
        initializer_range=0.2,
        **hf_more,
    )
    getattr(transformers, f"{family}ForCausalLM")(hf).save_pretrained(folder)
    return {
        "model": {"_component_": f"torchtune.models.{builder}", **sizes, **more},
        "tokenizer": llama["tokenizer"],
        "checkpointer": {
            **llama["checkpointer"], "checkpoint_dir": str(folder), "model_type": model_type
        },
    }  # fmt: skip


def add_adapter_(model: torch.nn.Module, folder: Path) -> None:
    """Add a LoRA folder to the weights, by hand."""
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    names = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in tensors}
    assert len(names) == 14
    for name in names:
        key = f"base_model.model.{name}.lora_"
        modules[name].weight += tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]


@pytest.mark.filterwarnings("ignore:lr_scheduler.num_warmup_steps", "ignore:the first pruning")
@pytest.mark.parametrize("builder", MODELS)
def test_a_model_is_loaded_adapted_trained_and_exported(
    tmp_path: Path, make_config: Callable[..., Path], llama: dict[str, Any], builder: str
) -> None:
    keys = base_of(builder, tmp_path / "base", llama)
    method = {"name": "hyperadalora", "init_rank": 3, "pruning": {"interval": 1}}
    config = make_config(
        **keys, max_steps=3, method=method | {"hypernetwork": {"preset": "attention-tiny"}},
        optimizer={"_component_": "torch.optim.Adam", "lr": 2e-3},
    )  # fmt: skip
    with FineTuning(RecipeSettings.from_config(OmegaConf.load(config))) as run:
        run.folder.write_text("config.yaml", config.read_text())
        with torch.no_grad():
            base = torch.cat(run.model.eval()(TOKENS), dim=1)
        run.train()
        with torch.no_grad():
            trained = torch.cat(run.model.eval()(TOKENS), dim=1)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS).logits, base, rtol=1e-5, atol=1e-5)
        assert (trained - base).abs().max() > 0.03
        add_adapter_(plain, tmp_path / "run" / "adapter")
        torch.testing.assert_close(plain(TOKENS).logits, trained, rtol=1e-5, atol=1e-5)
    merged = tmp_path / "merged"
    assert main(["export", str(tmp_path / "run"), str(merged), "--format", "merged"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(merged, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, trained, rtol=1e-5, atol=1e-5)


def test_every_model_of_torchtune_is_trained_or_refused() -> None:
    here = {module.name for module in pkgutil.iter_modules(torchtune.models.__path__)}
    trained = {builder.partition(".")[0] for builder in MODELS}
    assert here == trained | ELSEWHERE | REFUSED.keys() | OTHER
    assert set(REFUSED.values()) == REFUSED_TYPES.keys()
    assert not REFUSED_TYPES.keys() & set(MODEL_TYPES)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_not_be_right_is_refused_by_name(
    make_config: Callable[..., Path], llama: dict[str, Any], name: str
) -> None:
    model_type = REFUSED[name]
    checkpointer = {**llama["checkpointer"], "model_type": model_type}
    with pytest.raises(UserError) as error:
        RecipeSettings.from_config(OmegaConf.load(make_config(checkpointer=checkpointer)))
    assert str(error.value) == (
        f"checkpointer.model_type is {model_type}, but {REFUSED_TYPES[model_type]}; train a model "
        "of LLAMA2, LLAMA3, LLAMA3_2, MISTRAL, GEMMA, QWEN2."
    )


def test_torchtunes_gemma_2_caps_hidden_states_and_not_logits() -> None:
    # The reason for the refusal; it can go when this fails.
    norm = Gemma2FinalNorm(capping_value=30.0, embed_dim=4, eps=1e-6)
    with torch.no_grad():
        norm.rms_norm.scale.fill_(99.0)
        hidden = norm(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(hidden, torch.tensor([[30.0, 0.0, 0.0, 0.0]]), rtol=1e-4, atol=0)
    assert Gemma2Config().final_logit_softcapping == 30.0
