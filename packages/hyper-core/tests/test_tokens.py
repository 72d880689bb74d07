"""Matrices cut into tokens: what a token is, and equation 8 to the letter."""

import pytest
import torch

from hyper_core import AttentionConfig, GeneratedParameters, HyperError, MLPConfig
from hyper_core.roles import Role
from hyper_core.tokens import TOKENS, from_tokens, to_tokens, token_shape

CONFIG = AttentionConfig(hidden=4, heads=2, feed_forward=5)


@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens_hold_the_numbers_that_they_name(tokens):
    stack = torch.randn(2, 3, 1 if tokens == "scalars" else 4)
    cut = to_tokens(stack, tokens)
    assert tuple(cut.shape) == token_shape(tuple(stack.shape), tokens)
    for i, matrix in enumerate(stack):
        expected = {
            "rows": [list(row) for row in matrix],
            "scalars": [list(row) for row in matrix],
            "columns": [[row[j] for row in matrix] for j in range(matrix.shape[1])],
            "elements": [[number] for row in matrix for number in row],
        }[tokens]
        assert torch.equal(cut[i], torch.tensor(expected))
    assert torch.equal(from_tokens(cut, tokens, 3), stack)


@pytest.mark.parametrize("output", ["free", "unit_rows", "unit_columns", "orthonormal"])
@pytest.mark.parametrize("tokens", ["rows", "columns", "elements"])
@pytest.mark.parametrize("norm", [1.0, 3.0])
@pytest.mark.parametrize(("rows", "columns"), [(8, 32), (32, 8)])
def test_tokens_reach_the_network_with_unit_norm(tokens, output, norm, rows, columns):
    stack = torch.randn(500, rows, columns, dtype=torch.float64)
    if output == "free":
        vector = rows if tokens == "columns" else columns
        stack *= norm / vector**0.5
    elif output == "unit_columns":
        stack *= norm / stack.norm(dim=-2, keepdim=True)
    elif output == "unit_rows":
        stack *= norm / stack.norm(dim=-1, keepdim=True)
    else:
        tall = torch.linalg.qr(stack.mT if rows < columns else stack)[0]
        stack = norm * (tall.mT if rows < columns else tall)
    cut = to_tokens(stack, tokens) * Role(tokens, output, norm, False, "all").token_scale(
        rows, columns
    )
    assert cut.square().sum(-1).mean().item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("tokens", ["rows", "columns", "elements"])
def test_generated_tokens_equal_the_twin_on_the_cut_matrix(twin, shaken, tokens):
    leaf = torch.randn(2, 3, 5, dtype=torch.float64)
    generated = GeneratedParameters({"p": [leaf]}, config=CONFIG, tokens={"p": tokens})
    shaken(generated.hypernetworks)
    weights = dict(generated.hypernetworks["p"].named_parameters())
    scale = {"rows": 1.0, "columns": 1.0, "elements": 5**0.5}[tokens]
    cut = torch.stack(
        [
            {"rows": m, "columns": m.T, "elements": m.reshape(-1, 1)}[tokens]
            for m in generated.state_p_0
        ]
    )
    (expected,) = twin.hypernetwork(weights, CONFIG, [cut * scale])
    expected = {
        "rows": expected,
        "columns": expected.transpose(1, 2),
        "elements": expected.reshape(2, 3, 5),
    }[tokens]
    generated.refresh()
    torch.testing.assert_close(leaf, expected.detach() / scale, rtol=1e-11, atol=1e-12)


def test_elements_without_embeddings_are_equation_8_to_the_letter():
    """p_{i+1} = Σⱼ softmax(Qᵢ Kⱼᵀ / √d) Vⱼ, j over all numbers of the matrix, before the rest."""
    leaf = torch.randn(3, 4, dtype=torch.float64)
    config = AttentionConfig(hidden=4, heads=1, feed_forward=5)
    generated = GeneratedParameters(
        {"p": [leaf]}, config=config, tokens={"p": "elements"}, embeddings=False
    )
    layer = generated.hypernetworks["p"].trunk.body[0]
    read, attended = [], []
    layer.query_key_value.register_forward_pre_hook(lambda _, x: read.append(x[0][0, 0]))
    layer.attention_output.register_forward_pre_hook(lambda _, x: attended.append(x[0][0, 0]))
    generated.refresh()
    features, d = read[0], 4
    weight, bias = (p[0] for p in layer.query_key_value.parameters())
    q, k, v = (features @ weight.T + bias).split(d, dim=1)
    for i in range(12):
        scores = torch.stack([q[i] @ k[j] / d**0.5 for j in range(12)])
        shares = scores.exp() / scores.exp().sum()
        expected = sum(shares[j] * v[j] for j in range(12))
        torch.testing.assert_close(attended[0][i], expected, rtol=1e-12, atol=1e-13)


def test_elements_of_a_large_matrix_are_refused_with_their_cost():
    leaves = {"p": [torch.empty(3, 14336, device="meta")]}
    with pytest.raises(HyperError) as caught:
        GeneratedParameters(leaves, tokens={"p": "elements"})
    assert str(caught.value) == (
        "role 'p': attention among 43008 tokens in each of 1 matrices has 88785027072 bytes of "
        "scores, expected at most AttentionConfig.max_score_bytes, 4294967296; cut larger tokens "
        "(rows or columns along the shorter side), take ConvConfig or MLPConfig, or raise the "
        "limit."
    )
    with pytest.raises(HyperError, match="14336 tokens in each of 1 matrices has 9865003008 bytes"):
        GeneratedParameters(leaves, tokens={"p": "columns"})


def test_elements_are_no_trouble_for_a_body_without_scores():
    leaves = {"p": [torch.empty(3, 14336, device="meta")]}
    GeneratedParameters(leaves, tokens={"p": "elements"}, config=MLPConfig(hidden=4, widths=(4,)))


@pytest.mark.parametrize("shapes", [[(5,), (5,), (3,)], [(2, 5), (3, 5)]])
def test_scalars_are_vectors_of_a_number_each(shapes):
    leaves = [torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in shapes]
    columns = [torch.nn.Parameter(leaf.detach().unsqueeze(-1).clone()) for leaf in leaves]
    pair = []
    for tensors, tokens in ((leaves, "scalars"), (columns, "rows")):
        torch.manual_seed(1)
        made = GeneratedParameters({"lam": tensors}, config=CONFIG, tokens={"lam": tokens})
        made.refresh()
        sum(leaf.square().sum() for leaf in tensors).backward()
        made.backward()
        made.commit()
        pair.append(made)
    for leaf, column in zip(leaves, columns, strict=True):
        assert torch.equal(leaf, column.squeeze(-1))
    for one, other in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for name in ("state_lam_0", "order_lam"):
        torch.testing.assert_close(pair[0].get_buffer(name), pair[1].get_buffer(name))


def test_scores_count_each_matrix_and_the_places_that_unequal_sharing_fills():
    leaves = {"p": [torch.randn(4, 3, 4)]}
    of_one = 4 * 2 * 3**2  # bytes, heads and pairs of tokens
    for sharing, places in (("all", 4), ("each", 4), ([0, 0, 1, 1], 4), ([0, 0, 0, 1], 6)):
        for limit in (places * of_one, places * of_one - 1):
            config = AttentionConfig(4, 2, 5, max_score_bytes=limit)
            if limit == places * of_one:
                GeneratedParameters(leaves, config=config, sharing=sharing)
                continue
            with pytest.raises(HyperError, match=f"in each of {places} matrices has"):
                GeneratedParameters(leaves, config=config, sharing=sharing)
