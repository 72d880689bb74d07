"""Saved adapters: exact sets of keys, and a refusal that changes nothing."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank_adapters import (
    SVD,
    AdapterError,
    DoRA,
    DyLoRA,
    FactorStack,
    GradientStep,
    LoRA,
    PrincipalWeights,
    RankSampler,
    adapter_state_dict,
    freeze_base_,
    inject_adapters_,
    load_adapter_,
    load_adapter_state_dict_,
    save_adapter,
    set_rank_,
    start_factors_,
)

FILE = "adapter.safetensors"
UNSAID = "does not say which layers it is of; save it again."
MAKERS = [LoRA(rank=3, alpha=4.5), SVD(rank=3, alpha=4.5)]


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def assert_same(model, expected):
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)


def refusal(kit, call, model, *args):
    """The text of the refusal, having seen that the model was left as it was."""
    before = copy_of(model)
    text = kit.error_text(call, model, *args)
    assert_same(model, before)
    return text


def two_layers(kit, folder):
    """A model with two adapted layers, and another with the same whose adapter is saved."""
    models = [
        kit.adapted(SVD(rank=2, alpha=1.0), blocks=1, targets=["q_proj", "w1"])[0] for _ in "12"
    ]
    save_adapter(models[1], folder)
    return models[0]


@pytest.mark.parametrize(
    ("make", "own"),
    [(MAKERS[0], {"a", "b"}), (MAKERS[1], {"p", "lam", "q", "rank_mask"})],
)
def test_state_has_exactly_the_declared_tensors_and_they_are_live(kit, make, own):
    model, layers = kit.adapted(make, targets=["q_proj", "mlp.w2"])
    state = adapter_state_dict(model)
    assert set(state) == {f"{name}.{key}" for name in layers for key in own}
    for name, tensor in state.items():
        assert not tensor.requires_grad
        assert tensor.data_ptr() == model.state_dict()[name].data_ptr(), name


def test_layer_alone_has_the_names_of_its_own_state():
    layer = SVD(2, 1.0).build(nn.Linear(4, 3), device="cpu", dtype=torch.float32)
    assert set(adapter_state_dict(layer)) == {"p", "lam", "q", "rank_mask"}


def test_plain_model_has_no_adapter_state(kit):
    assert adapter_state_dict(kit.Decoder()) == {}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("stacked", [False, True])
def test_saved_adapter_is_loaded_bit_for_bit(kit, tmp_path, make, stacked):
    model, layers = kit.adapted(make)
    other, other_layers = kit.adapted(make)
    if stacked:
        FactorStack(layers)
        stack = FactorStack(other_layers)
    saved = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    base = {n: t for n, t in copy_of(other).items() if n not in saved}

    path = save_adapter(model, tmp_path / "new" / "folder")
    load_adapter_(other, tmp_path / "new" / "folder")

    assert path == tmp_path / "new" / "folder" / FILE
    assert names_in(path.parent) == [FILE]
    assert_same(other, base | saved)
    torch.testing.assert_close(load_file(path), saved, rtol=0, atol=0)
    if stacked:
        stack.check_bound()
        for group in stack.groups:
            for index, name in enumerate(group.names):
                key = f"{name}.{group.role}"
                tokens = other_layers[name].as_tokens(group.role, saved[key])
                assert torch.equal(group.values[index], tokens), key


def test_layers_that_share_a_mask_are_saved_and_loaded(kit, tmp_path):
    model, layers = kit.adapted(DyLoRA(rank=3, alpha=4.5))
    RankSampler(layers, seed=0)
    set_rank_(layers, 2)
    assert len({layer.rank_mask.data_ptr() for layer in layers.values()}) == 1
    saved = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    save_adapter(model, tmp_path)
    set_rank_(layers, 1)
    load_adapter_(model, tmp_path)
    torch.testing.assert_close(adapter_state_dict(model), saved, rtol=0, atol=0)


def test_saving_again_replaces_the_file(kit, tmp_path):
    model, layers = kit.adapted()
    save_adapter(model, tmp_path)
    with torch.no_grad():
        layers["layers.0.q_proj"].lam.fill_(5)
    path = save_adapter(model, tmp_path)
    assert (load_file(path)["layers.0.q_proj.lam"] == 5).all()
    assert names_in(tmp_path) == [FILE]


def test_what_could_not_be_loaded_is_not_saved_over_what_can(kit, tmp_path):
    model, layers = kit.adapted()
    before = save_adapter(model, tmp_path).read_bytes()
    with torch.no_grad():
        layers["layers.0.q_proj"].lam[1] = float("nan")
    with pytest.raises(
        AdapterError, match=r"layers\.0\.q_proj\.lam has values that are not finite"
    ):
        save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="there are no layers to save to"):
        save_adapter(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    assert names_in(tmp_path) == [FILE]


def test_failure_to_save_keeps_the_file_that_was_there(kit, tmp_path, monkeypatch):
    model, _ = kit.adapted()
    before = save_adapter(model, tmp_path).read_bytes()

    def fail(_, path, **__):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("lowrank_adapters.state.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    assert names_in(tmp_path) == [FILE]


@pytest.mark.parametrize(
    ("drop", "add", "text"),
    [
        (["layers.0.mlp.w1.lam"], [], "missing ['layers.0.mlp.w1.lam'], unexpected none"),
        ([], ["z", "layers.0.q_proj.a"], "missing none, unexpected ['layers.0.q_proj.a', 'z']"),
        (
            ["layers.0.q_proj.p", "layers.0.mlp.w1.rank_mask"],
            ["b"],
            "missing ['layers.0.mlp.w1.rank_mask', 'layers.0.q_proj.p'], unexpected ['b']",
        ),
    ],
)
def test_other_keys(kit, tmp_path, drop, add, text):
    model = two_layers(kit, tmp_path)
    state = load_file(tmp_path / FILE)
    for name in drop:
        del state[name]
    state |= {name: torch.zeros(1) for name in add}
    assert refusal(kit, load_adapter_state_dict_, model, state) == (
        f"the saved adapter does not fit: {text}; inject the same method into the same modules "
        "first."
    )


def test_other_shape(kit, tmp_path):
    model = two_layers(kit, tmp_path)
    state = load_file(tmp_path / FILE)
    # The last key in the order of copying: those before it must not have been copied.
    state["layers.0.mlp.w1.q"] = torch.zeros(3, 5)
    assert refusal(kit, load_adapter_state_dict_, model, state) == (
        "layers.0.mlp.w1.q is (3, 5) in the saved adapter, but (2, 5) here; load it into the model "
        "and rank it was trained with."
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite(kit, tmp_path, value):
    model = two_layers(kit, tmp_path)
    state = load_file(tmp_path / FILE)
    state["layers.0.mlp.w1.q"][1, 3] = value
    assert refusal(kit, load_adapter_state_dict_, model, state) == (
        "layers.0.mlp.w1.q is not finite in the saved adapter; take an earlier one."
    )


@pytest.mark.parametrize("pickles", [[], ["adapter_model.bin"], ["a.pt", "b.ckpt"]])
def test_file_that_is_missing_even_if_a_pickle_is_there(kit, tmp_path, pickles):
    model = two_layers(kit, tmp_path / "saved")
    for name in pickles:
        torch.save(adapter_state_dict(model), tmp_path / name)
    remedy = "only adapter.safetensors is read, never a pickle"
    if pickles:
        remedy = (
            f"{', '.join(pickles)} is a pickle, which can run code when opened and is not read: "
            "write it again as adapter.safetensors, with the library that it is from"
        )
    text = refusal(kit, load_adapter_, model, tmp_path)
    assert text == f"{tmp_path / FILE} does not exist; {remedy}."


@pytest.mark.parametrize("part", [0, 4, 8, 0.5, -1])
def test_file_that_is_cut_short(kit, tmp_path, part):
    model = two_layers(kit, tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: int(len(whole) * part) if part == 0.5 else part])
    text = refusal(kit, load_adapter_, model, tmp_path)
    assert text.startswith(f"{tmp_path / FILE} is not a whole safetensors file: ")


class Opened:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, "w"))


def test_pickle_under_the_name_of_the_file_is_not_opened(kit, tmp_path):
    model = two_layers(kit, tmp_path)
    trace = tmp_path / "trace"
    poison = pickle.dumps(Opened(str(trace)))
    (tmp_path / FILE).write_bytes(poison)
    text = refusal(kit, load_adapter_, model, tmp_path)
    assert "is not a whole safetensors file" in text
    assert not trace.exists()
    pickle.loads(poison).close()  # the trace is left where a pickle is opened
    assert trace.exists()


def test_loaded_numbers_take_the_dtype_of_the_model():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0] = SVD(2, 1.0).build(model[0], device="cpu", dtype=torch.bfloat16)
    state = {name: torch.rand(t.shape) for name, t in adapter_state_dict(model).items()}
    state["0.rank_mask"] = torch.tensor([True, False])
    load_adapter_state_dict_(model, state)
    for name, tensor in adapter_state_dict(model).items():
        expected = state[name] if name == "0.rank_mask" else state[name].bfloat16()
        assert torch.equal(tensor, expected), name


def test_numbers_that_the_dtype_of_the_model_cannot_hold(kit):
    model = nn.Sequential(nn.Linear(4, 3))
    model[0] = LoRA(1, 1.0).build(model[0], device="cpu", dtype=torch.float16)
    state = {"0.a": torch.ones(1, 4), "0.b": torch.full((3, 1), -1e6)}
    assert refusal(kit, load_adapter_state_dict_, model, state) == (
        "0.b has values up to 1e+06, too large for torch.float16; inject with a wider factor_dtype."
    )


def test_mask_that_is_saved_as_numbers(kit, tmp_path):
    model = two_layers(kit, tmp_path)
    state = load_file(tmp_path / FILE)
    state["layers.0.mlp.w1.rank_mask"] = torch.tensor([0.5, 0.0])
    assert refusal(kit, load_adapter_state_dict_, model, state) == (
        "layers.0.mlp.w1.rank_mask is torch.float32 in the saved adapter, but torch.bool here; "
        "load it into the method it was trained with."
    )


def test_factors_on_the_meta_device(kit, tmp_path):
    model = two_layers(kit, tmp_path)
    layer = model.layers[0].q_proj
    layer.q = nn.Parameter(layer.q.to("meta"))
    state = load_file(tmp_path / FILE)
    assert kit.error_text(load_adapter_state_dict_, model, state) == (
        "layers.0.q_proj.q is on the meta device; put the factors on a real one first."
    )


def test_layers_that_would_be_computed_again_over_what_was_loaded(kit):
    state = adapter_state_dict(kit.adapted(DoRA(rank=2, alpha=1.0), targets="q_proj")[0])
    with torch.device("meta"):
        model = kit.Decoder()
    inject_adapters_(model, DoRA(rank=2, alpha=1.0), "q_proj")
    assert kit.error_text(load_adapter_state_dict_, model, state) == (
        "layers.0.q_proj waits for the weights of its base, which was on the meta device; load "
        "them and call materialise_(model) first."
    )


@pytest.mark.parametrize(
    ("make", "width", "text"),
    [
        (
            SVD(rank=2, alpha=3.0),
            5,
            "has scaling 1.5 here, but the adapter in {} was saved with 0.5",
        ),
        (SVD(rank=3, alpha=1.5), 5, "has rank 3 here, but the adapter in {} was saved with 2"),
        (
            LoRA(rank=2, alpha=1.0),
            5,
            "has kind LoRALinear here, but the adapter in {} was saved with SVDLinear",
        ),
        (
            SVD(rank=2, alpha=1.0),
            6,
            "has base 6 x 6 here, but the adapter in {} was saved with 5 x 5",
        ),
    ],
)
def test_layers_of_another_kind_base_rank_or_scaling(kit, tmp_path, make, width, text):
    two_layers(kit, tmp_path)
    model, _ = kit.adapted(make, blocks=1, width=width, targets=["q_proj", "w1"])
    assert refusal(kit, load_adapter_, model, tmp_path) == (
        f"layers.0.q_proj {text.format(tmp_path / FILE)}; load it into the model and method it "
        "was trained with."
    )


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        (None, "has the format None, expected 'lowrank-adapters 1'; load a file that save_adapter"),
        (
            {"format": "pt"},
            "has the format 'pt', expected 'lowrank-adapters 1'; load a file that save_adapter",
        ),
        ({}, "does not say which layers it is of; save it again."),
        ({"layers": "[1]"}, "does not say which layers it is of; save it again."),
        (
            {"layers": '{"layers.0.q_proj": 1}'},
            "does not say which layers it is of; save it again.",
        ),
        ({"layers": "[" * 100000}, "does not say which layers it is of; save it again."),
    ],
)
def test_file_from_elsewhere(kit, tmp_path, metadata, text):
    model = two_layers(kit, tmp_path)
    if metadata is not None:
        metadata = {"format": "lowrank-adapters 1"} | metadata
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, metadata=metadata)
    assert f"{tmp_path / FILE} {text}" in refusal(kit, load_adapter_, model, tmp_path)


def started(kit, make, stacked):
    """A trained model whose start has a product, with its layers."""
    model = kit.Decoder()
    layers = inject_adapters_(model, make)
    gradients = {n: torch.randn(la.out_features, la.in_features) for n, la in layers.items()}
    start_factors_(layers, GradientStep(size=0.5), gradients)
    if stacked:
        FactorStack(layers)
    return kit.shaken(model), layers


def load_by_file(model, trained, folder):
    save_adapter(trained, folder)
    load_adapter_(model, folder)


def load_by_state(model, trained, _):
    load_adapter_state_dict_(model, adapter_state_dict(trained))


def load_by_torch(model, trained, _):
    model.load_state_dict({name: tensor.clone() for name, tensor in trained.state_dict().items()})


LOADS = pytest.mark.parametrize("load", [load_by_file, load_by_state, load_by_torch])


@LOADS
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("make", [SVD(3, 4.5), LoRA(3, 4.5), DoRA(2, 4.0)], ids=str)
def test_the_product_of_a_start_is_loaded_into_a_fresh_model(kit, tmp_path, load, make, stacked):
    trained, _ = started(kit, make, stacked)
    model = kit.Decoder()
    model.load_state_dict(
        {name.replace(".base.", "."): t for name, t in trained.state_dict().items()}, strict=False
    )
    layers = inject_adapters_(model, make)
    if stacked:
        stack = FactorStack(layers)
    load(model, trained, tmp_path)
    words = torch.arange(11)
    assert torch.equal(model(words), trained(words))
    assert_same(model, copy_of(trained))
    for name, tensor in adapter_state_dict(trained).items():
        assert tensor.data_ptr() != adapter_state_dict(model)[name].data_ptr(), name
    if stacked:
        stack.check_bound()


@LOADS
def test_a_state_without_a_start_takes_the_layers_own_away(kit, tmp_path, load):
    trained, _ = kit.adapted(LoRA(3, 4.5))
    model, _ = kit.adapted(LoRA(3, 4.5, start=PrincipalWeights()))
    load(model, trained, tmp_path)
    assert set(adapter_state_dict(model)) == set(adapter_state_dict(trained))


def test_a_state_without_the_factors_says_nothing_of_the_start(kit):
    model, _ = kit.adapted(LoRA(3, 4.5, start=PrincipalWeights()))
    before = copy_of(model)
    own = adapter_state_dict(model)
    model.load_state_dict({n: t for n, t in before.items() if n not in own}, strict=False)
    assert_same(model, before)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4)])
def test_product_of_a_start_of_another_shape(kit, shape):
    trained, _ = started(kit, LoRA(3, 4.5), False)
    model, _ = kit.adapted(LoRA(3, 4.5))
    state = adapter_state_dict(trained) | {"layers.0.q_proj.start_a": torch.zeros(shape)}
    assert refusal(kit, load_adapter_state_dict_, model, state) == (
        f"layers.0.q_proj.start_a is {shape} in the saved adapter, but (3, 5) here; load it into "
        "the model and rank it was trained with."
    )
    with pytest.raises(RuntimeError, match=r"size mismatch for layers\.0\.q_proj\.start_a"):
        model.load_state_dict(trained.state_dict() | state)


@pytest.mark.parametrize("own", [True, False])
def test_half_of_a_start(kit, own):
    trained, _ = started(kit, LoRA(3, 4.5), False)
    model, _ = started(kit, LoRA(3, 4.5), False) if own else kit.adapted(LoRA(3, 4.5))
    state = adapter_state_dict(trained)
    del state["layers.0.q_proj.start_b"]
    text = refusal(kit, load_adapter_state_dict_, model, state)
    missing, unexpected = "['layers.0.q_proj.start_b']", "none"
    if not own:
        missing, unexpected = "none", "['layers.0.q_proj.start_a']"
    assert f"missing {missing}, unexpected {unexpected};" in text


@pytest.mark.parametrize("make", [SVD(3, 4.5), DoRA(2, 4.0)], ids=str)
def test_a_run_with_a_start_goes_on_as_it_would_have(kit, tmp_path, make):
    def train(model, optimizer, steps):
        for step in steps:
            words = torch.tensor([step, (3 * step) % 11])
            optimizer.zero_grad()
            model(words).square().mean().backward()
            optimizer.step()

    def of(model):
        freeze_base_(model)
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model, layers = started(kit, make, False)
    plain = {n.replace(".base.", "."): t.clone() for n, t in model.state_dict().items()}
    optimizer = of(model)
    train(model, optimizer, range(4))
    save_adapter(model, tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(4, 8))

    again = kit.Decoder()
    again.load_state_dict({name: plain[name] for name in again.state_dict()})
    inject_adapters_(again, make)
    load_adapter_(again, tmp_path)
    optimizer = of(again)
    optimizer.load_state_dict(saved)
    train(again, optimizer, range(4, 8))
    assert_same(again, copy_of(model))
    assert all(layer.start_a is not None for layer in layers.values())
