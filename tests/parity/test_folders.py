"""Folders that either writes are read by the other, with equal logits."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    LoRA,
    PrincipalWeights,
    adapted_layers,
    convert_to_lora_,
    export_peft,
    import_peft_,
    inject_adapters_,
    merged,
    set_rank_,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    # PEFT takes the masks of AdaLoRA for LoRA's ranks, in its own files too.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]
MODELS = ("llama", "qwen2", "roberta", "deberta-v3")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def ours_with(kit, name, make, masks=()):
    """Our layers off their start, with these components pruned in the first few of them."""
    model = kit.build(name)
    layers = inject_adapters_(model, make, kit.TARGETS[name])
    kit.shake_factors(layers)
    for layer, mask in zip(layers.values(), masks, strict=False):
        layer.rank_mask.copy_(torch.tensor(mask))
    return model, layers


def read_by_peft(kit, name, folder):
    return PeftModel.from_pretrained(kit.build(name), folder).eval()


def logits(model, batch):
    with torch.no_grad():
        return model(batch).logits


MASKS = ([True, False, True, True], [False] * 4, [True, True, False, False])
OURS = {
    "lora": (LoRA(4, 6.0), ()),
    "rslora": (LoRA(4, 6.0, rslora=True), ()),
    "pissa": (LoRA(4, 6.0, start=PrincipalWeights()), ()),
    "dora": (DoRA(4, 6.0), ()),
    "adalora": (SVD(4, 6.0), ()),
    "adalora pruned": (SVD(4, 6.0), MASKS),
}
FORMS = [(method, form) for method in OURS for form in ("padded", "compact")]
FORMS += [("adalora", "adalora"), ("adalora pruned", "adalora")]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("method", "form"), FORMS)
def test_peft_reads_what_we_write(kit, tmp_path, name, method, form):
    model, layers = ours_with(kit, name, *OURS[method])
    batch = kit.tokens()
    expected, plain = logits(model, batch), logits(kit.build(name), batch)
    folder = export_peft(layers, tmp_path / "adapter", form=form)
    assert (expected - plain).abs().max() > 1e-2
    theirs = read_by_peft(kit, name, folder)
    torch.testing.assert_close(logits(theirs, batch), expected, **TOLERANCE)
    again = kit.build(name)
    import_peft_(again, folder)
    torch.testing.assert_close(logits(again, batch), expected, **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "adalora"])
def test_we_read_what_peft_writes(kit, tmp_path, name, method):
    theirs = kit.with_peft(name, method)
    theirs.save_pretrained(tmp_path)
    batch = kit.tokens()
    ours = kit.build(name)
    import_peft_(ours, tmp_path)
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), **TOLERANCE)


def prune(theirs, budget):
    """Let PEFT's allocator mask the least important components, and end its schedule."""
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    config = theirs.peft_config["default"]
    config.total_step, config.tinit, config.tfinal, config.target_r = 10, 0, 5, budget
    allocator = theirs.base_model.rankallocator
    allocator._set_budget_scheduler(theirs.base_model.model)
    theirs.base_model.update_and_allocate(4)
    theirs.base_model.update_and_allocate(5)
    return theirs


@pytest.mark.parametrize("budget", [2, 0.25])
def test_we_read_what_pefts_allocator_pruned(kit, tmp_path, budget):
    theirs = prune(kit.with_peft("llama", "adalora"), budget)
    theirs.save_pretrained(tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {name.removesuffix(".lora_E"): sum(mask) for name, mask in pattern.items()}
    assert sum(ranks.values()) == 8 * budget
    assert len(set(ranks.values())) > 1
    batch = kit.tokens()
    ours = kit.build("llama")
    layers = import_peft_(ours, tmp_path)
    assert {name: int(layer.rank_mask.sum()) for name, layer in layers.items()} == ranks
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), **TOLERANCE)
    convert_to_lora_(ours)
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), **TOLERANCE)
    assert list(adapted_layers(ours)) == [name for name in layers if ranks[name]]


def test_patterns_of_rank_and_alpha(kit, tmp_path):
    options = {
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 20, "gate_proj": 3},
    }
    theirs = kit.with_peft("llama", "rslora", **options)
    theirs.save_pretrained(tmp_path)
    ours, batch = kit.build("llama"), kit.tokens()
    layers = import_peft_(ours, tmp_path)
    assert {layer.rank for layer in layers.values()} == {2, 4, 6}
    assert {layer.alpha for layer in layers.values()} == {3.0, 6.0, 20.0}
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), **TOLERANCE)


@pytest.mark.parametrize("rank", [1, 3])
def test_dylora_is_written_at_the_rank_that_it_is_at(kit, tmp_path, rank):
    model, layers = ours_with(kit, "llama", DyLoRA(4, 6.0))
    set_rank_(layers, rank)
    folder = export_peft(layers, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank
    batch = kit.tokens()
    theirs = read_by_peft(kit, "llama", folder)
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), **TOLERANCE)


@pytest.mark.parametrize("name", ["roberta", "deberta-v3"])
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_classification_head_that_peft_trained(kit, tmp_path, name, method):
    theirs = kit.with_peft(name, method, task_type="SEQ_CLS")
    kit.shaken(theirs, names=("modules_to_save",))
    theirs.save_pretrained(tmp_path)
    ours, batch = kit.build(name), kit.tokens()
    import_peft_(ours, tmp_path)
    plain = dict(kit.build(name).classifier.named_parameters())
    for key, tensor in ours.classifier.named_parameters():
        assert not torch.equal(tensor, plain[key]), key
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), **TOLERANCE)


@pytest.mark.parametrize("name", ["roberta", "deberta-v3"])
@pytest.mark.parametrize("form", ["padded", "adalora"])
def test_classification_head_that_we_trained(kit, tmp_path, name, form):
    model, layers = ours_with(kit, name, SVD(4, 6.0), MASKS)
    kit.shaken(model, names=("classifier",))
    head = {"classifier": model.classifier}
    folder = export_peft(
        layers, tmp_path / "adapter", form=form, modules_to_save=head, task_type="SEQ_CLS"
    )
    batch = kit.tokens()
    theirs = read_by_peft(kit, name, folder)
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), **TOLERANCE)
    again = kit.build(name)
    import_peft_(again, folder)
    torch.testing.assert_close(logits(again, batch), logits(model, batch), **TOLERANCE)


def test_embedding_of_a_transformer_whose_weight_peft_saves_too(kit, tmp_path):
    config = kit.peft_config("lora", ["embed_tokens", "v_proj"])
    theirs = kit.shaken(get_peft_model(kit.build("llama"), config)).eval()
    theirs.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys
    ours, batch = kit.build("llama"), kit.tokens()
    import_peft_(ours, tmp_path)
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), **TOLERANCE)


class Mixed(nn.Module):
    """Every kind of module that LoRA is for, but transformers' Conv1D."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.line = nn.Conv1d(12, 8, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(8, 9, (3, 1), padding="same")
        self.linear = nn.Linear(9, 5)

    def forward(self, x):
        line = torch.tanh(self.line(self.embedding(x).mT))
        plane = torch.tanh(self.plane(line[:, :, None]))
        return self.linear(plane.mean((2, 3)))


KINDS = ["embedding", "line", "plane", "linear"]


def mixed():
    torch.manual_seed(0)
    return Mixed()


@pytest.mark.parametrize("form", ["padded", "compact"])
def test_every_kind_of_module_that_we_wrote(kit, tmp_path, form):
    model = mixed()
    make = LoRA(4, 6.0)
    layers = inject_adapters_(model, make, KINDS, rank_pattern={"line": 2, "linear": 3})
    kit.shake_factors(layers)
    folder = export_peft(layers, tmp_path / "adapter", form=form)
    x = torch.arange(11).reshape(1, 11)
    theirs = PeftModel.from_pretrained(mixed(), folder)
    torch.testing.assert_close(theirs(x), model(x), **TOLERANCE)
    again = mixed()
    import_peft_(again, folder)
    torch.testing.assert_close(again(x), model(x), **TOLERANCE)


def test_every_kind_of_module_that_peft_wrote(kit, tmp_path):
    theirs = get_peft_model(mixed(), kit.peft_config("rslora", KINDS))
    kit.shaken(theirs)
    theirs.save_pretrained(tmp_path)
    ours = mixed()
    assert list(import_peft_(ours, tmp_path)) == KINDS
    x = torch.arange(11).reshape(1, 11)
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)


@pytest.mark.parametrize("kind", [BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding])
def test_embedding_that_transformers_scales(kit, tmp_path, kind):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(kind(11, 12, 1, embed_scale=3.3), nn.Linear(12, 5))

    theirs = get_peft_model(build(), kit.peft_config("lora", ["0"]))
    kit.shaken(theirs)
    theirs.save_pretrained(tmp_path)
    ours, x = build(), torch.arange(2, 11)
    import_peft_(ours, tmp_path)
    assert (theirs(x) - build()(x)).abs().max() > 0.1
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)
    with merged(ours):
        torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)


def test_convolution_of_pefts_adalora(kit, tmp_path):
    theirs = get_peft_model(mixed(), kit.peft_config("adalora", ["plane", "linear"]))
    kit.shaken(theirs)
    theirs.save_pretrained(tmp_path)
    ours = mixed()
    import_peft_(ours, tmp_path)
    x = torch.arange(11).reshape(1, 11)
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)


def test_convolution_of_our_adalora(kit, tmp_path):
    model = mixed()
    layers = inject_adapters_(model, SVD(4, 6.0), ["plane", "linear"])
    kit.shake_factors(layers)
    layers["plane"].rank_mask[0] = False
    folder = export_peft(layers, tmp_path / "adapter", form="adalora")
    x = torch.arange(11).reshape(1, 11)
    theirs = PeftModel.from_pretrained(mixed(), folder)
    torch.testing.assert_close(theirs(x), model(x), **TOLERANCE)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make", [LoRA(4, 6.0), DoRA(4, 6.0), SVD(4, 6.0)])
def test_layers_that_keep_their_weight_transposed(kit, tmp_path, make):
    model = gpt2()
    layers = inject_adapters_(model, make)
    assert len(layers) == 8
    kit.shake_factors(layers)
    form = "adalora" if isinstance(make, SVD) else "padded"
    folder = export_peft(layers, tmp_path / "ours", form=form)
    batch = kit.tokens()
    theirs = PeftModel.from_pretrained(gpt2(), folder).eval()
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), **TOLERANCE)
    theirs.save_pretrained(tmp_path / "theirs")
    again = gpt2()
    import_peft_(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again, batch), logits(model, batch), **TOLERANCE)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapter_whose_start_changed_the_base_is_refused(kit, tmp_path, start):
    theirs = kit.with_peft("llama", "lora", init_lora_weights=start)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"init_lora_weights is '{start}', which changes the base"):
        import_peft_(kit.build("llama"), tmp_path)


def test_names_of_adalora_have_no_weight(kit, tmp_path):
    """PEFT's own names of the same method, which ours have to equal."""
    kit.with_peft("llama", "adalora").save_pretrained(tmp_path / "theirs")
    _, layers = ours_with(kit, "llama", SVD(4, 6.0))
    export_peft(layers, tmp_path / "ours", form="adalora")
    theirs, ours = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours")
    )
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}
