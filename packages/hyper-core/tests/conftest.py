"""The twins: the formulas in float64, one matrix, head and token after the other."""

import math
from types import SimpleNamespace

import pytest
import torch

from hyper_core import AttentionConfig, ConvConfig, MLPConfig

EPSILON = 1e-5


def layer_norm(x, weight, bias):
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / torch.sqrt(variance + EPSILON) * weight + bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def relu(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


class Weights:
    """The weights of one network among stacked ones, by name under a prefix."""

    def __init__(self, tensors, network=0, prefix=""):
        self.tensors, self.network, self.prefix = tensors, network, prefix

    def __contains__(self, name):
        return self.prefix + name in self.tensors

    def __getitem__(self, name):
        return self.tensors[self.prefix + name][self.network]

    def under(self, prefix):
        return Weights(self.tensors, self.network, self.prefix + prefix)

    def linear(self, name, x):
        y = self[f"{name}.weight"] @ x
        return y + self[f"{name}.bias"] if f"{name}.bias" in self else y

    def norm(self, name, x):
        return layer_norm(x, self[f"{name}.weight"], self[f"{name}.bias"])


def attend(weights, heads, tokens):
    """Equation 8 in each head, and the map of the heads together: a list of tokens in and out."""
    hidden = len(tokens[0])
    size = hidden // heads
    written = []
    for token in tokens:
        mixed = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            query = weights.linear("query_key_value", token)[:hidden][part]
            scores, values = [], []
            for other in tokens:
                projected = weights.linear("query_key_value", other)
                key = projected[hidden : 2 * hidden][part]
                scores.append(sum(query * key) / math.sqrt(size))
                values.append(projected[2 * hidden :][part])
            total = sum(torch.exp(score) for score in scores)
            mixed.append(sum(torch.exp(s) / total * v for s, v in zip(scores, values, strict=True)))
        written.append(weights.linear("attention_output", torch.cat(mixed)))
    return written


def post_norm_layer(weights, heads, tokens):
    written = []
    for token, attended in zip(tokens, attend(weights, heads, tokens), strict=True):
        after = weights.norm("attention_norm", token + attended)
        forward = weights.linear("down", gelu(weights.linear("up", after)))
        written.append(weights.norm("output_norm", after + forward))
    return written


def pre_norm_layer(weights, heads, tokens):
    normed = [weights.norm("attention_norm", token) for token in tokens]
    written = []
    for token, attended in zip(tokens, attend(weights, heads, normed), strict=True):
        after = token + attended
        up = weights.linear("up", weights.norm("output_norm", after))
        written.append(after + weights.linear("down", gelu(up)))
    return written


def attention_body(config, weights, tokens):
    layer = {"post": post_norm_layer, "pre": pre_norm_layer}[config.norm]
    for i in range(config.layers):
        tokens = layer(weights.under(f"{i}."), config.heads, tokens)
    if config.norm == "pre":
        tokens = [weights.norm(f"{config.layers}", token) for token in tokens]
    return tokens


def convolve(weights, kernel, tokens):
    """K * x: offset k of token j reads token j + k - kernel // 2, or nothing beyond the ends."""
    written = []
    width = len(tokens[0])
    for j in range(len(tokens)):
        total = weights["taps.bias"]
        for k in range(kernel):
            source = j + k - kernel // 2
            if 0 <= source < len(tokens):
                taps = weights["taps.weight"][:, k * width : (k + 1) * width]
                total = total + taps @ tokens[source]
        written.append(total)
    return written


def conv_body(config, weights, tokens):
    for i in range(sum(config.blocks)):
        block = weights.under(f"{i}.")
        read = [relu(block.norm("first_norm", token)) for token in tokens]
        inner = convolve(block.under("first."), config.kernel, read)
        read = [relu(block.norm("second_norm", token)) for token in inner]
        change = convolve(block.under("second."), config.kernel, read)
        kept = tokens
        if "shortcut.weight" in block:
            kept = [block.linear("shortcut", token) for token in tokens]
        tokens = [before + after for before, after in zip(kept, change, strict=True)]
    return [weights.norm(f"{sum(config.blocks)}", token) for token in tokens]


def mlp_body(config, weights, tokens):
    written = []
    for token in tokens:
        h = weights.linear("first", token)
        for i in range(len(config.widths)):
            layer = weights.under(f"layers.{i}.")
            change = layer.linear("linear", gelu(layer.norm("norm", h)))
            h = h + change if len(h) == len(change) else change
        written.append(weights.norm("norm", token + h))
    return written


BODIES = {AttentionConfig: attention_body, ConvConfig: conv_body, MLPConfig: mlp_body}


def body(config, weights, tokens):
    """One matrix: a list of token vectors in, a list out, through the body of ``config``."""
    return BODIES[type(config)](config, weights, tokens)


def hypernetwork(tensors, config, stacks, networks=None, context=None):
    """Stacks (matrices, tokens, width) in, stacks out; matrices are numbered through the stacks.

    ``networks``: of each matrix. A width's projections are held by the networks that have it.
    """
    matrices = sum(map(len, stacks))
    networks = networks or [0] * matrices
    holders, number = {}, 0
    for stack in stacks:
        for _ in stack:
            holders.setdefault(stack.shape[2], set()).add(networks[number])
            number += 1
    results, number, place = [], 0, 0
    for stack in stacks:
        width = stack.shape[2]
        result = []
        for matrix in stack:
            network = networks[number]
            projections = Weights(tensors, sorted(holders[width]).index(network))
            trunk = Weights(tensors, network, "trunk.")
            tokens = []
            for row in matrix:
                token = projections.linear(f"inputs.{width}", row)
                if "embedding" in tensors:
                    token = token + tensors["embedding"][place]
                    place += 1
                if context is not None:
                    token = token + tensors["context.weight"] @ context[number]
                tokens.append(trunk.norm("norm", token))
            mixed = body(config, trunk.under("body."), tokens)
            result.append(
                torch.stack([projections.linear(f"outputs.{width}", token) for token in mixed])
            )
            number += 1
        results.append(torch.stack(result))
    return results


def unit_rows(stack):
    return torch.stack(
        [torch.stack([row / torch.sqrt(sum(row * row)) for row in matrix]) for matrix in stack]
    )


def polar(matrix):
    """The polar factor by singular values, each made 1 / √(1 + 8ε‖G‖/σ²), one but for rounding."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    shift = 8 * torch.finfo(matrix.dtype).eps * torch.sqrt(sum(values**4))
    return u @ torch.diag(values / torch.sqrt(values**2 + shift)) @ vh


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
        Weights=Weights,
        body=body,
        gelu=gelu,
        hypernetwork=hypernetwork,
        polar=polar,
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
