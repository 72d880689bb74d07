"""Every kind of base: the update against its twin, and a weight changed by the same update."""

import pytest
import torch
from torch import nn

from lowrank_adapters import DoRALinear, DyLoRALinear, LoRALinear, SVDLinear
from lowrank_adapters.maps import dense_matrix, map_of

MASK = torch.tensor([True, False, True])
WIDE = {"dtype": torch.float64}
KINDS = [LoRALinear, SVDLinear, DyLoRALinear]


class Conv1D(nn.Module):
    """As the one of transformers: y = x W + b, with W (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf, **WIDE))
        self.bias = nn.Parameter(torch.randn(nf, **WIDE))

    def forward(self, x):
        return x @ self.weight + self.bias


class TwoScaledWordEmbedding(nn.Embedding):
    """As those of Bart in transformers."""

    embed_scale = 2.5

    def forward(self, indices):
        return super().forward(indices) * self.embed_scale


class BufferScaledWordEmbedding(nn.Embedding):
    """As those of Gemma 3."""

    def __init__(self, *widths, scale, **options):
        super().__init__(*widths, **options)
        self.scalar_embed_scale = scale
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, indices):
        return super().forward(indices) * self.embed_scale.to(self.weight.dtype)


def bases():
    channels_last = nn.Conv2d(2, 4, 3, **WIDE).to(memory_format=torch.channels_last)
    image, tokens = torch.randn(2, 2, 6, 5, **WIDE), torch.randn(2, 3, 6, **WIDE)
    return {
        "linear": (nn.Linear(6, 5, **WIDE), tokens),
        "vector": (nn.Linear(6, 5, **WIDE), tokens[0, 0]),
        "nothing": (nn.Linear(6, 5, **WIDE), tokens[:0]),
        "conv1d-of-transformers": (Conv1D(5, 6), tokens),
        "conv1d": (nn.Conv1d(2, 4, 3, padding="same", dilation=2, **WIDE), image[:, :, 0]),
        "conv2d": (
            nn.Conv2d(2, 4, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(2, 1), **WIDE),
            image,
        ),
        "conv2d-channels-last": (channels_last, image),
        "embedding": (nn.Embedding(7, 4, padding_idx=2, **WIDE), torch.tensor([[0, 2], [6, 6]])),
        "scaled-embedding": (TwoScaledWordEmbedding(7, 4, **WIDE), torch.tensor([[0, 2], [6, 6]])),
        "buffer-scaled-embedding": (
            BufferScaledWordEmbedding(7, 4, scale=33.94, **WIDE),
            torch.tensor([[0, 2], [6, 6]]),
        ),
    }


def shaken(kind, base):
    layer = kind(base, rank=3, alpha=4.5, **WIDE)
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.normal_()
    if kind is SVDLinear:
        layer.rank_mask.copy_(MASK)
    if kind is DyLoRALinear:
        layer.rank_mask[2] = False
    return layer


def expected_update(twin, layer):
    if isinstance(layer, SVDLinear):
        return twin.update_matrix(layer.p, layer.lam, layer.q, MASK, 1.5)
    nested = isinstance(layer, DyLoRALinear)
    alive = torch.tensor([True, True, not nested])
    scaling = 4.5 / 2 if nested else 1.5
    return twin.update_matrix(layer.b, torch.ones(3), layer.a, alive, scaling)


@pytest.mark.parametrize("name", bases())
@pytest.mark.parametrize("kind", KINDS)
def test_base_with_the_update_in_its_weight_gives_what_the_layer_gives(twin, kind, name):
    base, x = bases()[name]
    layer = shaken(kind, base)
    with torch.no_grad():
        found, before = layer(x), base(x)
        delta = layer.delta()
        torch.testing.assert_close(delta, expected_update(twin, layer), rtol=1e-12, atol=1e-12)
        layer.map.add_(base, delta)
        torch.testing.assert_close(base(x), found, rtol=1e-12, atol=1e-12)
    assert found.numel() == 0 or (found - before).abs().max() > 0.1
    assert found.shape == before.shape


@pytest.mark.parametrize("name", bases())
def test_matrix_is_the_weight_by_output_and_input(name):
    base, x = bases()[name]
    linear_map = map_of(base)
    assert linear_map.matrix(base).shape == (linear_map.out_width, linear_map.in_width)
    with torch.no_grad():
        y = linear_map.down(x, linear_map.matrix(base))
        bias = getattr(base, "bias", None)
        if bias is not None:
            y = y + bias.view(
                -1, *(1,) * (y.dim() - 2 if "conv2d" in name or name == "conv1d" else 0)
            )
        torch.testing.assert_close(y, base(x), rtol=1e-12, atol=1e-12)
    dense = dense_matrix(linear_map, base)
    assert torch.equal(dense, linear_map.matrix(base))
    dense.zero_()
    assert base.weight.abs().max() > 0


def test_convolution_equals_the_twin_in_values_and_all_gradients(twin):
    base, images = bases()["conv2d"]
    layer, images = shaken(LoRALinear, base), images.requires_grad_()
    found = layer(images)
    rows = [
        twin.lora_linear(patch, base.weight.flatten(1), base.bias, layer.a, layer.b, 1.5)
        for image in images
        for patch in twin.patches(image, base.kernel_size, base.stride, base.padding, base.dilation)
    ]
    expected = torch.stack(rows).view(2, -1, 4).mT.reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent, wanted = torch.randn_like(found), [images, layer.a, layer.b]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, cotangent),
        torch.autograd.grad(expected, wanted, cotangent),
        rtol=1e-11,
        atol=1e-11,
    )


def test_embedding_equals_the_twin_in_values_and_all_gradients(twin):
    base, indices = bases()["embedding"]
    layer = shaken(SVDLinear, base)
    found = layer(indices)
    one_hot, zeros = torch.eye(7, **WIDE), torch.zeros(4, **WIDE)
    factors = [layer.p, layer.lam, layer.q]
    rows = [
        twin.svd_linear(one_hot[i], base.weight.T, zeros, *factors, MASK, 1.5)
        for i in indices.flatten()
    ]
    expected = torch.stack(rows).view(2, 2, 4)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(found)
    cotangent[0, 1] = 0  # the padding's row learns nothing, as in torch
    torch.testing.assert_close(
        torch.autograd.grad(found, factors, cotangent),
        torch.autograd.grad(expected, factors, cotangent),
        rtol=1e-12,
        atol=1e-12,
    )
    layer(indices[0, 1]).sum().backward()
    assert not layer.q.grad.any()


@pytest.mark.parametrize("name", ["linear", "conv1d-of-transformers"])
def test_multiply_is_the_product_without_the_bias(name):
    base, _ = bases()[name]
    linear_map = map_of(base)
    rows = torch.randn(2, 6, **WIDE)
    expected = rows @ linear_map.matrix(base).T
    torch.testing.assert_close(linear_map.multiply(base, rows), expected, rtol=1e-12, atol=1e-12)

    class Other(nn.Linear):
        """Called, because its weight may be anything."""

    other = Other(6, 5, **WIDE)
    expected = rows @ other.weight.T
    torch.testing.assert_close(
        map_of(other).multiply(other, rows), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.bfloat16, 2e-5), (torch.float16, 2e-3), (torch.float32, 1e-6)]
)
def test_large_bias_takes_nothing_from_the_product_of_a_called_base(dtype, atol):
    class Called(nn.Linear):
        """Called, because its weight may be anything."""

    base = Called(64, 48, dtype=dtype)
    with torch.no_grad():
        base.bias.fill_(100)
    rows = nn.functional.normalize(torch.randn(4, 64), dim=1).to(dtype)
    expected = rows.double() @ base.weight.double().T
    found = map_of(base).multiply(base, rows)
    assert found.dtype == dtype
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scale_of_an_embedding_is_rounded_as_the_module_rounds_it(dtype):
    with torch.device("meta"):
        base = BufferScaledWordEmbedding(7, 4, scale=33.94, dtype=dtype)
    expected = torch.tensor(33.94).to(dtype).item()
    assert map_of(base).scale == expected
    assert map_of(BufferScaledWordEmbedding(7, 4, scale=33.94, dtype=dtype)).scale == expected


class Packed(nn.Module):
    """As bitsandbytes' linear layers: the weight is bytes in another shape, numbers are made."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 5
        levels = torch.randint(256, (30, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(levels, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(5))

    def numbers(self, dtype=torch.float32):
        return self.weight.view(5, 6).to(dtype) / 128 - 1

    def forward(self, x):
        return nn.functional.linear(x, self.numbers(x.dtype), self.bias.to(x.dtype))


class Narrow(Packed):
    """As layers in eight-bit floats: whole numbers beside a scale."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6).to(torch.float8_e4m3fn), requires_grad=False)

    def numbers(self, dtype=torch.float32):
        return self.weight.to(dtype) / 3


class Hidden(Packed):
    """As layers of GPTQ: a buffer of another name."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", self.weight.data)
        del self.weight

    def numbers(self, dtype=torch.float32):
        return self.qweight.view(5, 6).to(dtype) / 128 - 1


@pytest.mark.parametrize(
    ("kind", "what"),
    [(Packed, "torch.uint8 numbers"), (Narrow, "torch.float8_e4m3fn numbers"), (Hidden, "missing")],
)
def test_weight_that_is_not_numbers_is_had_by_calling_the_base(kit, kind, what):
    base = kind()
    dense = dense_matrix(map_of(base), base)
    torch.testing.assert_close(dense, base.numbers(), rtol=1e-5, atol=1e-5)
    assert kit.error_text(map_of(base).add_, base, dense) == (
        f"the weight of the {kind.__name__} is {what}, expected a whole floating-point tensor; its "
        "values are not changed or read: dequantise or gather the base first."
    )
    x = torch.randn(7, 6)
    for layer in (LoRALinear(base, 2, 1.0), SVDLinear(base, 2, 1.0), DoRALinear(base, 2, 1.0)):
        assert torch.equal(layer(x), base(x))
    torch.testing.assert_close(layer.magnitude, base.numbers().norm(dim=1))


def test_update_is_rounded_once_into_a_narrow_weight():
    base = nn.Linear(6, 5, dtype=torch.bfloat16)
    before, delta = base.weight.detach().float(), torch.randn(5, 6) / 3
    map_of(base).add_(base, delta)
    assert torch.equal(base.weight, (before + delta).bfloat16())


@pytest.mark.parametrize(
    ("base", "text"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "its groups is 2, expected 1; exclude it."),
        (
            nn.Conv1d(4, 4, 3, padding_mode="circular"),
            "its padding_mode is 'circular', expected 'zeros'; exclude it.",
        ),
        (
            nn.Embedding(5, 4, max_norm=1.0),
            "its max_norm is 1.0, by which a forward pass changes the weight; expected None: set "
            "it to None or exclude it.",
        ),
        (
            nn.MultiheadAttention(4, 2).out_proj,
            "it is the output projection of a MultiheadAttention, which reads its weight and never "
            "calls it; exclude it.",
        ),
        (
            type("NormedEmbeddings", (nn.Embedding,), {"forward": lambda self, x: x})(5, 4),
            "it is a NormedEmbeddings, which computes something else than the Embedding that it "
            "derives from; exclude it.",
        ),
        (
            type("ScaledConv", (nn.Conv2d,), {"forward": lambda self, x: x})(4, 4, 3),
            "it is a ScaledConv, which computes something else than the Conv2d that it derives "
            "from; exclude it.",
        ),
        (
            nn.LayerNorm(4),
            "it is a LayerNorm, expected a Linear, Conv1d, Conv2d, Embedding, or a module with "
            "in_features and out_features; exclude it.",
        ),
    ],
)
def test_base_that_is_no_linear_map_of_a_known_form(kit, base, text):
    assert kit.error_text(LoRALinear, base, 1, 1.0) == text


def test_dropout_of_indices(kit):
    base = nn.Embedding(5, 4)
    assert kit.error_text(LoRALinear, base, 1, 1.0, dropout=0.1) == (
        "dropout is 0.1, but an embedding takes indices, which cannot be dropped; set it to 0 or "
        "exclude the module."
    )


def test_weight_and_bias_are_the_bases():
    base = nn.Linear(6, 5)
    layer = LoRALinear(base, 2, 1.0)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert LoRALinear(nn.Embedding(5, 4), 2, 1.0).bias is None
