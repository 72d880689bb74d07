"""The export: its product is the update itself; a folder is replaced as a whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lowrank_adapters import SVD, LoRA, export_peft

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def read(folder):
    return load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def pair(tensors, name):
    key = f"{PREFIX}{name}"
    return tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]


def svd_layers(kit, live):
    """Two layers of rank 3 with as many live components as given."""
    _, layers = kit.adapted(blocks=1, targets=["q_proj", "w1"])
    for layer, count in zip(layers.values(), live, strict=True):
        layer.rank_mask.copy_(torch.tensor([True, False, True])[:3] if count == 2 else count > 0)
        assert int(layer.rank_mask.sum()) == count
    return layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_product_of_the_exported_tensors_is_the_update(twin, kit, tmp_path, dtype):
    _, layers = kit.adapted(factor_dtype=dtype)
    tensors, config = read(export_peft(layers, tmp_path / "adapter"))
    rank = max(int(layer.rank_mask.sum()) for layer in layers.values())
    assert config["lora_alpha"] / config["r"] == 1
    assert config["r"] == rank
    assert len({int(layer.rank_mask.sum()) for layer in layers.values()}) > 1
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        a, b = pair(tensors, name)
        assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
        assert a.shape == (rank, layer.in_features)
        assert b.shape == (layer.out_features, rank)
        expected = twin.update_matrix(layer.p, layer.lam, layer.q, layer.rank_mask, 4.5 / 3)
        torch.testing.assert_close(b.double() @ a.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_reader_that_scales_by_alpha_over_r_computes_what_the_model_does(kit, tmp_path):
    model, layers = kit.adapted()
    words = torch.arange(11)
    expected = model(words)
    tensors, config = read(export_peft(layers, tmp_path / "adapter"))
    plain = kit.Decoder()
    state = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    with torch.no_grad():
        for name in layers:
            a, b = pair(tensors, name)
            plain.get_submodule(name).weight.add_(b @ a, alpha=config["lora_alpha"] / config["r"])
    torch.testing.assert_close(plain(words), expected, rtol=1e-4, atol=1e-4)


def test_lora_is_exported_with_its_scaling_in_b(kit, tmp_path):
    _, layers = kit.adapted(LoRA(rank=3, alpha=4.5))
    tensors, config = read(export_peft(layers, tmp_path / "adapter"))
    assert config["r"] == config["lora_alpha"] == 3
    for name, layer in layers.items():
        a, b = pair(tensors, name)
        assert torch.equal(a, layer.a)
        assert torch.equal(b, layer.b * 1.5)


@pytest.mark.parametrize(("live", "rank"), [((3, 2), 3), ((2, 0), 2), ((0, 0), 1)])
def test_matrices_are_padded_with_zeros_to_the_largest_live_rank(kit, tmp_path, live, rank):
    layers = svd_layers(kit, live)
    tensors, config = read(export_peft(layers, tmp_path / "adapter"))
    assert config["r"] == config["lora_alpha"] == rank
    for (name, layer), count in zip(layers.items(), live, strict=True):
        a, b = pair(tensors, name)
        assert a.shape == (rank, layer.in_features)
        assert b.shape == (layer.out_features, rank)
        assert torch.equal(a[:count], layer.q[layer.rank_mask])
        assert torch.equal(a[count:], torch.zeros(rank - count, layer.in_features))
        assert torch.equal(b[:, count:], torch.zeros(layer.out_features, rank - count))


def test_config_has_exactly_these_keys(kit, tmp_path):
    layers = svd_layers(kit, (3, 2))
    options = {"base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM"}
    folder = export_peft(layers, tmp_path / "adapter", **options)
    assert read(folder)[1] == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 3,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["layers.0.q_proj", "layers.0.mlp.w1"],
        "modules_to_save": None,
    }
    plain = read(export_peft(layers, tmp_path / "plain"))[1]
    assert (plain["base_model_name_or_path"], plain["task_type"]) == (None, None)
    assert sorted(contents(folder)) == [CONFIG, TENSORS]
    with safe_open(folder / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_rename_and_transform(kit, tmp_path):
    layers = svd_layers(kit, (3, 2))
    seen = []

    def flip(name, b):
        seen.append((name, tuple(b.shape)))
        return b.flip(0)

    plain, _ = read(export_peft(layers, tmp_path / "plain"))
    tensors, config = read(
        export_peft(layers, tmp_path / "other", rename="model.{}".format, transform_b=flip)
    )
    assert config["target_modules"] == [f"model.{name}" for name in layers]
    assert seen == [("layers.0.q_proj", (5, 3)), ("layers.0.mlp.w1", (7, 2))]
    assert len(tensors) == len(plain)
    for name in layers:
        a, b = pair(plain, name)
        other_a, other_b = pair(tensors, f"model.{name}")
        assert torch.equal(other_a, a)
        assert torch.equal(other_b, b.flip(0))


def test_an_earlier_export_is_replaced_as_a_whole(kit, tmp_path):
    folder = export_peft(svd_layers(kit, (3, 2)), tmp_path / "adapter")
    (folder / "notes.txt").write_text("of the first export")
    layers = svd_layers(kit, (2, 0))
    export_peft(layers, str(folder))
    tensors, config = read(folder)
    assert config["r"] == 2
    assert torch.equal(pair(tensors, "layers.0.q_proj")[0], layers["layers.0.q_proj"].q[[0, 2]])
    assert sorted(contents(folder)) == [CONFIG, TENSORS]
    assert names_in(tmp_path) == ["adapter"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_else_at_the_place(kit, tmp_path, kind):
    folder = tmp_path / "notes"
    if kind == "folder":
        folder.mkdir()
        (folder / "thesis.tex").write_text("ten years of work")
    else:
        folder.write_text("ten years of work")
    text = kit.error_text(export_peft, svd_layers(kit, (3, 2)), folder)
    assert text == f"{folder} exists and is no adapter; give a folder of its own."
    if kind == "folder":
        assert contents(folder) == {"thesis.tex": b"ten years of work"}
    else:
        assert folder.read_text() == "ten years of work"
    assert names_in(tmp_path) == ["notes"]


@pytest.mark.parametrize("role", ["p", "lam", "q"])
def test_factor_that_is_not_finite(kit, tmp_path, role):
    layers = svd_layers(kit, (3, 2))
    layers["layers.0.mlp.w1"].tokens(role)[0, 0] = float("nan")
    text = kit.error_text(export_peft, layers, tmp_path / "adapter")
    assert text == "layers.0.mlp.w1 has factors that are not finite; nothing was written."
    assert names_in(tmp_path) == []


def test_no_layers(kit, tmp_path):
    text = kit.error_text(export_peft, {}, tmp_path / "adapter")
    assert text == "there are no layers to export; inject adapters first."


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("fault", ["exchange.peft.export.save_file", "files.sync"])
def test_failure_to_write_leaves_all_as_it_was(kit, tmp_path, monkeypatch, earlier, fault):
    layers = svd_layers(kit, (3, 2))
    folder = tmp_path / "adapter"
    if earlier:
        export_peft(layers, folder)
    before = contents(folder) if earlier else None

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(f"lowrank_adapters.{fault}", fail)
    with pytest.raises(OSError, match="no space left"):
        export_peft(layers, folder)
    assert names_in(tmp_path) == (["adapter"] if earlier else [])
    if earlier:
        assert contents(folder) == before


def test_earlier_export_comes_back_when_the_new_one_cannot_take_its_name(
    kit, tmp_path, monkeypatch
):
    layers = svd_layers(kit, (3, 2))
    folder = export_peft(layers, tmp_path / "adapter")
    before = contents(folder)
    rename = Path.rename

    def fail_once(path, target):
        if target == folder:
            monkeypatch.undo()
            raise OSError("device or resource busy")
        return rename(path, target)

    monkeypatch.setattr("lowrank_adapters.files._exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="busy"):
        export_peft(layers, folder)
    assert contents(folder) == before
    assert names_in(tmp_path) == ["adapter"]


def test_an_earlier_exports_name_is_never_missing(kit, tmp_path, monkeypatch):
    layers = svd_layers(kit, (3, 2))
    folder = export_peft(layers, tmp_path / "adapter")
    before = contents(folder)
    layers["layers.0.q_proj"].lam.data.mul_(2)

    def refuse(path, target):
        raise AssertionError(f"{path} takes the name {target} in a step of its own")

    monkeypatch.setattr(Path, "rename", refuse)
    assert contents(export_peft(layers, folder)) != before
    assert names_in(tmp_path) == ["adapter"]


def test_masked_components_may_hold_anything(kit, tmp_path):
    layers = svd_layers(kit, (2, 2))
    expected = read(export_peft(layers, tmp_path / "adapter"))[0]
    with torch.no_grad():
        layers["layers.0.q_proj"].lam[1] = float("nan")
    found = read(export_peft(layers, tmp_path / "adapter"))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_layers_need_not_be_in_a_model(tmp_path):
    layer = SVD(2, 2.0).build(nn.Linear(4, 3), device="cpu", dtype=torch.float32)
    tensors, _ = read(export_peft({"alone": layer}, tmp_path / "new" / "adapter"))
    assert sorted(tensors) == [f"{PREFIX}alone.lora_{x}.weight" for x in "AB"]
