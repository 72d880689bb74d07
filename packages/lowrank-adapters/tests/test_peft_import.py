"""Folders of PEFT: what is read, and that what cannot be read changes nothing."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank_adapters import (
    AdapterError,
    DoRALinear,
    LoRALinear,
    SVDLinear,
    import_peft_,
    merge_,
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Q, W1 = "layers.0.q_proj", "layers.0.mlp.w1"
WIDTHS = {Q: (5, 5), W1: (7, 5)}  # out, in
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
ADALORA = {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 3}


def lora_tensors(rank=2, names=(Q, W1)):
    tensors = {}
    for name in names:
        out_features, in_features = WIDTHS[name]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, in_features)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(out_features, rank)
    return tensors


def adalora_tensors(live=3, names=(Q, W1)):
    tensors = {}
    for name in names:
        out_features, in_features = WIDTHS[name]
        tensors[f"{PREFIX}{name}.lora_A"] = torch.randn(live, in_features)
        tensors[f"{PREFIX}{name}.lora_E"] = torch.randn(live, 1)
        tensors[f"{PREFIX}{name}.lora_B"] = torch.randn(out_features, live)
    return tensors


def write(folder, config, tensors):
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(
        {key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / TENSORS
    )
    return folder


def update(tensors, name, scaling):
    a, b = (tensors[f"{PREFIX}{name}.lora_{x}.weight"].double() for x in "AB")
    return scaling * b @ a


def snapshot(model):
    return list(model.named_modules()), {n: t.clone() for n, t in model.state_dict().items()}


def refusal(kit, model, folder, **options):
    """The text of the refusal, having seen that the model was left as it was."""
    before = snapshot(model)
    text = kit.error_text(import_peft_, model, folder, **options)
    assert list(model.named_modules()) == before[0]
    torch.testing.assert_close(dict(model.state_dict()), before[1], rtol=0, atol=0)
    return text


@pytest.mark.parametrize(
    ("fields", "scalings"),
    [
        ({}, {Q: 1.5, W1: 1.5}),
        ({"use_rslora": True}, {Q: 3 / 2**0.5, W1: 3 / 2**0.5}),
        ({"alpha_pattern": {"q_proj": 8}}, {Q: 4.0, W1: 1.5}),
        ({"alpha_pattern": {r"0\.mlp.*": 5, "mlp.w1": 8, "proj": 9}}, {Q: 1.5, W1: 2.5}),
        ({"alpha_pattern": {"^layers.0.q_proj": 8, "^mlp": 9}}, {Q: 4.0, W1: 1.5}),
        # What tensors there are counts, not what the config says of them.
        ({"r": 7, "rank_pattern": {"w1": 9}, "target_modules": ["v_proj"]}, {Q: 1.5, W1: 1.5}),
        ({"lora_dropout": 0.25, "a_field_of_the_future": {"x": 1}}, {Q: 1.5, W1: 1.5}),
    ],
)
def test_lora_has_pefts_scaling(kit, tmp_path, fields, scalings):
    tensors = lora_tensors()
    model = kit.Decoder(blocks=1)
    layers = import_peft_(model, write(tmp_path, LORA | fields, tensors))
    assert list(layers) == [Q, W1]
    for name, layer in layers.items():
        assert type(layer) is LoRALinear
        assert model.get_submodule(name) is layer
        assert layer.dropout == fields.get("lora_dropout", 0.0)
        expected = update(tensors, name, scalings[name])
        torch.testing.assert_close(layer.delta().double(), expected, rtol=1e-6, atol=1e-6)


def test_model_in_evaluation_drops_nothing(kit, tmp_path):
    folder = write(tmp_path, LORA | {"lora_dropout": 0.5}, lora_tensors())
    models = [kit.Decoder(blocks=1).eval() for _ in "12"]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        import_peft_(model, folder)
    words = torch.arange(11)
    assert torch.equal(models[0](words), models[1](words))
    models[1].train()
    assert not torch.equal(models[0](words), models[1](words))


def test_ranks_are_those_of_the_tensors_and_rank_zero_is_no_layer(kit, tmp_path):
    tensors = lora_tensors(4, [Q]) | lora_tensors(0, [W1])
    model = kit.Decoder(blocks=1)
    layers = import_peft_(model, write(tmp_path, LORA, tensors), factor_dtype=torch.bfloat16)
    assert {name: (layer.rank, layer.dtype) for name, layer in layers.items()} == {
        Q: (4, torch.bfloat16)
    }
    assert type(model.get_submodule(W1)) is nn.Linear


def test_embedding_drops_nothing_as_in_peft(kit, tmp_path):
    a, b = torch.randn(2, 11), torch.randn(5, 2)
    tensors = {f"{PREFIX}embedding.lora_embedding_{x}": t for x, t in (("A", a), ("B", b))}
    folder = write(tmp_path, LORA | {"lora_dropout": 0.25}, tensors | lora_tensors(2, [Q]))
    model = kit.Decoder(blocks=1)
    layers = import_peft_(model, folder)
    assert {name: layer.dropout for name, layer in layers.items()} == {"embedding": 0.0, Q: 0.25}
    torch.testing.assert_close(layers["embedding"].delta(), 1.5 * b @ a)
    words = torch.tensor([3, 7])
    expected = (model.embedding.base.weight + 1.5 * (b @ a).T)[words]
    torch.testing.assert_close(model.embedding(words), expected)


def test_dora_has_its_magnitude(kit, tmp_path):
    tensors = lora_tensors()
    tensors |= {f"{PREFIX}{n}.lora_magnitude_vector": torch.rand(WIDTHS[n][0]) for n in WIDTHS}
    layers = import_peft_(
        kit.Decoder(blocks=1), write(tmp_path, LORA | {"use_dora": True}, tensors)
    )
    for name, layer in layers.items():
        assert type(layer) is DoRALinear
        assert torch.equal(layer.magnitude, tensors[f"{PREFIX}{name}.lora_magnitude_vector"])
        weight = layer.base.weight.double() + update(tensors, name, 1.5)
        rows = layer.magnitude[:, None].double() * weight / weight.norm(dim=1, keepdim=True)
        merged = layer.base.weight.double() + layer.delta().double()
        torch.testing.assert_close(merged, rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masks", [None, {Q: [False, True, True], W1: [True, False, True]}])
@pytest.mark.parametrize("alpha", [3, 0])
def test_adalora_has_its_masks(kit, tmp_path, masks, alpha):
    tensors = adalora_tensors(2 if masks else 3)
    pattern = {f"{name}.lora_E": mask for name, mask in masks.items()} if masks else None
    config = ADALORA | {"rank_pattern": pattern, "lora_alpha": alpha}
    model = kit.Decoder(blocks=1)
    layers = import_peft_(model, write(tmp_path, config, tensors))
    for name, layer in layers.items():
        assert type(layer) is SVDLinear
        assert layer.rank_mask.tolist() == (masks or {}).get(name, [True] * 3)
        a, e, b = (tensors[f"{PREFIX}{name}.lora_{x}"].double() for x in "AEB")
        expected = b @ (a * e) * 3 / (3 + 1e-5)  # without an alpha, PEFT takes the rank
        torch.testing.assert_close(layer.delta().double(), expected, rtol=1e-6, atol=1e-6)
        live = layer.rank_mask
        assert torch.equal(layer.q[live], a.float())
        torch.testing.assert_close(layer.q[~live].norm(dim=1), torch.ones(3 - len(a)))
        assert not layer.lam[~live].any()


def test_adalora_may_have_no_live_component(kit, tmp_path):
    pattern = {f"{Q}.lora_E": [False] * 3, f"{W1}.lora_E": [True, True, False]}
    tensors = adalora_tensors(0, [Q]) | adalora_tensors(2, [W1])
    model = kit.Decoder(blocks=1)
    layers = import_peft_(model, write(tmp_path, ADALORA | {"rank_pattern": pattern}, tensors))
    assert {name: int(layer.rank_mask.sum()) for name, layer in layers.items()} == {Q: 0, W1: 2}
    assert not layers[Q].delta().any()


def test_whole_tensors_are_copied_into_the_model(kit, tmp_path):
    model = kit.Decoder(blocks=1)
    whole = {
        "output.weight": torch.randn(11, 5),
        "layers.0.mlp.w1.base_layer.bias": torch.randn(7).bfloat16(),
        "layers.0.v_proj.bias": torch.randn(3),
    }
    tensors = lora_tensors() | {f"{PREFIX}{key}": tensor for key, tensor in whole.items()}
    config = LORA | {"modules_to_save": ["output", "classifier"], "bias": "all"}
    address = model.output.weight.data_ptr()
    layers = import_peft_(model, write(tmp_path, config, tensors))
    assert torch.equal(model.output.weight, whole["output.weight"])
    assert model.output.weight.data_ptr() == address
    assert torch.equal(layers[W1].base.bias, whole["layers.0.mlp.w1.base_layer.bias"].float())
    assert torch.equal(model.layers[0].v_proj.bias, whole["layers.0.v_proj.bias"])


def test_merged_import_is_the_sum(kit, tmp_path):
    tensors, model = lora_tensors(), kit.Decoder(blocks=1)
    before = model.get_submodule(Q).weight.detach().double().clone()
    layers = import_peft_(model, write(tmp_path, LORA, tensors))
    merge_(model)
    expected = before + update(tensors, Q, 1.5)
    torch.testing.assert_close(layers[Q].base.weight.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("{", "is no JSON: Expecting property name"),
        ("[" * 100000, "is no JSON: "),
        ("[1]", "holds a list, expected an object."),
        ({}, ": peft_type is None; 'LORA' and 'ADALORA' are read here."),
        ({"peft_type": "VERA"}, ": peft_type is 'VERA'; 'LORA' and 'ADALORA' are read here."),
        (
            LORA | {"init_lora_weights": "pissa_niter_4"},
            ": init_lora_weights is 'pissa_niter_4', which changes the base's weights; convert the "
            "adapter with PEFT (path_initial_model_for_weight_conversion) and save it again.",
        ),
        (LORA | {"use_qalora": True}, ": use_qalora is set; adapters with it are not read here."),
        (
            LORA | {"alora_invocation_tokens": [1]},
            ": alora_invocation_tokens is set; adapters with it are not read here.",
        ),
        (LORA | {"lora_alpha": "8"}, ": lora_alpha is '8', expected a finite number."),
        *(
            (
                ADALORA | {"init_r": value},
                f": init_r is {value!r}, expected a whole number of at least 1.",
            )
            for value in (0, 2.5, True, None)
        ),
        (LORA | {"lora_alpha": True}, ": lora_alpha is True, expected a finite number."),
        (LORA | {"lora_dropout": None}, ": lora_dropout is None, expected a finite number."),
        (LORA | {"lora_alpha": 10**400}, ", expected a finite number."),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', ": lora_alpha is nan, expected a finite"),
        (LORA | {"alpha_pattern": [1]}, ": alpha_pattern is [1], expected an object."),
        (LORA | {"alpha_pattern": {"q": "x"}}, ": q is 'x', expected a finite number."),
        (
            LORA | {"alpha_pattern": {"(q": 1}},
            ": alpha_pattern has '(q', which is no pattern: missing ), unterminated subpattern",
        ),
        *(
            (
                LORA | {"alpha_pattern": {pattern: 1}},
                f": alpha_pattern has {pattern!r}, expected at most 3 repetitions, and none of a "
                "group; write it plainer.",
            )
            for pattern in (r"([\w.]+)+!", "(a|b)*", "(a){9}", ".*.*.*.*!", r"\w+\w+\w+\w{2,}!")
        ),
        (LORA | {"modules_to_save": "head"}, ": modules_to_save is 'head', expected a list of"),
        (
            ADALORA | {"alpha_pattern": {"q_proj": 2}},
            ": alpha_pattern is set, which PEFT's AdaLoRA does not apply; leave it out if the "
            "adapter was trained without it.",
        ),
        (
            ADALORA | {"rank_pattern": {"x.lora_E": 2}},
            ": rank_pattern has 2 for x.lora_E, expected a list of bools.",
        ),
        (
            ADALORA | {"rank_pattern": {"x.lora_E": [1, 0]}},
            ": rank_pattern has [1, 0] for x.lora_E, expected a list of bools.",
        ),
    ],
)
def test_config_that_cannot_be_read(kit, tmp_path, config, text):
    folder = write(tmp_path, config, lora_tensors())
    found = refusal(kit, kit.Decoder(blocks=1), folder)
    assert found.startswith(f"{folder / CONFIG}")
    assert text in found


def test_config_that_is_missing_or_huge(kit, tmp_path):
    model = kit.Decoder(blocks=1)
    path = tmp_path / CONFIG
    assert refusal(kit, model, tmp_path) == (
        f"{path} does not exist; give the folder that PEFT saved."
    )
    path.write_text(" " * (1 << 24) + "{}")
    assert refusal(kit, model, tmp_path) == f"{path} has 16777218 bytes, too many for a config."


def without(tensors, *keys):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(keys)}


@pytest.mark.parametrize(
    ("config", "change", "text"),
    [
        (
            LORA,
            lambda t: {key.removeprefix("base_model."): tensor for key, tensor in t.items()},
            "the file has model.layers.0.mlp.w1.lora_A.weight, expected names that begin with "
            "'base_model.model.'.",
        ),
        (
            LORA,
            lambda t: {key.replace("q_proj", "r_proj"): tensor for key, tensor in t.items()},
            "the adapter is of modules that the model lacks: layers.0.r_proj; the model has "
            "embedding, output, q_proj, v_proj, w1, w2: load it into the model that it was trained "
            "on.",
        ),
        (
            LORA,
            lambda t: {
                key.replace("layers.0.q_proj", f"layers.{i}.q_proj"): tensor
                for i in range(1, 6)
                for key, tensor in t.items()
            },
            "the adapter is of modules that the model lacks: layers.1.q_proj, layers.2.q_proj, "
            "layers.3.q_proj and 2 more; the model has embedding, output, q_proj, v_proj, w1, w2: "
            "load it into the model that it was trained on.",
        ),
        (
            LORA,
            lambda t: without(t, "w1.lora_B.weight"),
            "layers.0.mlp.w1: the adapter has lora_A.weight, expected lora_A.weight, lora_B.weight "
            "of lora on this kind of module; save it with PEFT again.",
        ),
        (
            LORA | {"use_dora": True},
            lambda t: t,
            "layers.0.q_proj: the adapter has lora_A.weight, lora_B.weight, expected "
            "lora_A.weight, lora_B.weight, lora_magnitude_vector of dora on this kind of module; "
            "save it with PEFT again.",
        ),
        (
            ADALORA,
            lambda t: t,
            "layers.0.q_proj: the adapter has lora_A.weight, lora_B.weight, expected lora_A, "
            "lora_B, lora_E of adalora on this kind of module; save it with PEFT again.",
        ),
        (
            LORA,
            lambda t: t | {f"{PREFIX}{W1}.lora_B.bias": torch.zeros(7)},
            "the adapter holds tensors that the model lacks: layers.0.mlp.w1.lora_B.bias; load it "
            "into the model that it was trained on.",
        ),
        (
            LORA,
            lambda t: t | {f"{PREFIX}output.weight": torch.zeros(12, 5)},
            "output.weight is (12, 5) in the saved adapter, but (11, 5) here; load it into the "
            "model and rank it was trained with.",
        ),
        (
            LORA | {"modules_to_save": ["output"]},
            lambda t: t,
            "modules_to_save has output, but the adapter has no tensor of it; save it with PEFT "
            "again.",
        ),
        (
            LORA,
            lambda t: t | {f"{PREFIX}{W1}.lora_A.weight": torch.zeros(2, 6)},
            "layers.0.mlp.w1.a is (2, 6) in the saved adapter, but (2, 5) here; load it into the "
            "model and rank it was trained with.",
        ),
        (
            LORA,
            lambda t: t | {f"{PREFIX}{W1}.lora_B.weight": torch.full((7, 2), float("nan"))},
            "layers.0.mlp.w1.b is not finite in the saved adapter; take an earlier one.",
        ),
        (
            LORA,
            lambda t: t | lora_tensors(6, [W1]),
            "layers.0.mlp.w1: rank is 6, but the matrix is 7 x 5; choose a rank of 1 to 5, or "
            "exclude the module.",
        ),
        (
            ADALORA,
            lambda _: adalora_tensors(2),
            "layers.0.q_proj: the tensors have 2 components, but init_r is 3 and rank_pattern "
            "says nothing of them; save it with PEFT again.",
        ),
        (
            ADALORA | {"init_r": 10**18},
            lambda _: adalora_tensors(2),
            "layers.0.q_proj: the tensors have 2 components, but init_r is 1000000000000000000 "
            "and rank_pattern says nothing of them; save it with PEFT again.",
        ),
        (
            ADALORA | {"rank_pattern": {f"{Q}.lora_E": [True, True]}},
            lambda _: adalora_tensors(2),
            "layers.0.q_proj: the tensors have 2 components, but init_r is 3 and rank_pattern "
            "says 2 of 2; save it with PEFT again.",
        ),
        (
            ADALORA,
            lambda _: adalora_tensors() | {f"{PREFIX}{W1}.lora_B": torch.zeros(7, 2)},
            "layers.0.mlp.w1.p is (7, 2) in the saved adapter, but (7, 3) here; load it into the "
            "model and rank it was trained with.",
        ),
        (
            LORA | {"lora_alpha": -1},
            lambda t: t,
            "layers.0.q_proj: alpha is -1.0, expected a finite number above 0.",
        ),
    ],
)
def test_tensors_that_do_not_fit(kit, tmp_path, config, change, text):
    folder = write(tmp_path, config, change(lora_tensors()))
    assert refusal(kit, kit.Decoder(blocks=1), folder) == text


def test_model_that_is_adapted_or_waits_for_its_weights(kit, tmp_path):
    folder = write(tmp_path, LORA, lora_tensors())
    model = kit.Decoder(blocks=1)
    import_peft_(model, folder)
    assert refusal(kit, model, folder) == (
        "layers.0.q_proj is adapted already; inject into the plain model."
    )
    tensors = lora_tensors()
    tensors |= {f"{PREFIX}{n}.lora_magnitude_vector": torch.rand(WIDTHS[n][0]) for n in WIDTHS}
    write(tmp_path, LORA | {"use_dora": True}, tensors)
    with torch.device("meta"):
        model = kit.Decoder(blocks=1)
    before = list(model.named_modules())
    assert kit.error_text(import_peft_, model, folder) == (
        "layers.0.q_proj waits for the weights of its base, which was on the meta device; load "
        "them and call materialise_(model) first."
    )
    assert list(model.named_modules()) == before


class Opened:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, "w"))


def test_pickle_is_refused_by_name_and_not_opened(kit, tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps(LORA))
    trace = tmp_path / "trace"
    poison = pickle.dumps(Opened(str(trace)))
    (tmp_path / "adapter_model.bin").write_bytes(poison)
    assert refusal(kit, kit.Decoder(blocks=1), tmp_path) == (
        f"{tmp_path / TENSORS} does not exist; adapter_model.bin is a pickle, which can run code "
        f"when opened and is not read: write it again as {TENSORS}, with the library that it is "
        "from."
    )
    (tmp_path / TENSORS).write_bytes(poison)
    text = refusal(kit, kit.Decoder(blocks=1), tmp_path)
    assert text.startswith(f"{tmp_path / TENSORS} is not a whole safetensors file: ")
    assert not trace.exists()


@pytest.mark.parametrize("part", [0, 7, 100, -1])
def test_file_that_is_cut_short(kit, tmp_path, part):
    folder = write(tmp_path, LORA, lora_tensors())
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:part])
    text = refusal(kit, kit.Decoder(blocks=1), folder)
    assert text.startswith(f"{folder / TENSORS} is not a whole safetensors file: ")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    *("peft_type", "lora_alpha", "init_r", "lora_dropout", "use_dora", "use_rslora"),
    *("alpha_pattern", "rank_pattern", "modules_to_save", "init_lora_weights", "arrow_config"),
]


def loads_or_is_refused(kit, folder):
    model = kit.Decoder(blocks=1)
    before = snapshot(model)
    try:
        found = import_peft_(model, folder)
    except AdapterError as error:
        found = str(error)
    if isinstance(found, str):
        assert "\n" not in found
        assert list(model.named_modules()) == before[0]
        torch.testing.assert_close(dict(model.state_dict()), before[1], rtol=0, atol=0)
    else:
        assert list(found) == [Q, W1]


@settings(max_examples=150, deadline=None)
@given(adalora=st.booleans(), junk=st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=3))
def test_any_config_loads_or_is_refused_in_one_line(tmp_path_factory, kit, adalora, junk):
    config, tensors = (ADALORA, adalora_tensors()) if adalora else (LORA, lora_tensors())
    folder = write(tmp_path_factory.mktemp("junk"), config | junk, tensors)
    loads_or_is_refused(kit, folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_to_the_tensors_loads_or_is_refused_in_one_line(tmp_path_factory, kit, data):
    folder = write(tmp_path_factory.mktemp("damage"), LORA, lora_tensors())
    damaged = bytearray((folder / TENSORS).read_bytes())
    header = 8 + int.from_bytes(damaged[:8], "little")
    for place in data.draw(st.lists(st.integers(0, header + 8), min_size=1, max_size=3)):
        damaged[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789FB"[]{},'))
    (folder / TENSORS).write_bytes(damaged)
    loads_or_is_refused(kit, folder)


def test_reading_draws_no_random_number(kit, tmp_path):
    folder = write(tmp_path, LORA, lora_tensors())
    model = kit.Decoder(blocks=1)
    before = torch.get_rng_state()
    import_peft_(model, folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_reading_leaves_the_folder_alone(kit, tmp_path):
    folder = write(tmp_path, LORA, lora_tensors())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    import_peft_(kit.Decoder(blocks=1), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert load_file(folder / TENSORS).keys() == lora_tensors().keys()
