"""Answers of a batch are those of each prompt alone, of a loop with a full pass for each token."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BloomConfig,
    BloomForCausalLM,
    CpmAntConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MptConfig,
    MptForCausalLM,
    MusicgenConfig,
    PreTrainedConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
)

from hyper_tune.errors import UserError
from hyper_tune.evaluate.generation import Decoding, LanguageModel, Request, answers, choose
from hyper_tune.hf.generation import FolderModel
from hyper_tune.records import Turn
from hyper_tune.torchtune.exports import export_merged
from hyper_tune.torchtune.generation import RunModel
from hyper_tune.torchtune.trained import open_trained

FAMILIES = ["llama", "llama3_2", "qwen"]
PROMPTS = [
    [5, 9, 77, 30, 2, 41, 200],
    [8, 8, 3],
    [100, 1, 17, 64, 99, 3, 250, 14, 15, 16, 9, 2],
    [7],
]
NEW = 10
SIZES = {"vocab_size": 300, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
SMALL: dict[str, Callable[[], Any]] = {
    # Its positions are absolute: a rotation would not notice a shift.
    "a GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=256, n_embd=32)),
    # These have no table of positions, and take none.
    "a Bloom": lambda: BloomForCausalLM(BloomConfig(**SIZES, hidden_size=32, seq_length=256)),
    "an MPT": lambda: MptForCausalLM(
        MptConfig(
            **{"vocab_size": 300, "n_layers": 2, "n_heads": 4, "initializer_range": 0.3},
            **{"d_model": 32, "max_seq_len": 256},
        )
    ),
}


class Tokens:
    """A model whose text is its tokens, written as numbers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.text = lambda tokens: " ".join(map(str, tokens))
        model.load_()

    def __call__(
        self, prompts: Sequence[list[int]], decoding: Decoding, size: int = 8, first: int = 0
    ) -> list[list[int]]:
        asked = [Request(prompt, str(first + key)) for key, prompt in enumerate(prompts)]
        found = dict(answers(self.model, asked, decoding, batch_size=size))
        return [list(map(int, found[index].split())) for index in range(len(prompts))]


@pytest.fixture(scope="module", params=[*FAMILIES, "a folder", *SMALL])
def tokens(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_config: Callable[..., Path],
    run: Callable[..., None],
) -> tuple[Tokens, Any]:
    """A trained run of each family or a folder, and transformers' model of the same weights."""
    if request.param == "a folder":
        folder = Path(request.getfixturevalue("llama")["checkpointer"]["checkpoint_dir"])
        model: LanguageModel = FolderModel(with_tokenizer(tmp_path_factory, folder))
    elif request.param in SMALL:
        place = tmp_path_factory.mktemp("small")
        torch.manual_seed(0)
        SMALL[request.param]().save_pretrained(place)
        folder = with_tokenizer(tmp_path_factory, place)
        model = FolderModel(folder)
    else:
        place = tmp_path_factory.mktemp("run")
        run(write_config(place, **request.getfixturevalue(request.param)))
        folder = export_merged(open_trained(place / "run"), place / "merged")
        model = RunModel(open_trained(place / "run"))
    return Tokens(model), AutoModelForCausalLM.from_pretrained(folder)


def with_tokenizer(factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Give a tiny Llama's folder a tokenizer of words that `transformers` reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    target = factory.mktemp("folder")
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    for name in ("tokenizer.model", "special_tokens.json"):
        (target / name).unlink(missing_ok=True)
    words = {word: number for number, word in enumerate(["?", "<end>", *"abcdefgh"])}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="?", eos_token="<end>", clean_up_tokenization_spaces=False
    ).save_pretrained(target)
    (target / "generation_config.json").write_text('{"eos_token_id": [4, 1]}')
    return target


@torch.no_grad()
def one_by_one(model: Any, prompt: list[int], pick: Callable[[Tensor, int], int]) -> list[int]:
    """The twin: a full pass for each token."""
    read = list(prompt)
    for step in range(NEW):
        read.append(pick(model(torch.tensor([read])).logits[0, -1], step))
    return read[len(prompt) :]


def cut(tokens: list[int], stops: Sequence[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in stops:
            return tokens[:place]
    return tokens


def test_greedy_answers_equal_a_full_pass_for_each_token(tokens: tuple[Tokens, Any]) -> None:
    ask, plain = tokens
    stops = ask.model.stop_tokens
    expected = [
        cut(one_by_one(plain, prompt, lambda row, _: int(row.argmax())), stops)
        for prompt in PROMPTS
    ]
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    for size in (1, 2, 3, 8):
        assert ask(PROMPTS, Decoding(NEW), size) == expected
    assert ask(PROMPTS[::-1], Decoding(NEW), 3) == expected[::-1]


def literal_draw(row: Tensor, draw: float, temperature: float) -> int:
    """The twin of a draw: go through the tokens until their probabilities exceed it."""
    weights = [float(torch.exp(value.double() / temperature)) for value in row]
    total = 0.0
    for token, weight in enumerate(weights):
        total += weight / sum(weights)
        if total > draw:
            return token
    raise AssertionError


def test_drawn_answers_are_a_function_of_seed_and_key(tokens: tuple[Tokens, Any]) -> None:
    ask, plain = tokens
    decoding = Decoding(NEW, temperature=0.7, seed=3)
    stops = ask.model.stop_tokens
    expected = []
    for key, prompt in enumerate(PROMPTS):
        words = hashlib.sha256(f"3 {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(words[:8], "little", signed=True))
        draws = torch.rand(NEW, dtype=torch.float64, generator=generator).tolist()

        def pick(row: Tensor, step: int, draws: list[float] = draws) -> int:
            return literal_draw(row, draws[step], 0.7)

        expected.append(cut(one_by_one(plain, prompt, pick), stops))
    for size in (1, 3, 8):
        assert ask(PROMPTS, decoding, size) == expected
    assert ask(PROMPTS, Decoding(NEW, 0.7, seed=4)) != expected
    assert ask([PROMPTS[0]] * 4, decoding)[0] == expected[0] != ask([PROMPTS[0]], decoding, 1, 9)[0]


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    count = 20_000
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Counter(choose(logits.expand(count, 4), draws, 1.7).tolist())
    for token, share in enumerate(torch.softmax(logits / 1.7, 0).tolist()):
        # Within four standard deviations.
        assert abs(found[token] / count - share) < 4 * (share * (1 - share) / count) ** 0.5
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits.expand(2, 4), edge, 1.7).tolist() == [0, 3]
    assert choose(torch.tensor([[-1e30, 0.0]]), torch.tensor([0.0]), 1.0).tolist() == [1]


def test_an_answer_that_does_not_fit_is_refused_before_the_weights(
    tokens: tuple[Tokens, Any],
) -> None:
    ask, _ = tokens
    assert len(ask([[1] * 255], Decoding(1))[0]) <= 1
    with pytest.raises(UserError, match=r"the longest prompt and its answer take 257 tokens, but"):
        ask([[1], [1] * 255], Decoding(2))
    assert ask([], Decoding(2)) == []


def test_a_long_prompt_makes_logits_of_its_last_token_alone(tokens: tuple[Tokens, Any]) -> None:
    ask, _ = tokens
    sizes = []
    head = [m for m in modules(ask.model) if getattr(m, "out_features", 0) >= 256]
    hooks = [m.register_forward_hook(lambda m, i, out: sizes.append(out.shape[1])) for m in head]
    ask(PROMPTS, Decoding(3))
    for hook in hooks:
        hook.remove()
    assert set(sizes) <= {1}


def modules(model: Any) -> list[Any]:
    return list((model._model if isinstance(model, FolderModel) else model._run.model).modules())


def test_a_folders_prompt_is_its_chat_template_or_plain_text(
    tmp_path_factory: pytest.TempPathFactory, llama: dict[str, Any]
) -> None:
    folder = with_tokenizer(tmp_path_factory, Path(llama["checkpointer"]["checkpoint_dir"]))
    turns = [Turn("system", "a"), Turn("user", "bc")]
    plain = FolderModel(folder)
    assert (plain.chat, plain.encode(turns)) == (False, [2, 3, 4])
    assert plain.stop_tokens == [1, 4]
    assert plain.text([2, 1, 3]).replace(" ", "") == "ab"
    template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}h{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    chat = FolderModel(folder)
    assert (chat.chat, chat.encode(turns)) == (True, [0, 2, 0, 3, 4, 9])


def test_what_is_no_model_is_named(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, llama: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"is neither a run folder .* nor a Hugging Face model"):
        FolderModel(tmp_path)
    folder = with_tokenizer(tmp_path_factory, Path(llama["checkpointer"]["checkpoint_dir"]))
    first = FolderModel(folder).identity
    assert FolderModel(folder).identity == first
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert FolderModel(folder).identity != first
    (folder / "chat_template.jinja").unlink()
    assert FolderModel(folder).identity == first
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert FolderModel(folder).identity != first
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded: "):
        FolderModel(folder).load_()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="has no tokenizer that can be read"):
        FolderModel(folder)


def save_config(factory: pytest.TempPathFactory, config: PreTrainedConfig) -> Path:
    """Return a folder with a tokenizer and no weights."""
    place = factory.mktemp("config")
    config.save_pretrained(place)
    return with_tokenizer(factory, place)


def test_a_model_that_says_no_length_takes_the_tokenizers(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = save_config(tmp_path_factory, BloomConfig(**SIZES, hidden_size=32))
    with pytest.raises(UserError) as refused:
        FolderModel(folder)
    assert str(refused.value) == (
        f"{folder} does not say how many tokens the model reads; set model_max_length in its "
        "tokenizer_config.json."
    )
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))
    assert FolderModel(folder).max_length == 77


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BartConfig(), "holds a bart; BartForCausalLM takes no position_ids, without which pro"),
        (MambaConfig(), "holds a mamba; MambaForCausalLM takes no past_key_values, without wh"),
        (CpmAntConfig(), "holds a cpmant; CpmAntForCausalLM does nothing with its attention_mask,"),
        # It has two texts, of which the decoder's is asked.
        (MusicgenConfig(), "holds a musicgen; MusicgenForCausalLM takes no position_ids, without"),
        (T5Config(), "holds a t5, which is no causal language model."),
    ],
)
def test_a_model_that_would_misread_padded_prompts_is_refused_before_the_weights(
    tmp_path_factory: pytest.TempPathFactory, config: PreTrainedConfig, message: str
) -> None:
    folder = save_config(tmp_path_factory, config)
    with pytest.raises(UserError, match=f"^{re.escape(f'{folder} {message}')}"):
        FolderModel(folder)


def test_a_mask_that_only_a_comprehension_reads_is_read(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, past_key_values: Any, attention_mask: Any, position_ids: Any) -> Any:
        return self, past_key_values, position_ids, [attention_mask for _ in range(2)]

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert FolderModel(save_config(tmp_path_factory, LlamaConfig())).max_length > 0


def test_a_tokenizer_that_needs_a_package_is_refused(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_config(tmp_path_factory, LlamaConfig())

    def ask_for_it(*_: Any, **__: Any) -> None:
        raise ImportError("\nCpmAntTokenizer requires the rjieba library;\nuse pip.\n")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", ask_for_it)
    with pytest.raises(UserError) as refused:
        FolderModel(folder)
    assert str(refused.value) == (
        f"{folder} has no tokenizer that can be read: CpmAntTokenizer requires the rjieba library; "
        "use pip."
    )


def test_a_model_that_keeps_nothing_of_what_it_read_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    sizes = {"vocab_size": 300, "num_hidden_layers": 3, "num_attention_heads": 2, "lru_width": 16}
    config = RecurrentGemmaConfig(**sizes, hidden_size=16, intermediate_size=16)
    place = tmp_path_factory.mktemp("recurrent")
    RecurrentGemmaForCausalLM(config).save_pretrained(place)
    folder = with_tokenizer(tmp_path_factory, place)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))
    ask = Tokens(FolderModel(folder))
    with pytest.raises(UserError, match=r"RecurrentGemmaForCausalLM returns no past_key_values, w"):
        ask(PROMPTS[:1], Decoding(2))
