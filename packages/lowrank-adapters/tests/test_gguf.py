"""llama.cpp's file: read back, it is the update in llama.cpp's names and order of rows."""

import sys

import pytest
import torch
from torch import nn

from lowrank_adapters import SVD, DoRA, DyLoRA, LoRA, export_gguf, inject_adapters_, set_rank_

gguf = pytest.importorskip("gguf")

HEADS, KEY_VALUE_HEADS, HEAD = 4, 2, 6
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OURS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in NAMES]


class Tree(nn.Module):
    """A module that holds others at dotted names."""

    def __init__(self, leaves):
        super().__init__()
        for name, leaf in leaves.items():
            *path, last = name.split(".")
            place = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.add_module(last, leaf)


def decoder():
    width = HEADS * HEAD
    widths = {"k_proj": KEY_VALUE_HEADS * HEAD, "v_proj": KEY_VALUE_HEADS * HEAD, "up_proj": 10}
    linears = {n: nn.Linear(width, widths.get(n.rpartition(".")[2], width)) for n in OURS}
    linears["model.layers.1.mlp.down_proj"] = nn.Linear(10, width)
    return Tree(linears | {"model.embed_tokens": nn.Embedding(7, width)})


def adapted(kit, make, **options):
    model = decoder()
    layers = inject_adapters_(model, make, **options)
    kit.shaken(model)
    return layers


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


def llama_rows(update, heads):
    """Row 2 i + j of each head is row i of its half j, one row after the other."""
    out = torch.zeros_like(update)
    size = len(update) // heads
    for head in range(heads):
        for half in range(2):
            for i in range(size // 2):
                out[head * size + 2 * i + half] = update[head * size + half * (size // 2) + i]
    return out


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("make", [LoRA(rank=3, alpha=4.5), SVD(rank=3, alpha=4.5)])
def test_product_is_the_update_in_names_and_rows_of_llama_cpp(
    kit, twin, tmp_path, architecture, make
):
    layers = adapted(kit, make)
    heads = {"heads": HEADS, "key_value_heads": KEY_VALUE_HEADS}
    path = export_gguf(layers, tmp_path / "lora.gguf", architecture=architecture, **heads)
    fields, tensors = read(path)
    assert fields["general.architecture"] == architecture
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert len(tensors) == 2 * len(OURS)
    alpha = fields["adapter.lora.alpha"]
    for name, layer in layers.items():
        block, _, kind = name.removeprefix("model.layers.").partition(".")
        key = f"blk.{block}.{NAMES[kind]}.weight"
        a, b = tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"]
        assert len(a) == b.shape[1] == alpha  # llama.cpp scales by alpha / this
        if isinstance(make, SVD):
            expected = twin.update_matrix(layer.p, layer.lam, layer.q, layer.rank_mask, 1.5)
        else:
            ones = torch.ones(3)
            expected = twin.update_matrix(layer.b, ones, layer.a, ones, 1.5)
        if architecture == "llama" and kind.endswith(("q_proj", "k_proj")):
            plain = expected
            expected = llama_rows(plain, HEADS if kind.endswith("q_proj") else KEY_VALUE_HEADS)
            assert not torch.equal(expected, plain)
        found = b.double() @ a.double()
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-6)


def test_dylora_is_written_at_its_rank(kit, tmp_path):
    layers = adapted(kit, DyLoRA(rank=3, alpha=4.5), targets="up_proj")
    set_rank_(layers, 2)
    fields, tensors = read(export_gguf(layers, tmp_path / "lora.gguf", architecture="qwen2"))
    assert fields["adapter.lora.alpha"] == 2
    layer = layers["model.layers.0.mlp.up_proj"]
    assert torch.equal(tensors["blk.0.ffn_up.weight.lora_a"], layer.a[:2])
    torch.testing.assert_close(tensors["blk.0.ffn_up.weight.lora_b"], layer.b[:, :2] * 2.25)


def test_names_and_rows_of_another_model_are_those_of_transformers_first(kit, tmp_path):
    model = Tree({"layers.3.w1": nn.Linear(6, 4)})
    layers = inject_adapters_(model, LoRA(rank=2, alpha=2.0))
    kit.shaken(model)
    seen = []

    def flip(name, b):
        seen.append(name)
        return b.flip(0)

    def rename(name):
        return f"model.{name.replace('w1', 'mlp.gate_proj')}"

    path = export_gguf(
        layers, tmp_path / "a" / "lora.gguf", architecture="llama", rename=rename, transform_b=flip
    )
    _, tensors = read(path)
    assert seen == ["layers.3.w1"]
    assert torch.equal(tensors["blk.3.ffn_gate.weight.lora_b"], layers["layers.3.w1"].b.flip(0))


LLAMA_CPP = "which llama.cpp's LoRA is not for; merge it, or export the linear layers alone."


@pytest.mark.parametrize(
    ("make", "targets", "options", "text"),
    [
        (
            DoRA(rank=2, alpha=2.0),
            "q_proj",
            {},
            f"model.layers.0.self_attn.q_proj is a DoRALinear on a Linear, {LLAMA_CPP}",
        ),
        (
            LoRA(rank=2, alpha=2.0),
            "embed_tokens",
            {},
            f"model.embed_tokens is a LoRALinear on a Embedding, {LLAMA_CPP}",
        ),
        (
            LoRA(rank=2, alpha=2.0),
            "q_proj",
            {"heads": 5},
            "model.layers.0.self_attn.q_proj has 24 rows, which heads=5 does not divide into "
            "pairs; give the number of heads in the model's config.",
        ),
        (
            LoRA(rank=2, alpha=2.0),
            "k_proj",
            {"heads": 4},
            "model.layers.0.self_attn.k_proj has 12 rows, which key_value_heads=0 does not divide "
            "into pairs; give the number of key_value_heads in the model's config.",
        ),
        (
            LoRA(rank=2, alpha=2.0),
            "up_proj",
            {"rename": lambda name: name.replace("mlp", "ffn")},
            "model.layers.0.mlp.up_proj has the name model.layers.0.ffn.up_proj, which "
            "llama.cpp's llama does not know; give `rename` to the names of transformers.",
        ),
        (
            LoRA(rank=2, alpha=2.0),
            "up_proj",
            {"architecture": "mamba"},
            "architecture is 'mamba', expected one of llama, qwen2, qwen3.",
        ),
    ],
)
def test_refusal_writes_nothing(kit, tmp_path, make, targets, options, text):
    layers = adapted(kit, make, targets=targets)
    options = {"architecture": "llama"} | options
    assert kit.error_text(export_gguf, layers, tmp_path / "new" / "lora.gguf", **options) == text
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_and_no_layers(kit, tmp_path):
    path, options = tmp_path / "lora.gguf", {"architecture": "qwen2"}
    layers = adapted(kit, LoRA(rank=2, alpha=2.0), targets="up_proj")
    layers["model.layers.1.mlp.up_proj"].b.data[0, 0] = float("inf")
    assert kit.error_text(export_gguf, layers, path, **options) == (
        "model.layers.1.mlp.up_proj has factors that are not finite; nothing was written."
    )
    assert kit.error_text(export_gguf, {}, path, **options) == (
        "there are no layers to export; inject adapters first."
    )
    assert list(tmp_path.iterdir()) == []


def test_package_that_is_missing(kit, tmp_path, monkeypatch):
    layers = adapted(kit, LoRA(rank=2, alpha=2.0), targets="up_proj")
    monkeypatch.setitem(sys.modules, "gguf", None)
    text = kit.error_text(export_gguf, layers, tmp_path / "lora.gguf", architecture="qwen2")
    assert text == "the package gguf is not installed; pip install 'lowrank-adapters[gguf]'."


def test_failure_to_write_keeps_the_file_that_was_there(kit, tmp_path, monkeypatch):
    layers = adapted(kit, LoRA(rank=2, alpha=2.0), targets="up_proj")
    path = export_gguf(layers, tmp_path / "lora.gguf", architecture="qwen2")
    before = path.read_bytes()
    layers["model.layers.1.mlp.up_proj"].b.data.fill_(3)

    def fail(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match="no space left"):
        export_gguf(layers, path, architecture="qwen2")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
