"""Which layers are adapted, in what order, and that a refusal changes nothing."""

import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowrank_adapters import (
    SVD,
    LoRA,
    disable_adapters,
    freeze_base_,
    inject_adapters_,
    inside_adapters,
    merged,
)

BLOCK = ("q_proj", "v_proj", "mlp.w1", "mlp.w2")
ALL = [f"layers.{i}.{name}" for i in (0, 1) for name in BLOCK]
NOTHING = "matches no module that can be adapted;"
KINDS = "the model has embedding, output, q_proj, v_proj, w1, w2."

NEAR_Q = rf"targets: 're:layers\\.0\\.q_pro' {NOTHING} did you mean q_proj or v_proj? {KINDS}"


def text_and_unchanged(kit, model, *args, **options):
    """The text of the refusal, having seen that the model was left as it was."""
    before = (
        list(model.named_modules()),
        {name: p.clone() for name, p in model.state_dict().items()},
    )
    text = kit.error_text(inject_adapters_, model, *args, **options)
    assert list(model.named_modules()) == before[0]
    torch.testing.assert_close(dict(model.state_dict()), before[1], rtol=0, atol=0)
    return text


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("all-linear", (), ALL),
        ("all-linear", ("q_proj", "layers.1.*"), [f"layers.0.{name}" for name in BLOCK[1:]]),
        (["mlp.w2", "q_proj"], (), [n for n in ALL if n.endswith(("mlp.w2", "q_proj"))]),
        ("w1", (), ["layers.0.mlp.w1", "layers.1.mlp.w1"]),
        (["layers.1.v_proj"], (), ["layers.1.v_proj"]),
        (["layers.0.*"], ("mlp.*",), ["layers.0.q_proj", "layers.0.v_proj"]),
        (["?_proj"], ("v_proj",), ["layers.0.q_proj", "layers.1.q_proj"]),
        (["output"], (), ["output"]),
        (["q_proj", "*.q_proj", "layers.0.q_proj"], ("1.q_proj",), ["layers.0.q_proj"]),
        (r"re:layers\.\d+\.[qv]_proj", "re:.*1.*", ["layers.0.q_proj", "layers.0.v_proj"]),
        (re.compile(r"LAYERS\.0\.q.*", re.IGNORECASE), (), ["layers.0.q_proj"]),
        (["embedding", re.compile(r"layers\.1\.mlp\.w1")], (), ["embedding", "layers.1.mlp.w1"]),
        (["all-linear", "embedding"], "layers.*", ["embedding"]),
    ],
)
def test_names_choose_layers_in_model_order(kit, targets, exclude, expected):
    model = kit.Decoder()
    bases = {name: model.get_submodule(name) for name in expected}
    layers = inject_adapters_(model, SVD(rank=2, alpha=4.0), targets, exclude=exclude)
    assert list(layers) == expected
    for name, layer in layers.items():
        assert model.get_submodule(name) is layer
        assert layer.base is bases[name]
    others = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    everything = {"output", *ALL}
    adapted = {f"{n}.base" for n in expected if n != "embedding"}
    assert others == adapted | (everything - set(expected))


def test_a_suffix_begins_at_a_dot(kit):
    model = nn.ModuleDict({"up_proj": nn.Linear(2, 2), "p_proj": nn.Linear(2, 2)})
    assert list(inject_adapters_(model, LoRA(rank=1, alpha=1.0), ["p_proj"])) == ["p_proj"]


def test_rank_and_alpha_are_of_the_first_pattern_that_stands_for_a_module(kit):
    layers = inject_adapters_(
        kit.Decoder(),
        SVD(rank=2, alpha=4.0),
        ["q_proj", "w1", "w2"],
        rank_pattern={"0.q_proj": 1, "q_proj": 3, "re:.*0\\..*": 4},
        alpha_pattern={"layers.1.*": 9.0},
    )
    assert {name: (layer.rank, layer.alpha) for name, layer in layers.items()} == {
        "layers.0.q_proj": (1, 4.0),
        "layers.0.mlp.w1": (4, 4.0),
        "layers.0.mlp.w2": (4, 4.0),
        "layers.1.q_proj": (3, 9.0),
        "layers.1.mlp.w1": (2, 9.0),
        "layers.1.mlp.w2": (2, 9.0),
    }
    assert {type(layer).__name__ for layer in layers.values()} == {"SVDLinear"}
    assert layers["layers.0.q_proj"].scaling == 4.0


def test_maker_that_is_no_dataclass_cannot_take_patterns(kit):
    class Plain:
        def build(self, base, *, device, dtype):
            return LoRA(rank=1, alpha=1.0).build(base, device=device, dtype=dtype)

    assert len(inject_adapters_(kit.Decoder(), Plain(), "q_proj")) == 2
    options = {"rank_pattern": {"q_proj": 2}}
    assert text_and_unchanged(kit, kit.Decoder(), Plain(), **options) == (
        "Plain is no dataclass, so that rank_pattern and alpha_pattern cannot change it; give one "
        "maker with one rank and alpha."
    )


def test_all_linear_leaves_out_heads():
    heads = ("lm_head", "output", "classifier", "score", "head")
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in (*heads, "output_proj")})
    model["encoder"] = nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(2, 2)})})
    model["classifier"] = nn.ModuleDict({"dense": nn.Linear(2, 2)})
    found = list(inject_adapters_(model, LoRA(rank=1, alpha=1.0)))
    assert found == ["output_proj", "encoder.output.dense"]
    block = nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(2, 2)})})
    assert list(inject_adapters_(block, LoRA(rank=1, alpha=1.0))) == ["output.dense"]


def test_all_linear_leaves_out_what_the_model_says_is_its_head(kit):
    model = kit.Decoder()
    model.get_output_embeddings = lambda: model.layers[1].v_proj
    found = inject_adapters_(model, LoRA(rank=1, alpha=1.0))
    assert list(found) == [name for name in ALL if name != "layers.1.v_proj"]


def test_all_linear_is_every_kind_of_linear_layer_and_no_container():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.nf, self.weight = 3, nn.Parameter(torch.randn(2, 3))

    class Packed(nn.Module):
        in_features, out_features = 2, 3

    container = nn.Sequential(nn.Linear(2, 2))
    container.in_features, container.out_features = 2, 2
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 3),
            "conv1d": Conv1D(),
            "packed": Packed(),
            "container": container,
            "convolution": nn.Conv1d(2, 3, 1),
            "embedding": nn.Embedding(4, 3),
            "norm": nn.LayerNorm(3),
        }
    )
    make = LoRA(rank=1, alpha=1.0)
    assert list(inject_adapters_(model, make)) == ["linear", "conv1d", "packed", "container.0"]


def test_attention_of_torch_never_calls_its_output_projection(kit):
    model = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6)
    make = LoRA(rank=1, alpha=1.0)
    assert text_and_unchanged(kit, model, make, ["out_proj"]) == (
        "self_attn.out_proj: it is the output projection of a MultiheadAttention, which reads its "
        "weight and never calls it; exclude it."
    )
    with fast_path(enabled=False):
        assert list(inject_adapters_(model, make)) == ["linear1", "linear2"]


@contextmanager
def fast_path(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("targets", ["all-linear", "linear2"])
def test_fast_path_of_torchs_encoder_never_calls_its_linear_layers(kit, targets):
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=True)
    model = nn.ModuleDict({"layer": layer}).eval()
    make, x = LoRA(rank=2, alpha=2.0), torch.randn(2, 3, 4)
    first = "layer.linear2" if targets == "linear2" else "layer.linear1"
    assert text_and_unchanged(kit, model, make, targets) == (
        f"{first} is in a TransformerEncoderLayer, whose fast path reads its weight and never "
        "calls it; call torch.backends.mha.set_fastpath_enabled(False) first, or exclude it."
    )
    with fast_path(enabled=False):
        inject_adapters_(model, make, targets)
        kit.shaken(model)
        freeze_base_(model)
        found = model["layer"](x)
        with merged(model):
            torch.testing.assert_close(found, model["layer"](x), rtol=1e-4, atol=1e-5)
        with disable_adapters(model):
            assert (found - model["layer"](x)).abs().max() > 0.1


def test_factors_are_made_where_each_base_is():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("meta_", "other", "here")})
    model["meta_"].to("meta")
    elsewhere = SimpleNamespace(is_meta=False, device=torch.device("cuda", 1))
    model["other"].parameters = lambda: iter([elsewhere])
    seen = []

    class Recording:
        def build(self, base, *, device, dtype):
            seen.append(str(device))
            return LoRA(rank=1, alpha=1.0).build(base, device="cpu", dtype=dtype)

    inject_adapters_(model, Recording())
    assert seen == ["cpu", "cuda:1", "cpu"]


@pytest.mark.parametrize("make", [LoRA(rank=2, alpha=4.0), SVD(rank=2, alpha=4.0)])
def test_injected_model_starts_as_the_plain_one(kit, make):
    model = kit.Decoder()
    tokens = torch.arange(11)
    expected = model(tokens)
    inject_adapters_(model, make)
    assert torch.equal(model(tokens), expected)


def test_layers_are_in_training_where_their_base_is(kit):
    model = kit.Decoder()
    model.layers[1].eval()
    layers = inject_adapters_(model, LoRA(rank=2, alpha=4.0, dropout=0.5), "q_proj")
    assert [layer.training for layer in layers.values()] == [True, False]
    assert [layer.base.training for layer in layers.values()] == [True, False]


def test_base_on_the_meta_device_takes_factors_elsewhere(kit):
    with torch.device("meta"):
        model = kit.Decoder()
    layers = inject_adapters_(model, SVD(rank=2, alpha=4.0), factor_dtype=torch.float64)
    for name, parameter in model.named_parameters():
        factor = name.rpartition(".")[2] in ("p", "lam", "q")
        assert parameter.device.type == ("cpu" if factor else "meta"), name
        assert parameter.dtype == (torch.float64 if factor else torch.float32), name
    assert {layer.rank_mask.device.type for layer in layers.values()} == {"cpu"}

    meta = inject_adapters_(kit.Decoder(), SVD(rank=2, alpha=4.0), device="meta")
    assert {f.device.type for layer in meta.values() for _, f in layer.factors()} == {"meta"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"targets": ["q_prj"]},
            f"targets: 'q_prj' {NOTHING} did you mean q_proj or v_proj? {KINDS}",
        ),
        (
            {"targets": ["layers.0.r_proj"]},
            f"targets: 'layers.0.r_proj' {NOTHING} did you mean v_proj or q_proj? {KINDS}",
        ),
        ({"targets": ["layers"]}, f"targets: 'layers' {NOTHING} {KINDS}"),
        ({"targets": ["q_proj", "zzz"]}, f"targets: 'zzz' {NOTHING} {KINDS}"),
        (
            {"exclude": ["mlp.w1x"]},
            f"exclude: 'mlp.w1x' {NOTHING} did you mean w1? {KINDS}",
        ),
        (
            {"targets": ["q_proj"], "exclude": ["*_proj"]},
            f"no module is left to adapt; {KINDS}",
        ),
        (
            {"targets": "re:.*q_prj"},
            f"targets: 're:.*q_prj' {NOTHING} did you mean q_proj or v_proj? {KINDS}",
        ),
        (
            {"targets": [re.compile("q_proj")]},
            f"targets: 're:q_proj' {NOTHING} did you mean q_proj or v_proj? {KINDS}",
        ),
        ({"targets": r"re:layers\.0\.q_pro"}, NEAR_Q),
        (
            {"targets": "re:(q"},
            "'re:(q' is no regular expression: missing ), unterminated subpattern at position 0.",
        ),
        (
            {"targets": ["q_proj", "w1"], "rank_pattern": {"q_prj": 1}},
            "rank_pattern: 'q_prj' matches no adapted module; did you mean q_proj? "
            "adapted are q_proj, w1.",
        ),
        (
            {"targets": ["q_proj", "w1"], "alpha_pattern": {"w1": 2.0, "v_proj": 1.0}},
            "alpha_pattern: 'v_proj' matches no adapted module; did you mean q_proj? "
            "adapted are q_proj, w1.",
        ),
        (
            {"rank_pattern": {"v_proj": 9}},
            "layers.0.v_proj: rank is 9, but the matrix is 3 x 5; choose a rank of 1 to 3, or "
            "exclude the module.",
        ),
        (
            {"rank_pattern": {"v_proj": "2"}},
            "layers.0.v_proj: rank is '2', expected a whole number of at least 1.",
        ),
        (
            {"alpha_pattern": {"layers.1.v_proj": True}},
            "layers.1.v_proj: alpha is True, expected a finite number above 0.",
        ),
        ({"targets": []}, f"no module is left to adapt; {KINDS}"),
    ],
)
def test_names_that_match_nothing(kit, options, text):
    assert text_and_unchanged(kit, kit.Decoder(), SVD(rank=2, alpha=4.0), **options) == text


def test_model_without_linear_layers(kit):
    text = kit.error_text(inject_adapters_, nn.Sequential(nn.ReLU()), LoRA(rank=1, alpha=1.0))
    assert text == "no module is left to adapt; the model has none."


def test_rank_that_does_not_fit_names_the_module(kit):
    assert text_and_unchanged(kit, kit.Decoder(), SVD(rank=4, alpha=4.0)) == (
        "layers.0.v_proj: rank is 4, but the matrix is 3 x 5; "
        "choose a rank of 1 to 3, or exclude the module."
    )


def test_model_that_is_adapted_already(kit):
    model, _ = kit.adapted(targets=["v_proj"])
    assert text_and_unchanged(kit, model, SVD(rank=2, alpha=4.0), ["q_proj"]) == (
        "layers.0.v_proj is adapted already; inject into the plain model."
    )


def test_model_that_is_itself_a_layer(kit):
    layer = LoRA(rank=1, alpha=1.0).build(nn.Linear(2, 2), device="cpu", dtype=torch.float32)
    for model, kind in [(nn.Linear(2, 2), "Linear"), (layer, "LoRALinear")]:
        assert text_and_unchanged(kit, model, LoRA(rank=1, alpha=1.0)) == (
            f"the model is itself a {kind}, which has no parent to replace it in; "
            "give the module that holds it."
        )


@pytest.mark.parametrize("own_parameter", [True, False])
@pytest.mark.parametrize("tied", ["layers.0.q_proj", "layers.1.q_proj"])
def test_shared_weight(kit, tied, own_parameter):
    model = kit.Decoder()
    weight = model.layers[0].q_proj.weight
    model.layers[1].q_proj.weight = nn.Parameter(weight.data) if own_parameter else weight
    make = SVD(rank=2, alpha=4.0)
    assert text_and_unchanged(kit, model, make, [tied]) == (
        f"{tied} shares its weight (layers.0.q_proj.weight and layers.1.q_proj.weight are one "
        "tensor); exclude it."
    )
    assert len(inject_adapters_(model, make, exclude=["q_proj"])) == 6


def test_head_tied_to_the_embedding_is_no_hindrance_until_it_is_a_target(kit):
    model = kit.Decoder()
    model.output.weight = model.embedding.weight
    make = SVD(rank=2, alpha=4.0)
    assert text_and_unchanged(kit, model, make, ["output"]) == (
        "output shares its weight (output.weight and embedding.weight are one tensor); exclude it."
    )
    assert list(inject_adapters_(model, make)) == ALL


@pytest.mark.parametrize("block", [True, False])
def test_shared_module(kit, block):
    model = kit.Decoder()
    if block:
        model.layers[1] = model.layers[0]
    else:
        model.layers[1].q_proj = model.layers[0].q_proj
    make = SVD(rank=2, alpha=4.0)
    assert text_and_unchanged(kit, model, make) == (
        "layers.0.q_proj and layers.1.q_proj are one module; exclude layers.0.q_proj."
    )


@pytest.mark.parametrize(
    ("make", "roles"),
    [(LoRA(rank=2, alpha=4.0), ("a", "b")), (SVD(rank=2, alpha=4.0), ("p", "lam", "q"))],
)
def test_freeze_base_leaves_the_factors_alone_trainable(kit, make, roles):
    model = kit.Decoder()
    layers = inject_adapters_(model, make, ["q_proj"])
    freeze_base_(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{role}" for name in layers for role in roles}


def test_inside_adapters_says_where_each_tensor_of_the_plain_model_is(kit):
    plain = kit.Decoder()
    names = {name: id(parameter) for name, parameter in plain.named_parameters()}
    layers = inject_adapters_(plain, SVD(rank=2, alpha=4.0), ["q_proj", "output"])
    now = {name: id(parameter) for name, parameter in plain.named_parameters()}
    assert {inside_adapters(name, layers): where for name, where in names.items()}.items() <= (
        now.items()
    )
