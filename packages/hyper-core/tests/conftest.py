"""The twins: the formulas in float64, one matrix, head and token after the other."""

import math
from types import SimpleNamespace

import pytest
import torch

EPSILON = 1e-5


def layer_norm(x, weight, bias):
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / torch.sqrt(variance + EPSILON) * weight + bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def encoder_layer(weights, prefix, heads, tokens):
    """One matrix: a list of token vectors in, a list out."""

    def linear(name, x):
        return weights[f"{prefix}{name}.weight"] @ x + weights[f"{prefix}{name}.bias"]

    def norm(name, x):
        return layer_norm(x, weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"])

    hidden = len(tokens[0])
    size = hidden // heads
    written = []
    for token in tokens:
        mixed = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            query = linear("query_key_value", token)[:hidden][part]
            scores, values = [], []
            for other in tokens:
                projected = linear("query_key_value", other)
                key = projected[hidden : 2 * hidden][part]
                scores.append(sum(query * key) / math.sqrt(size))
                values.append(projected[2 * hidden :][part])
            total = sum(torch.exp(score) for score in scores)
            mixed.append(sum(torch.exp(s) / total * v for s, v in zip(scores, values, strict=True)))
        after = norm("attention_norm", token + linear("attention_output", torch.cat(mixed)))
        written.append(norm("output_norm", after + linear("down", gelu(linear("up", after)))))
    return written


def hypernetwork(weights, heads, layers, stacks):
    """Stacks (matrices, tokens, width) in, stacks out; matrices are numbered through the stacks."""
    results = []
    number = 0
    for stack in stacks:
        width = stack.shape[2]
        result = []
        for matrix in stack:
            tokens = []
            for position, row in enumerate(matrix):
                token = weights[f"inputs.{width}.weight"] @ row
                if "matrix_embedding" in weights:
                    token = token + weights["matrix_embedding"][number]
                    token = token + weights["token_embedding"][position]
                tokens.append(layer_norm(token, weights["norm.weight"], weights["norm.bias"]))
            for layer in range(layers):
                tokens = encoder_layer(weights, f"body.{layer}.", heads, tokens)
            out, bias = weights[f"outputs.{width}.weight"], weights[f"outputs.{width}.bias"]
            result.append(torch.stack([out @ token + bias for token in tokens]))
            number += 1
        results.append(torch.stack(result))
    return results


def unit_rows(stack):
    return torch.stack(
        [torch.stack([row / torch.sqrt(sum(row * row)) for row in matrix]) for matrix in stack]
    )


def token_rms(gradient, average, weight, decay):
    """Return the normalised gradient and the next average of one stack; ``weight`` is the next."""
    normalised, averages = torch.zeros_like(gradient), torch.zeros_like(average)
    for i, matrix in enumerate(gradient):
        for j, row in enumerate(matrix):
            averages[i, j, 0] = decay * average[i, j, 0] + (1 - decay) * sum(row * row) / len(row)
            normalised[i, j] = row / (torch.sqrt(averages[i, j, 0] / weight) + 1e-12)
    return normalised, averages


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def twin():
    return SimpleNamespace(
        encoder_layer=encoder_layer,
        gelu=gelu,
        hypernetwork=hypernetwork,
        token_rms=token_rms,
        unit_rows=unit_rows,
    )


@pytest.fixture(scope="session")
def shaken():
    """Return a function that moves every weight off its start, biases and norms included."""

    def shake(module):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return module

    return shake
