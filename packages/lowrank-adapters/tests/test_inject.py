"""Which layers are adapted, in what order, and that a refusal changes nothing."""

import pytest
import torch
from torch import nn

from lowrank_adapters import SVD, LoRA, freeze_base_, inject_adapters_, inside_adapters

BLOCK = ("q_proj", "v_proj", "mlp.w1", "mlp.w2")
ALL = [f"layers.{i}.{name}" for i in (0, 1) for name in BLOCK]
KINDS = "the model has output, q_proj, v_proj, w1, w2."


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
    assert others == {f"{n}.base" for n in expected} | (everything - set(expected))


def test_a_suffix_begins_at_a_dot(kit):
    model = nn.ModuleDict({"up_proj": nn.Linear(2, 2), "p_proj": nn.Linear(2, 2)})
    assert list(inject_adapters_(model, LoRA(rank=1, alpha=1.0), ["p_proj"])) == ["p_proj"]


def test_all_linear_leaves_out_heads_of_both_names():
    model = nn.ModuleDict({n: nn.Linear(2, 2) for n in ("lm_head", "output", "output_proj")})
    assert list(inject_adapters_(model, LoRA(rank=1, alpha=1.0))) == ["output_proj"]


@pytest.mark.parametrize("make", [LoRA(rank=2, alpha=4.0), SVD(rank=2, alpha=4.0)])
def test_injected_model_starts_as_the_plain_one(kit, make):
    model = kit.Decoder()
    tokens = torch.arange(11)
    expected = model(tokens)
    inject_adapters_(model, make)
    assert torch.equal(model(tokens), expected)


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
            f"'q_prj' matches no linear layer; did you mean q_proj or v_proj? {KINDS}",
        ),
        (
            {"targets": ["layers.0.r_proj"]},
            "'layers.0.r_proj' matches no linear layer; did you mean v_proj or q_proj? " + KINDS,
        ),
        ({"targets": ["embedding"]}, f"'embedding' matches no linear layer; {KINDS}"),
        ({"targets": ["q_proj", "zzz"]}, f"'zzz' matches no linear layer; {KINDS}"),
        (
            {"exclude": ["mlp.w1x"]},
            f"'mlp.w1x' matches no linear layer; did you mean w1? {KINDS}",
        ),
        (
            {"targets": ["q_proj"], "exclude": ["*_proj"]},
            f"no linear layer is left to adapt; {KINDS}",
        ),
        ({"targets": []}, f"no linear layer is left to adapt; {KINDS}"),
    ],
)
def test_names_that_match_nothing(kit, options, text):
    assert text_and_unchanged(kit, kit.Decoder(), SVD(rank=2, alpha=4.0), **options) == text


def test_model_without_linear_layers(kit):
    text = kit.error_text(inject_adapters_, nn.Sequential(nn.ReLU()), LoRA(rank=1, alpha=1.0))
    assert text == "no linear layer is left to adapt; the model has none."


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


@pytest.mark.parametrize("tied", ["layers.0.q_proj", "layers.1.q_proj"])
def test_shared_weight(kit, tied):
    model = kit.Decoder()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
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
