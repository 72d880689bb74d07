"""Held-out loss and exact match equal loops over one sample at a time, with a full pass each."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hyper_tune.errors import UserError
from hyper_tune.torchtune.components import build
from hyper_tune.torchtune.evaluate import Questions, greedy, held_out_loss, peak_memory_mib
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings

CPU = torch.device("cpu")
FAMILIES = ["llama", "llama3_2", "qwen"]
LONGEST = 4


@pytest.fixture(params=FAMILIES)
def models(
    request: pytest.FixtureRequest, make_config: Callable[..., Path]
) -> Iterable[SimpleNamespace]:
    """The recipe's model, and transformers' of the same weights."""
    keys = request.getfixturevalue(request.param)
    settings = RecipeSettings.from_config(OmegaConf.load(make_config(**keys)))
    folder = settings.checkpointer["checkpoint_dir"]
    with FineTuning(settings) as run:
        yield SimpleNamespace(
            model=run.model, plain=AutoModelForCausalLM.from_pretrained(folder).double()
        )


@torch.no_grad()
def test_greedy_decoding_equals_a_loop_with_a_full_pass_for_each_token(
    models: SimpleNamespace,
) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in (7, 3, 12, 1)]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(models.plain(torch.tensor([tokens])).logits[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    assert len({tuple(answer) for answer in expected}) == 4
    for pad_id in (0, 260):
        assert greedy(models.model, prompts, 6, pad_id, CPU) == expected


@torch.no_grad()
def test_held_out_loss_is_the_mean_over_the_labelled_tokens(models: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length, hidden in ((9, 3), (4, 1), (13, 12), (6, 5), (2, 1)):
        tokens = torch.randint(256, (length,), generator=generator).tolist()
        samples.append({"tokens": tokens, "labels": [-100] * hidden + tokens[hidden:]})
    losses = []
    for sample in samples:
        logits = models.plain(torch.tensor([sample["tokens"]])).logits[0]
        for position, label in enumerate(sample["labels"]):
            if label != -100:
                losses.append(-torch.log_softmax(logits[position - 1], dim=0)[label])
    assert len(losses) == 6 + 3 + 1 + 1 + 1
    expected = float(sum(losses) / len(losses))
    models.model.train()
    modes: list[bool] = []
    models.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    for size in (1, 2, 5, 9):
        found = held_out_loss(models.model, samples, batch_size=size, pad_id=260, device=CPU)
        assert found == pytest.approx(expected, rel=1e-6)
    assert models.model.training
    assert not any(modes)


class Script(nn.Module):
    """A decoder that has learned whole texts by heart; its logits come in parts."""

    def __init__(self, texts: list[list[int]], vocabulary: int) -> None:
        super().__init__()
        self.texts = texts
        self.vocabulary = vocabulary
        self.modes: set[bool] = set()

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        self.modes.add(self.training)
        logits = torch.zeros(*tokens.shape, self.vocabulary)
        for row, seen in enumerate(tokens.tolist()):
            for text in self.texts:
                for end in range(1, min(len(seen) + 1, len(text))):
                    if seen[:end] == text[:end]:
                        logits[row, end - 1, text[end]] = 1.0
        return logits.chunk(3, dim=1)


def prompt(tokenizer: Any, family: str, question: str) -> list[int]:
    """What a model reads of a question, up to where its answer begins."""
    special = tokenizer.special_tokens

    def plain(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_bos=False, add_eos=False))

    if family == "qwen":
        start, end = special["<|im_start|>"], special["<|im_end|>"]
        asked = [start, *plain(f"user\n{question}"), end, *plain("\n")]
        return [*asked, start, *plain("assistant\n")]
    start, end = special["<|start_header_id|>"], special["<|end_header_id|>"]
    asked = [start, *plain("user"), end, *plain(f"\n\n{question}"), special["<|eot_id|>"]]
    begin = special["<|begin_of_text|>"]
    return [begin, *asked, start, *plain("assistant"), end, *plain("\n\n")]


# Written before a stop token, between it and another, the wanted answer, whether it is right.
ANSWERS = [
    ("12", "34", "12", True),
    ("12", "", "12", True),
    ("1234", "", "1234", True),
    (" 12\n", "3", "12", True),
    ("12", "", "12\n", True),
    ("1 2", "", "1 2", True),
    ("12", "", "13", False),
    ("12", "3", "123", False),
    ("123", "", "12", False),
    ("", "12", "12", False),
    ("1 2", "", "12", False),
]


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_exact_match_counts_the_answers_that_are_repeated_up_to_a_stop_token(
    tmp_path: Path, request: pytest.FixtureRequest, family: str
) -> None:
    tokenizer = build("tokenizer", request.getfixturevalue(family)["tokenizer"])
    texts, rows, right = [], [], []
    for stop in tokenizer.stop_tokens:
        for before, after, wanted, is_right in ANSWERS:
            question = f"Number {len(rows) * len(rows)}?"
            written = [
                *tokenizer.encode(before, add_bos=False, add_eos=False),
                stop,
                *tokenizer.encode(after, add_bos=False, add_eos=False),
                stop,
            ]
            texts.append(prompt(tokenizer, family, question) + written)
            rows.append({"question": question, "answer": wanted})
            right.append(is_right)
    model = Script(texts, vocabulary=300)

    def exact_match(chosen: list[dict[str, str]], batch_size: int) -> float:
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        questions = Questions(tokenizer, str(path), max_new_tokens=LONGEST)
        return questions.exact_match(model, batch_size=batch_size, device=CPU)

    assert [exact_match([row], 1) for row in rows] == right
    for batch_size in (3, 64):
        assert exact_match(rows, batch_size) == sum(right) / len(right)
    assert model.modes == {False}
    assert model.training


def test_peak_memory_is_in_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    resident_mib = psutil.Process().memory_info().rss / 1024 / 1024
    # The kernel counts resident pages late, a few at a time.
    assert resident_mib - 1 <= peak_memory_mib(CPU) < 16 * resident_mib
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 1024 * 1024)
    assert peak_memory_mib(torch.device("cuda")) == 3.0


def test_held_out_data_that_carry_no_loss_are_refused() -> None:
    samples = [{"tokens": [1, 2, 3], "labels": [-100, -100, -100]}]
    model = nn.Embedding(5, 5)
    model.register_forward_hook(lambda _, __, logits: [logits])
    with pytest.raises(UserError) as caught:
        held_out_loss(model, samples, batch_size=1, pad_id=0, device=CPU)
    assert str(caught.value) == (
        "no token of the 1 held-out samples carries loss, so that there is nothing to measure; "
        "raise tokenizer.max_seq_len, or hold out others."
    )
