"""The forms of an export hold the same update, and reading one gives it back."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    LoRA,
    PrincipalWeights,
    SVDLinear,
    UnitRows,
    adapted_layers,
    adapter_state_dict,
    export_peft,
    import_peft_,
    inject_adapters_,
    load_adapter_,
    save_adapter,
    set_rank_,
    start_factors_,
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def read(folder):
    return load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text())


def masked(kit, masks, **options):
    """Layers of rank 3 with these masks."""
    model, layers = kit.adapted(SVD(rank=3, alpha=4.5), blocks=1, **options)
    for layer, mask in zip(layers.values(), masks, strict=True):
        layer.rank_mask.copy_(torch.tensor(mask))
    return model, layers


MASKS = ([True, False, True], [False] * 3, [True] * 3, [False, True, False])
NAMES = [f"layers.0.{name}" for name in ("q_proj", "v_proj", "mlp.w1", "mlp.w2")]


def test_compact_form_has_each_matrix_own_rank_and_none_without_components(kit, twin, tmp_path):
    _, layers = masked(kit, MASKS)
    tensors, config = read(export_peft(layers, tmp_path / "adapter", form="compact"))
    ranks = {NAMES[0]: 2, NAMES[2]: 3, NAMES[3]: 1}
    assert config["target_modules"] == list(ranks)
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks
    assert config["r"] == config["lora_alpha"] == 3
    assert len(tensors) == 2 * len(ranks)
    for name, rank in ranks.items():
        a = tensors[f"{PREFIX}{name}.lora_A.weight"]
        b = tensors[f"{PREFIX}{name}.lora_B.weight"]
        assert len(a) == b.shape[1] == rank
        layer = layers[name]
        expected = twin.update_matrix(layer.p, layer.lam, layer.q, layer.rank_mask, 1.5)
        torch.testing.assert_close(b.double() @ a.double(), expected, rtol=1e-6, atol=1e-6)


def test_longest_names_come_first_where_one_ends_another(kit, tmp_path):
    inner = nn.ModuleDict({"w": nn.Linear(4, 4), "deep": nn.ModuleDict({"w": nn.Linear(4, 4)})})
    layers = inject_adapters_(inner, LoRA(2, 2.0), rank_pattern={"deep.w": 3})
    _, config = read(export_peft(layers, tmp_path / "adapter", form="compact"))
    assert list(config["rank_pattern"].items()) == [("deep.w", 3), ("w", 2)]
    assert list(config["alpha_pattern"].items()) == [("deep.w", 3), ("w", 2)]


def test_equal_ranks_need_no_pattern_and_no_live_component_at_all_still_loads(kit, tmp_path):
    _, layers = masked(kit, [[True, False, True]] * 4)
    _, config = read(export_peft(layers, tmp_path / "equal", form="compact"))
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (2, {}, {})
    _, layers = masked(kit, [[False] * 3] * 4)
    tensors, config = read(export_peft(layers, tmp_path / "none", form="compact"))
    assert config["target_modules"] == NAMES[:1]
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        f"{PREFIX}{NAMES[0]}.lora_A.weight": (1, 5),
        f"{PREFIX}{NAMES[0]}.lora_B.weight": (5, 1),
    }
    assert not any(tensor.any() for tensor in tensors.values())


def test_adalora_form_has_the_live_components_and_pefts_scaling(kit, twin, tmp_path):
    _, layers = masked(kit, MASKS)
    tensors, config = read(export_peft(layers, tmp_path / "adapter", form="adalora"))
    assert (config["peft_type"], config["init_r"], config["lora_alpha"]) == ("ADALORA", 3, 4.5)
    assert config["target_r"] == 2  # 6 live components of 4 matrices, rounded
    assert config["rank_pattern"] == {
        f"{name}.lora_E": mask for name, mask in zip(NAMES, MASKS, strict=True)
    }
    for name, mask in zip(NAMES, MASKS, strict=True):
        a, e, b = (tensors[f"{PREFIX}{name}.lora_{x}"] for x in "AEB")
        assert a.shape[0] == e.shape[0] == b.shape[1] == sum(mask)
        assert e.shape[1] == 1
        scaling = config["lora_alpha"] / (config["init_r"] + 1e-5)
        found = b.double() @ (a.double() * e.double()) * scaling
        layer = layers[name]
        expected = twin.update_matrix(layer.p, layer.lam, layer.q, layer.rank_mask, 1.5)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_adalora_of_several_ranks_is_padded_with_masked_components(kit, tmp_path):
    model = kit.Decoder(blocks=1)
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7.0}}
    layers = inject_adapters_(model, SVD(3, 4.5), ["q_proj", "w1"], **options)
    kit.shaken(model)
    for layer in layers.values():
        layer.rank_mask.fill_(True)
    folder = export_peft(layers, tmp_path / "adapter", form="adalora")
    _, config = read(folder)
    assert (config["init_r"], config["lora_alpha"]) == (3, 7.0)
    assert config["rank_pattern"][f"{NAMES[0]}.lora_E"] == [True, True, False]
    again = kit.Decoder(blocks=1)
    for name, layer in import_peft_(again, folder).items():
        torch.testing.assert_close(layer.delta(), layers[name].delta(), rtol=1e-5, atol=1e-5)


def test_adalora_that_is_not_pruned_has_no_pattern(kit, tmp_path):
    _, layers = masked(kit, [[True] * 3] * 4)
    _, config = read(export_peft(layers, tmp_path / "adapter", form="adalora"))
    assert config["rank_pattern"] is None


@pytest.mark.parametrize("form", ["padded", "compact", "adalora"])
def test_rows_of_the_update_are_reordered_in_every_form(kit, tmp_path, form):
    _, layers = masked(kit, [[True, False, True]] * 4)
    seen = []

    def flip(name, b):
        seen.append(name)
        return b.flip(0) if name == NAMES[0] else b

    folder = export_peft(layers, tmp_path / "adapter", form=form, transform_b=flip)
    assert seen == NAMES
    for name, found in import_peft_(kit.Decoder(blocks=1), folder).items():
        expected = layers[name].delta()
        expected = expected.flip(0) if name == NAMES[0] else expected
        torch.testing.assert_close(found.delta(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["padded", "compact"])
def test_dora_has_its_magnitude_in_the_order_of_the_rows(kit, tmp_path, form):
    model = kit.Decoder(blocks=1)
    layers = inject_adapters_(model, DoRA(2, 3.0))
    kit.shaken(model)
    options = {"form": form, "transform_b": lambda _, b: b.flip(0)}
    tensors, config = read(export_peft(layers, tmp_path / "adapter", **options))
    assert config["use_dora"]
    for name, layer in layers.items():
        key = f"{PREFIX}{name}"
        assert torch.equal(tensors[f"{key}.lora_magnitude_vector"], layer.magnitude.flip(0))
        assert torch.equal(tensors[f"{key}.lora_B.weight"], (layer.b * 1.5).flip(0))
        assert torch.equal(tensors[f"{key}.lora_A.weight"], layer.a)


def test_whole_modules_are_written_as_they_are(kit, tmp_path):
    model, layers = kit.adapted(blocks=1)
    model.norm = nn.BatchNorm1d(3).bfloat16()
    folder = export_peft(
        layers,
        tmp_path / "adapter",
        rename="deep.{}".format,
        modules_to_save={"output": model.output, "norm": model.norm},
    )
    tensors, config = read(folder)
    assert config["modules_to_save"] == ["deep.output", "deep.norm"]
    whole = {key: t for key, t in tensors.items() if ".lora_" not in key}
    state = model.output.state_dict(prefix="output.") | model.norm.state_dict(prefix="norm.")
    expected = {f"{PREFIX}deep.{key}": tensor for key, tensor in state.items()}
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (
            SVD(3, 1.0),
            {"form": "flat"},
            "form is 'flat', expected one of padded, compact, adalora.",
        ),
        (
            LoRA(3, 1.0),
            {"form": "adalora"},
            "layers.0.q_proj is a LoRALinear that is no P diag(λ) Q alone, which AdaLoRA's form "
            "holds; export it as 'padded' or 'compact'.",
        ),
        (
            SVD(3, 1.0, start=PrincipalWeights()),
            {"form": "adalora"},
            "layers.0.q_proj is a SVDLinear that is no P diag(λ) Q alone, which AdaLoRA's form "
            "holds; export it as 'padded' or 'compact'.",
        ),
        (
            SVD(3, 1.0),
            {"form": "adalora", "targets": ["embedding", "w1"]},
            "embedding is on a Embedding, which PEFT has no AdaLoRA for; export it as 'padded' or "
            "'compact'.",
        ),
        (
            SVD(3, 1.0),
            {"modules_to_save": {"mlp": "layers.0.mlp"}},
            "mlp is to be saved whole, but has adapted layers in it; exclude them from injection, "
            "or leave it out of modules_to_save.",
        ),
        (
            SVD(3, 1.0),
            {"modules_to_save": {"embedding": "embedding"}},
            "embedding.weight is not finite; nothing was written.",
        ),
    ],
)
def test_refusal_writes_nothing(kit, tmp_path, make, options, text):
    targets = options.pop("targets", "all-linear")
    model, layers = kit.adapted(make, blocks=1, targets=targets)
    if "modules_to_save" in options:
        model.embedding.weight.data[0, 0] = float("nan")
    if "modules_to_save" in options:
        named = options["modules_to_save"].items()
        options = {"modules_to_save": {n: model.get_submodule(where) for n, where in named}}
    assert kit.error_text(export_peft, layers, tmp_path / "adapter", **options) == text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["padded", "compact"])
def test_magnitude_that_is_not_finite(kit, tmp_path, form):
    model = kit.Decoder(blocks=1)
    layers = inject_adapters_(model, DoRA(2, 3.0))
    layers[NAMES[2]].magnitude.data[0] = float("nan")
    text = kit.error_text(export_peft, layers, tmp_path / "adapter", form=form)
    assert text == "layers.0.mlp.w1 has factors that are not finite; nothing was written."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["padded", "compact", "adalora"])
def test_factors_on_the_meta_device_and_layers_that_wait_for_their_base(kit, tmp_path, form):
    layers = inject_adapters_(kit.Decoder(blocks=1), SVD(2, 3.0), "w1", device="meta")
    text = kit.error_text(export_peft, layers, tmp_path / "adapter", form=form)
    assert text == "layers.0.mlp.w1 has factors on the meta device; load an adapter first."
    with torch.device("meta"):
        model = kit.Decoder(blocks=1)
    layers = inject_adapters_(model, DoRA(2, 3.0), "w1")
    text = kit.error_text(export_peft, layers, tmp_path / "adapter", form=form)
    assert text.startswith("layers.0.mlp.w1 waits for the weights of its base")
    assert list(tmp_path.iterdir()) == []


def test_dora_beside_lora(kit, tmp_path):
    model = kit.Decoder(blocks=1)
    layers = inject_adapters_(model, DoRA(2, 3.0), ["q_proj"])
    plain = LoRA(2, 3.0).build(nn.Linear(4, 4), device="cpu", dtype=torch.float32)
    text = kit.error_text(export_peft, layers | {"plain": plain}, tmp_path / "adapter")
    assert text == (
        "layers.0.q_proj is DoRA, but plain is not, and PEFT has one kind for all; export them to "
        "folders of their own."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["padded", "compact", "adalora"])
def test_one_name_for_two_modules(kit, tmp_path, form):
    _, layers = kit.adapted(blocks=2, targets="q_proj")
    options = {"form": form, "rename": lambda name: name.replace("1", "0")}
    text = kit.error_text(export_peft, layers, tmp_path / "adapter", **options)
    assert text == (
        "rename gives layers.0.q_proj and layers.1.q_proj the one name layers.0.q_proj; give each "
        "module a name of its own."
    )


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_adalora_factor_that_is_not_finite(kit, tmp_path, value):
    _, layers = masked(kit, [[True] * 3] * 4)
    layers[NAMES[2]].q.data[0, 0] = float(value)
    text = kit.error_text(export_peft, layers, tmp_path / "adapter", form="adalora")
    assert text == "layers.0.mlp.w1 has factors that are not finite; nothing was written."


ZERO_START = (UnitRows(),)
ANY_START = (UnitRows(), PrincipalWeights())


def draw_layers(data, starts=ZERO_START):
    """A model of two matrices of drawn shapes, with a method off its start."""
    draw = data.draw
    widths = [draw(st.integers(1, 6)) for _ in range(3)]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = nn.Sequential(nn.Linear(*widths[:2]), nn.Linear(*widths[1:])).double()
    alpha = draw(st.floats(0.1, 50))
    method = draw(st.sampled_from([LoRA, SVD, DyLoRA, DoRA]))
    rank = draw(st.integers(1, min(widths)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    start = draw(st.sampled_from(starts))
    layers = inject_adapters_(model, method(rank, alpha, start=start), factor_dtype=dtype)
    with torch.no_grad():
        for layer in layers.values():
            for _, factor in layer.factors():
                factor.normal_()
            if method is SVD:
                mask = draw(st.lists(st.booleans(), min_size=rank, max_size=rank))
                layer.rank_mask.copy_(torch.tensor(mask))
    if method is DyLoRA:
        set_rank_(layers, draw(st.integers(1, rank)))
    return model, layers


def plain_copy(model):
    copy = nn.Sequential(*(nn.Linear(m.in_features, m.out_features) for m in model)).double()
    for new, old in zip(copy, model, strict=True):
        new.load_state_dict(old.base.state_dict())
    return copy


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_reading_any_form_gives_the_update_back(tmp_path_factory, data):
    model, layers = draw_layers(data)
    forms = ["padded", "compact"]
    if isinstance(layers["0"], SVDLinear):
        forms.append("adalora")
    form = data.draw(st.sampled_from(forms))
    folder = export_peft(layers, tmp_path_factory.mktemp("form") / "adapter", form=form)
    again = plain_copy(model)
    found = import_peft_(again, folder)
    for name, layer in layers.items():
        expected = layer.delta().double()
        if name not in found:
            assert form == "compact"
            assert not expected.any()
            continue
        # Float32 factors, multiplied in another order than ours.
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            found[name].delta().double(), expected, rtol=1e-4, atol=1e-5 * (1 + scale)
        )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_saving_and_loading_is_the_identity(tmp_path_factory, data):
    model, layers = draw_layers(data, ANY_START)
    folder = tmp_path_factory.mktemp("saved")
    save_adapter(model, folder)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    fresh = copy.deepcopy(model)
    start_factors_(adapted_layers(fresh), UnitRows())
    with torch.no_grad():
        for tensor in adapter_state_dict(fresh).values():
            tensor.copy_(torch.rand(tensor.shape) > 0.5)
    load_adapter_(fresh, folder)
    x = torch.randn(3, layers["0"].in_features, dtype=torch.float64)
    assert torch.equal(fresh(x), model(x))
    found = adapter_state_dict(fresh)
    torch.testing.assert_close(found, state, rtol=0, atol=0)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in state.items()}
