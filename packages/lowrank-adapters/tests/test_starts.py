"""Every start: what the factors are, that the model is its base at step 0, and that it learns."""

import pytest
import torch
from torch import nn

from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    GradientApproximation,
    GradientStep,
    LoRA,
    Normal,
    Orthonormal,
    PrincipalActivations,
    PrincipalWeights,
    UnitRows,
    collect_activations,
    collect_gradients,
    inject_adapters_,
    set_rank_,
    start_factors_,
)
from lowrank_adapters.starts import check_statistic

WIDE = torch.float64
METHODS = {
    "lora": LoRA(rank=2, alpha=3.0),
    "rslora": LoRA(rank=2, alpha=3.0, rslora=True),
    "svd": SVD(rank=2, alpha=3.0),
    "dora": DoRA(rank=2, alpha=3.0),
    "dora-attached": DoRA(rank=2, alpha=3.0, detach_norm=False),
    "dora-scalar": DoRA(rank=2, alpha=3.0, magnitude="scalar"),
    "dylora": DyLoRA(rank=2, alpha=3.0),
    "dylora-frozen": DyLoRA(rank=2, alpha=3.0, frozen=True),
}
STARTS = [
    UnitRows(),
    Normal(0.3),
    Orthonormal(),
    PrincipalWeights(),
    PrincipalActivations(),
    GradientStep(),
    GradientApproximation(),
]
ALL_METHODS = pytest.mark.parametrize("method", METHODS)
ALL_STARTS = pytest.mark.parametrize("start", STARTS, ids=lambda start: type(start).__name__)
MOVING = pytest.mark.parametrize(
    "start", [s for s in STARTS if not s.is_zero], ids=lambda start: type(start).__name__
)


def network(dtype=WIDE):
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).to(dtype)


def batches(dtype=WIDE):
    return [torch.randn(8, 6, dtype=dtype) for _ in range(3)]


def started(method, start, dtype=WIDE, factor_dtype=WIDE):
    model, data = network(dtype), batches(dtype)
    layers = inject_adapters_(model, METHODS[method], factor_dtype=factor_dtype)
    statistics = {
        "nothing": lambda: None,
        "weight": lambda: None,
        "activations": lambda: collect_activations(layers, model, data),
        "gradient": lambda: collect_gradients(
            model, layers, lambda x: model(x).square().mean(), data
        ),
    }[start.needs]()
    start_factors_(layers, start, statistics)
    return model, layers


@ALL_METHODS
@ALL_STARTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_model_is_exactly_its_base_at_the_start(method, start, dtype):
    torch.manual_seed(1)
    base = network(dtype)
    torch.manual_seed(1)
    model, layers = started(method, start, dtype, factor_dtype=torch.float32)
    x = torch.randn(9, 6, dtype=dtype)
    assert torch.equal(model(x), base(x))
    for rank in (1, 2) if "dylora" in method else ():
        set_rank_(layers, rank)
        assert torch.equal(model(x), base(x))
    for layer, plain in zip(layers.values(), (base[0], base[2]), strict=True):
        assert torch.equal(layer.base.weight, plain.weight)
        torch.testing.assert_close(
            layer.delta(), torch.zeros(layer.delta().shape), check_dtype=False
        )


@pytest.mark.parametrize("method", ["lora", "svd", "dora-scalar", "dylora"])
@pytest.mark.parametrize("start", [s for s in STARTS if s.needs != "activations"], ids=str)
def test_convolution_and_embedding_are_exactly_their_base_at_the_start(method, start):
    for base, x in (
        (nn.Conv2d(2, 5, 3), torch.randn(2, 2, 6, 5)),
        (nn.Embedding(7, 5), torch.randint(7, (3, 4))),
    ):
        layer = METHODS[method].build(base, device="cpu", dtype=torch.float32)
        layer.start_(start, torch.randn(layer.out_features, layer.in_features))
        assert torch.equal(layer(x), base(x))
        with torch.no_grad():
            for _, factor in layer.factors():
                factor.add_(0.5)
        assert not torch.equal(layer(x), base(x))


@pytest.mark.parametrize("method", ["svd", "dylora"])
def test_start_of_a_masked_layer_is_of_all_its_components(method):
    layer = METHODS[method].build(nn.Linear(6, 7), device="cpu", dtype=WIDE)
    mask = layer.rank_mask
    mask[1] = False
    layer.start_(PrincipalWeights())
    assert layer.rank_mask is mask
    assert mask.tolist() == [True, False]
    x = torch.randn(9, 6, dtype=torch.float32)
    assert torch.equal(layer(x), layer.base(x))
    mask[1] = True
    assert torch.equal(layer(x), layer.base(x))


@ALL_STARTS
def test_components_are_where_the_statistic_is(start):
    size = (6, 6) if start.needs == "activations" else (7, 6)
    for device in ("meta", "cpu"):
        found = start.components(2, 7, 6, torch.ones(size, device=device), 1.0)
        devices = {tensor.device.type for tensor in vars(found).values()}
        assert devices == {"cpu" if start.needs == "nothing" else device}


@ALL_METHODS
@ALL_STARTS
def test_every_factor_that_may_learn_does(method, start):
    model, layers = started(method, start)
    model(torch.randn(9, 6, dtype=WIDE)).square().sum().backward()
    for layer in layers.values():
        learning = {role for role, factor in layer.factors() if factor.grad.abs().max() > 1e-9}
        waiting = {"a", "p", "q", "scale"} if start.is_zero else set()
        # A scalar before a product that was taken off is felt only by way of it.
        assert learning == set(layer.roles) - waiting


@MOVING
@pytest.mark.parametrize("method", ["lora", "svd", "dylora", "dora-scalar"])
def test_update_is_the_difference_of_the_products(method, start):
    _, layers = started(method, start)
    layer = layers["0"]
    before = product(layer)
    if hasattr(layer, "rank_mask"):
        layer.rank_mask[1] = False
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.add_(0.1 * torch.randn_like(factor))
    if hasattr(layer, "rank_mask"):
        before = before[:1] * (2 if method == "dylora" else 1)
    expected = (product(layer) - before).sum(0)
    torch.testing.assert_close(layer.delta(), expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(9, 6, dtype=WIDE)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ expected.T, rtol=1e-12, atol=1e-12)
    a, b = layer.as_lora()
    torch.testing.assert_close(b @ a, expected, rtol=1e-12, atol=1e-12)
    assert len(a) == (2 if hasattr(layer, "rank_mask") else 4)


def product(layer):
    """s · B A of each live component, without the start, written out."""
    found = []
    with torch.no_grad():
        mask = getattr(layer, "rank_mask", torch.ones(2, dtype=torch.bool))
        for k in range(2):
            if layer.roles[0] == "p":
                one = layer.lam[k] * torch.outer(layer.p[:, k], layer.q[k])
            else:
                one = torch.outer(layer.b[:, k], layer.a[k])
            if "scale" in layer.roles:
                one = one * layer.scale
            nested = type(layer).__name__ == "DyLoRALinear"
            scaling = 3.0 / int(mask.sum()) if nested else layer.scaling
            if mask[k]:
                found.append(scaling * one)
    return torch.stack(found)


@pytest.mark.parametrize("method", ["lora", "rslora", "svd", "dylora"])
def test_principal_weights_are_the_best_approximation_of_the_weight(method):
    _, layers = started(method, PrincipalWeights())
    for layer in layers.values():
        u, sigma, v = torch.linalg.svd(layer.base.weight.detach())
        expected = sigma[0] * torch.outer(u[:, 0], v[0]) + sigma[1] * torch.outer(u[:, 1], v[1])
        torch.testing.assert_close(product(layer).sum(0), expected, rtol=1e-10, atol=1e-10)
        if method == "lora":
            torch.testing.assert_close(layer.a.norm(dim=1), layer.b.norm(dim=0))


def weight_gradients(model, data):
    """By autograd, of the plain model."""
    loss = sum(model(x).square().mean() for x in data) / len(data)
    return torch.autograd.grad(loss, [model[0].weight, model[2].weight])


@pytest.mark.parametrize("frozen", [False, True])
def test_collected_gradients_are_those_of_the_weights(frozen):
    model, data = network(), batches()
    expected = weight_gradients(model, data)
    layers = inject_adapters_(model, LoRA(rank=2, alpha=1.0), factor_dtype=WIDE)
    nn.init.ones_(layers["0"].b)  # the adapters are off meanwhile
    model.requires_grad_(not frozen)
    layers["2"].enabled = False
    found = collect_gradients(model, layers, lambda x: model(x).square().mean(), data)
    torch.testing.assert_close(tuple(found.values()), expected, rtol=1e-12, atol=1e-14)
    assert list(found) == ["0", "2"]
    assert all(p.grad is None and p.requires_grad is not frozen for p in model.parameters())
    assert (layers["0"].enabled, layers["2"].enabled) == (True, False)
    assert not layers["0"].base._forward_hooks


def test_collected_gradients_of_convolutions_and_embeddings():
    model = nn.Sequential(
        nn.Embedding(9, 4), nn.Conv1d(5, 3, 2, stride=2, padding=1), nn.Flatten(), nn.Linear(9, 2)
    ).double()
    data = [torch.randint(9, (4, 5)) for _ in range(2)]
    loss = sum(model(x).square().mean() for x in data) / 2
    expected = torch.autograd.grad(loss, [model[0].weight, model[1].weight])
    layers = inject_adapters_(model, SVD(rank=2, alpha=1.0), ["0", "1"])
    found = collect_gradients(model, layers, lambda x: model(x).square().mean(), data)
    torch.testing.assert_close(found["0"], expected[0].T, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["1"], expected[1].flatten(1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("first", ["linear", "conv2d"])
def test_gradients_are_collected_where_the_next_module_works_in_place(first):
    base = {"linear": nn.Linear(6, 5), "conv2d": nn.Conv2d(6, 5, 1)}[first]
    x = torch.randn(3, 6) if first == "linear" else torch.randn(3, 6, 2, 2)
    model = nn.Sequential(base, nn.ReLU(inplace=True), nn.Flatten())
    model(x).square().mean().backward()
    expected = base.weight.grad.flatten(1)
    layers = inject_adapters_(model, LoRA(2, 2.0), "0")
    found = collect_gradients(model, layers, lambda x: model(x).square().mean(), [x])
    torch.testing.assert_close(found["0"], expected)


def test_gradients_of_a_scaled_embedding_are_those_of_its_table():
    class TwiceScaledWordEmbedding(nn.Embedding):
        embed_scale = 2.5

        def forward(self, indices):
            return super().forward(indices) * self.embed_scale

    model, words = nn.Sequential(TwiceScaledWordEmbedding(7, 4)), torch.tensor([1, 3, 3])
    model(words).square().mean().backward()
    expected = model[0].weight.grad.T
    layers = inject_adapters_(model, LoRA(2, 2.0), "0")
    found = collect_gradients(model, layers, lambda x: model(x).square().mean(), [words])
    torch.testing.assert_close(found["0"], expected)


def test_layer_that_nothing_reaches(kit):
    model = nn.ModuleDict({"used": nn.Linear(6, 6), "idle": nn.Linear(6, 6)})
    layers = inject_adapters_(model, LoRA(rank=2, alpha=1.0))
    data = batches(torch.float32)[:2]
    text = (
        "nothing reached idle in 2 batches; leave them out or collect over batches that use them."
    )
    used = model["used"]
    assert kit.error_text(collect_gradients, model, layers, lambda x: used(x).sum(), data) == text
    assert kit.error_text(collect_activations, layers, used, data) == text


def test_what_was_on_before_collecting_is_on_after_a_failure():
    model, data = network(), batches()
    layers = inject_adapters_(model, LoRA(rank=2, alpha=1.0), factor_dtype=WIDE)

    def fail(_):
        raise KeyError("no such column")

    with pytest.raises(KeyError):
        collect_gradients(model, layers, fail, data)
    assert all(layer.enabled for layer in layers.values())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_collected_activations_are_second_moments():
    model, data = network(), batches()
    inputs = [torch.tanh(model[0](x)) for x in data]
    layers = inject_adapters_(model, LoRA(rank=2, alpha=1.0), factor_dtype=WIDE)
    found = collect_activations(layers, model, data)
    for name, xs in (("0", data), ("2", inputs)):
        expected = sum(torch.outer(row, row) for x in xs for row in x) / 3
        torch.testing.assert_close(found[name], expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["lora", "svd"])
def test_principal_activations_keep_most_of_the_inputs(method):
    model, data = network(), batches()
    layers = inject_adapters_(model, METHODS[method], factor_dtype=WIDE)
    start_factors_(layers, PrincipalActivations(), collect_activations(layers, model, data))
    for layer, inputs in zip(layers.values(), (data, [model[:2](x) for x in data]), strict=True):
        rows = (layer.a if method == "lora" else layer.q).detach()
        torch.testing.assert_close(rows @ rows.T, torch.eye(2, dtype=WIDE))
        x = torch.cat(inputs).detach()
        best = torch.linalg.svdvals(x)[:2].square().sum()
        torch.testing.assert_close((x @ rows.T).square().sum(), best)


def test_gradient_step_goes_down_the_gradient():
    gradient = torch.randn(7, 6, dtype=WIDE)
    found = GradientStep(size=0.01).components(2, 7, 6, gradient, 1.5)
    u, sigma, v = torch.linalg.svd(gradient)
    step = found.columns @ torch.diag(found.values) @ found.rows
    best = u[:, :2] @ torch.diag(sigma[:2]) @ v[:2]
    torch.testing.assert_close(step, -0.01 * best / sigma[:2].mean(), rtol=1e-10, atol=1e-10)
    nothing = GradientStep().components(2, 7, 6, torch.zeros(7, 6), 1.0)
    assert not nothing.values.any()


def test_gradient_step_of_svd_has_lambda_of_the_given_size():
    _, layers = started("svd", GradientStep(size=0.01))
    for layer in layers.values():
        torch.testing.assert_close(layer.lam.mean().item(), -0.01)
        assert (layer.lam < 0).all()


def test_gradient_approximation_is_loras_best_first_step():
    gradient = torch.randn(7, 6, dtype=WIDE)
    found = GradientApproximation(gamma=4.0).components(2, 7, 6, gradient, 1.5)
    u, sigma, v = torch.linalg.svd(gradient)
    torch.testing.assert_close(found.values, torch.full((2,), 7**0.5 / 4), check_dtype=False)
    a, b = found.rows, found.columns
    # A step on A and B with rate 1 / value² moves B A by B Bᵀ G + G Aᵀ A: the best of rank 2r.
    moved = b @ b.T @ gradient + gradient @ a.T @ a
    best = u[:, :4] @ torch.diag(sigma[:4]) @ v[:4]
    torch.testing.assert_close(moved, best, rtol=1e-10, atol=1e-10)


def test_orthonormal_and_normal_and_unit_rows():
    for start in (UnitRows(), Normal(0.02), Orthonormal()):
        found = start.components(8, 400, 500, None, 1.0)
        assert not found.values.any()
        for rows in (found.columns.T, found.rows):
            if isinstance(start, Normal):
                assert 0.018 < rows.std() < 0.022
            else:
                torch.testing.assert_close(rows.norm(dim=1), torch.ones(8))
            if isinstance(start, Orthonormal):
                torch.testing.assert_close(rows @ rows.T, torch.eye(8), rtol=0, atol=1e-6)


def test_the_product_that_is_taken_off_is_saved():
    _, layers = started("svd", GradientStep())
    assert {"start_a", "start_b"} < {name for name, _ in layers["0"].owned()}
    start_factors_(layers, UnitRows())
    assert not {"start_a", "start_b"} & {name for name, _ in layers["0"].owned()}


def test_what_a_start_cannot_be_computed_from(kit):
    _, layers = started("lora", UnitRows())
    before = layers["0"].a.clone()
    refuse = lambda *args: kit.error_text(start_factors_, layers, *args)  # noqa: E731
    assert refuse(GradientStep()) == (
        "0: GradientStep needs the gradient; inject with another start, collect the statistics, "
        "and call start_factors_ with them."
    )
    assert refuse(PrincipalActivations(), {"0": torch.zeros(7, 6)}) == (
        "0: PrincipalActivations got (7, 6) as the activations, expected (6, 6); collect them on "
        "this model."
    )
    assert refuse(GradientStep(), {"0": torch.full((7, 6), torch.nan)}) == (
        "0: GradientStep got numbers that are not finite as the gradient; look for the batch that "
        "gave them."
    )
    wide = LoRA(rank=4, alpha=1.0).build(nn.Linear(6, 7), device="cpu", dtype=WIDE)
    assert kit.error_text(wide.start_, GradientApproximation(), torch.zeros(7, 6)) == (
        "rank is 4, but GradientApproximation needs 2 · rank directions of a matrix 7 x 6; choose "
        "a rank of 1 to 3."
    )
    assert torch.equal(layers["0"].a, before)
    check_statistic(UnitRows(), None, 7, 6)
    assert kit.error_text(Normal, 0.0) == "std is 0.0, expected a finite number above 0."
    assert kit.error_text(collect_gradients, nn.Linear(2, 2), {}, len, []) == (
        "there are no batches to collect from, expected at least one."
    )
    embedding = LoRA(rank=2, alpha=1.0).build(nn.Embedding(5, 4), device="cpu", dtype=WIDE)
    assert kit.error_text(collect_activations, {"e": embedding}, len, []) == (
        "e is a Embedding, expected a linear layer; give it a start that needs no activations."
    )
