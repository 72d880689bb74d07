"""Trains the quickstart's base: a small Llama and its tokenizer, saved as Hugging Face does.

python recipes/quickstart/base.py --output quickstart-run/base
"""

import argparse
import base64
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.llama3 import llama3
from torchtune.models.llama3._tokenizer import CL100K_PATTERN, SPECIAL_TOKENS
from torchtune.modules import TransformerDecoder
from tqdm import tqdm
from world import people, reports

Batches = Iterator[tuple[Tensor, Tensor]]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """The base: its sizes, and how long it trains. A change of any makes another base."""

    seed: int = 0
    people: int = 240
    tokens: int = 2000
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 384
    length: int = 256
    batch: int = 32
    text: int = 96
    steps: int = 300
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 0.02

    def digest(self) -> str:
        """Return a short name for these settings and for the code that makes a base of them."""
        code = [Path(__file__).with_name(name).read_text() for name in ("base.py", "world.py")]
        return hashlib.sha256(json.dumps([asdict(self), code]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """Texts that the tokenizer is made of, that the base reads, and that it has not read."""

    sample: list[str]
    read: Iterator[str]
    unread: Iterator[str]


def train_tokenizer(text: Iterable[str], tokens: int) -> Tokenizer:
    """Return a byte-level BPE of the text, splitting words as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Words of a conversation get tokens, though the base will never see them.
    tokenizer.train_from_iterator([*text, *["user", "assistant"] * 100], trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write it for transformers and, with the same ids, in the form that torchtune reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    letters = ByteLetters()
    words = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(letters.decode(word)).decode()} {rank}" for word, rank in words]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")


class ByteLetters:
    """GPT-2's letters for bytes, which byte-level vocabularies are written in."""

    def __init__(self) -> None:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self._bytes = {chr(byte): byte for byte in printable}
        self._bytes |= {chr(256 + index): byte for index, byte in enumerate(others)}

    def decode(self, word: str) -> bytes:
        """Return the bytes that a word of the vocabulary stands for."""
        return bytes(self._bytes[letter] for letter in word)


def batches(tokenizer: Tokenizer, texts: Iterator[str], settings: Settings) -> Batches:
    """Yield tokens and the tokens that follow, (batch, text) each; -100 after a text's end."""
    start = tokenizer.token_to_id("<|begin_of_text|>")
    while True:
        encoded = tokenizer.encode_batch(list(itertools.islice(texts, settings.batch)))
        rows = [[start, *text.ids][: settings.text + 1] for text in encoded]
        padded = torch.tensor([row + [-100] * (settings.text + 1 - len(row)) for row in rows])
        yield padded[:, :-1].clamp(min=0), padded[:, 1:]


def train(model: TransformerDecoder, text: Batches, unread: Batches, settings: Settings) -> float:
    """Train on text; return the loss per token on a batch of what it has not read."""
    optimizers = make_optimizers(model, settings)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=settings.steps,
            pct_start=0.05,
            cycle_momentum=False,
        )
        for optimizer in optimizers
    ]
    progress = tqdm(itertools.islice(text, settings.steps), "training the base", settings.steps)
    for tokens, targets in progress:
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        progress.set_postfix_str(f"loss {loss.item():.3f}")
    with torch.no_grad():
        tokens, targets = next(unread)
        return functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).item()


def make_optimizers(model: TransformerDecoder, settings: Settings) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices, which learn the facts in a fifth of Adam's steps."""
    matrices = [weight for weight in model.layers.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    return [
        torch.optim.Muon(matrices, lr=settings.matrix_learning_rate, weight_decay=0.0),
        torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True),
    ]


def build(settings: Settings, vocabulary: int) -> TransformerDecoder:
    """Return the untrained decoder; weights keep the variance of what passes through them."""
    torch.manual_seed(settings.seed)
    model = llama3(
        vocab_size=vocabulary,
        num_layers=settings.layers,
        num_heads=settings.heads,
        num_kv_heads=settings.kv_heads,
        embed_dim=settings.width,
        max_seq_len=settings.length,
        intermediate_dim=settings.feed_forward,
    )
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            # A token must stand out among what the blocks add to it, and be told from the others
            # by the output even where, as those of a conversation, it is never seen.
            std = 1.0 if name.startswith("tok_embeddings") else 0.7 * weight.shape[1] ** -0.5
            torch.nn.init.normal_(weight, std=std)
    return model


def save_model(
    model: TransformerDecoder, settings: Settings, vocabulary: int, folder: Path
) -> None:
    """Write weights and configuration as a Hugging Face Llama."""
    weights = tune_to_hf(
        model.state_dict(),
        num_heads=settings.heads,
        num_kv_heads=settings.kv_heads,
        dim=settings.width,
    )
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "intermediate_size": settings.feed_forward,
        "max_position_embeddings": settings.length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_base(folder: Path, settings: Settings) -> Path:
    """Train and save the base in ``folder``, unless these settings' base is there already."""
    stamp = folder / "settings.sha256"
    if stamp.is_file() and stamp.read_text().strip() == settings.digest():
        print(f"The base is in {folder} already.")
        return folder
    everybody = people(settings.seed, settings.people)
    sample = list(itertools.islice(reports(everybody, settings.seed), 2000))
    sample += [line["question"] for person in everybody for line in person.questions()]
    read, unread = (reports(everybody, settings.seed + number) for number in (1, 2))
    return train_base(folder, settings, Corpus(sample, read, unread))


def train_base(folder: Path, settings: Settings, corpus: Corpus) -> Path:
    """Train a base on a corpus and save it in ``folder``, whole or not at all."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tokenizer = train_tokenizer(corpus.sample, settings.tokens)
    vocabulary = tokenizer.get_vocab_size()
    model = build(settings, vocabulary)
    started = time.perf_counter()
    text, unread = (batches(tokenizer, t, settings) for t in (corpus.read, corpus.unread))
    loss = train(model, text, unread, settings)
    save_tokenizer(tokenizer, temporary)
    save_model(model, settings, vocabulary, temporary)
    (temporary / "settings.sha256").write_text(settings.digest() + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(
        f"Base: {parameters:,} parameters, {settings.steps} steps in "
        f"{time.perf_counter() - started:.0f} s, loss {loss:.3f} on unread text; in {folder}."
    )
    return folder


def main() -> None:
    """Make the base at ``--output`` unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("quickstart-run/base"))
    make_base(parser.parse_args().output, Settings())


if __name__ == "__main__":
    main()
