"""Answers of a language model to many prompts, each as if it had been asked alone."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hyper_tune.errors import UserError
from hyper_tune.records import Turn


class LanguageModel(Protocol):
    """What generation asks of a model and its tokenizer.

    ``name`` and ``identity``: for people, and to tell whether answers are of the same weights,
    wherever they lie. ``chat``: whether turns are given in a chat template. ``max_length``:
    tokens that it reads. ``stop_tokens``: what ends an answer.
    """

    name: str
    identity: str
    chat: bool
    max_length: int
    stop_tokens: Sequence[int]
    device: torch.device

    def load_(self) -> None:
        """Load the weights; before that, only `encode` and `text` are of use."""

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Return a conversation's tokens up to where the next answer begins."""

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer's tokens."""

    def start(self, rows: int, length: int) -> None:
        """Forget what was read, and make room for so many rows and tokens."""

    def logits(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Read on, and return what follows the last token: (rows, vocabulary).

        ``tokens``: (rows, new). ``positions``: (rows, new), each token's place in its own row.
        ``visible``: (rows, read so far and new), false where a row is padded.
        """


@dataclass(frozen=True)
class Request:
    """A prompt's tokens; what its draws depend on besides the seed; its name in a message."""

    tokens: Sequence[int]
    key: str = ""
    where: str = "the longest prompt"


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen. ``temperature`` 0 takes the likeliest token each time."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


def answers(
    model: LanguageModel,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    batch_size: int = 8,
) -> Iterator[tuple[int, str]]:
    """Yield the index and the answer of each request, the longest prompts first.

    The answer is the text before the first stop token, or of ``max_new_tokens``. It depends on the
    request, the seed and the temperature alone: not on the batch, but for rounding.

    Raises:
        UserError: see `refuse_long`; before any answer is given.
    """
    refuse_long(model, requests, decoding)
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        written = _continue(model, [requests[index] for index in batch], decoding)
        for index, tokens in zip(batch, written, strict=True):
            yield index, model.text(tokens)


def refuse_long(model: LanguageModel, requests: Sequence[Request], decoding: Decoding) -> None:
    """Compare with what the model reads; its weights are not needed.

    Raises:
        UserError: a prompt and its answer are longer than that.
    """
    for longest in sorted(requests, key=lambda request: -len(request.tokens))[:1]:
        room = len(longest.tokens) + decoding.max_new_tokens
        if room > model.max_length:
            raise UserError(
                f"{longest.where} and its answer take {room} tokens, but the model reads "
                f"{model.max_length}; shorten it, or lower --max-new-tokens."
            )


@torch.inference_mode()
def _continue(
    model: LanguageModel, requests: Sequence[Request], decoding: Decoding
) -> list[list[int]]:
    """Return each request's new tokens, without the one that ends them."""
    device, count = model.device, decoding.max_new_tokens
    longest = max(len(request.tokens) for request in requests)
    # Padded on the left: every row's next token is then in one column of the cache.
    tokens = torch.zeros(len(requests), longest, dtype=torch.long)
    visible = torch.ones(len(requests), longest + count, dtype=torch.bool)
    for row, request in enumerate(requests):
        padding = longest - len(request.tokens)
        tokens[row, padding:] = torch.tensor(request.tokens)
        visible[row, :padding] = False
    draws = torch.stack([_draws(decoding, request.key) for request in requests]).to(device)
    tokens, visible = tokens.to(device), visible.to(device)
    positions = (visible.cumsum(1) - 1).clamp(min=0)
    stops = torch.tensor(list(model.stop_tokens), device=device)
    ended = torch.zeros(len(requests), dtype=torch.bool, device=device)
    model.start(*visible.shape)
    logits = model.logits(tokens, positions[:, :longest], visible[:, :longest])
    written = []
    for step in range(count):
        chosen = choose(logits, draws[:, step], decoding.temperature)
        written.append(chosen)
        ended |= torch.isin(chosen, stops)
        if step + 1 == count or ended.all():
            break
        read = longest + step + 1
        place = positions[:, read - 1 : read]
        logits = model.logits(chosen.unsqueeze(1), place, visible[:, :read])
    rows = torch.stack(written, dim=1).tolist()
    return [_before_stop(row, set(model.stop_tokens)) for row in rows]


def choose(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """Return a token for each row of ``logits`` (rows, vocabulary).

    At temperature 0 the likeliest. Otherwise the first token whose cumulated probability, of
    softmax(logits / temperature), exceeds the row's draw, a number in [0, 1).

    >>> choose(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.999]), 0.0)
    tensor([1])
    >>> choose(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([0.6]), 1.0)
    tensor([2])
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulated = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    # The sum may fall short of one by rounding.
    bound = draws.double().unsqueeze(1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, bound, right=True).squeeze(1)


def _draws(decoding: Decoding, key: str) -> Tensor:
    """Return the draws of one answer: a function of seed and key."""
    words = hashlib.sha256(f"{decoding.seed} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(words[:8], "little", signed=True))
    return torch.rand(decoding.max_new_tokens, dtype=torch.float64, generator=generator)


def _before_stop(tokens: list[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]
