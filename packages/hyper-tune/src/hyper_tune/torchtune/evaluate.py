"""Held-out loss and exact match of the model as it stands, the same on any number of ranks."""

import math
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtune.data import Message
from tqdm import tqdm

from hyper_tune.errors import UserError
from hyper_tune.parallel import rank, sum_over_ranks_, world_size
from hyper_tune.records import read_records
from hyper_tune.torchtune.batches import collate
from hyper_tune.torchtune.data import messages, refuse_unknown_token
from hyper_tune.torchtune.samples import Samples


def _shares(count: int, batch_size: int) -> Iterator[tuple[list[int], bool]]:
    """Yield this rank's batches of positions, and whether each counts.

    Every rank yields equally many, since a sharded model's forward pass is collective; a rank
    without work repeats the first batch, which does not count.
    """
    starts = list(range(0, count, batch_size))
    rounds = -(-len(starts) // world_size())
    for position in range(rounds):
        mine = position * world_size() + rank()
        counts = mine < len(starts)
        start = starts[mine] if counts else 0
        yield list(range(start, min(start + batch_size, count))), counts


@torch.no_grad()
def held_out_loss(
    model: nn.Module, samples: Samples, *, batch_size: int, pad_id: int, device: torch.device
) -> float | None:
    """Return the mean cross-entropy per token, in nats, without any penalty; None: not finite.

    Raises:
        UserError: no token of the samples carries loss.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    batches = list(_shares(len(samples), batch_size))
    for positions, counts in tqdm(batches, "held-out loss", delay=5, leave=False):
        batch = collate([samples[i] for i in positions], pad_id, device)
        loss = batch.loss_sum(batch.logits(model))
        if counts:
            totals += torch.stack([loss.double(), batch.label_count().double()])
    model.train(was_training)
    loss_sum, count = sum_over_ranks_(totals).tolist()
    if not count:
        raise UserError(
            f"no token of the {len(samples)} held-out samples carries loss, so that there is "
            "nothing to measure; raise tokenizer.max_seq_len, or hold out others."
        )
    return loss_sum / count if math.isfinite(loss_sum) else None


class Questions:
    """Conversations whose last turn greedy decoding is to repeat exactly.

    The model sees each conversation up to its last turn; the text it writes before its stop token
    is compared with that turn, both stripped of white space at the ends.

    Raises:
        UserError: the file cannot be read; see `hyper_tune.records.read_records`.
    """

    def __init__(
        self,
        tokenizer: Any,
        path: str,
        format: str = "auto",  # noqa: A002
        max_new_tokens: int = 32,
    ) -> None:
        self._path = path
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._conversations = read_records(Path(path), format)
        self._prompts = [
            prompt_tokens(tokenizer, messages(c.turns)[:-1]) for c in self._conversations
        ]

    def refuse_unfit(self, limit: int, vocabulary: int) -> None:
        """Compare with a model that reads ``limit`` tokens of a ``vocabulary``.

        Raises:
            UserError: names the first question that leaves no room for its answer, or has a token
                that is unknown.
        """
        for conversation, prompt in zip(self._conversations, self._prompts, strict=True):
            where = f"{self._path}:{conversation.line}"
            refuse_unknown_token(where, prompt, vocabulary)
            if len(prompt) + self._max_new_tokens > limit:
                raise UserError(
                    f"{where}: a question of {len(prompt)} tokens and "
                    f"exact_match.max_new_tokens = {self._max_new_tokens} are more than the "
                    f"{limit} tokens that the model reads; lower it, or shorten the question."
                )

    @torch.no_grad()
    def exact_match(self, model: nn.Module, *, batch_size: int, device: torch.device) -> float:
        """Return the share of answers that are repeated, from 0 to 1."""
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        was_training = model.training
        model.eval()
        batches = list(_shares(len(self._prompts), batch_size))
        for positions, counts in tqdm(batches, "exact match", delay=5, leave=False):
            prompts = [self._prompts[i] for i in positions]
            pad_id = self._tokenizer.pad_id
            answers = greedy(model, prompts, self._max_new_tokens, pad_id, device)
            wanted = [self._conversations[i].turns[-1].content.strip() for i in positions]
            right = sum(
                answer_text(self._tokenizer, answer) == text
                for answer, text in zip(answers, wanted, strict=True)
            )
            if counts:
                totals += torch.tensor([right, len(positions)], dtype=torch.float64, device=device)
        model.train(was_training)
        right_sum, count = sum_over_ranks_(totals).tolist()
        return float(right_sum / count)


def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_id: int,
    device: torch.device,
) -> list[list[int]]:
    """Continue each prompt by its likeliest tokens; always ``max_new_tokens`` forward passes.

    Prompts are padded on the right, where causal attention cannot see the padding.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max()) + max_new_tokens
    tokens = torch.full((len(prompts), longest), pad_id, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows = torch.arange(len(prompts), device=device)
    for _ in range(max_new_tokens):
        logits = torch.cat(model(tokens[:, : int(lengths.max())]), dim=1)
        tokens[rows, lengths] = logits[rows, lengths - 1].argmax(-1)
        lengths = lengths + 1
    return [
        tokens[row, len(prompt) : len(prompt) + max_new_tokens].tolist()
        for row, prompt in enumerate(prompts)
    ]


def prompt_tokens(tokenizer: Any, turns: list[Message]) -> list[int]:
    """Return a conversation's tokens up to where the assistant's next answer begins."""
    asked = [*turns, Message(role="assistant", content="")]
    tokens = list(tokenizer({"messages": asked}, inference=True)["tokens"])
    # Qwen's tokenizer closes the turn that is to be written even so.
    while tokens[-1] in tokenizer.stop_tokens:
        tokens.pop()
    return tokens


def answer_text(tokenizer: Any, answer: list[int]) -> str:
    """Return the text of an answer's tokens before the first that ends it, stripped."""
    ends = [position for position, token in enumerate(answer) if token in tokenizer.stop_tokens]
    return str(tokenizer.decode(answer[: ends[0]] if ends else answer)).strip()


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory used so far: the GPU's allocations, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
