"""Text from a causal language model of `transformers`, with its key-value cache."""

import dis
import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from hyper_tune.durable import digest
from hyper_tune.errors import UserError
from hyper_tune.records import Turn


class FolderModel:
    """A Hugging Face folder as a `hyper_tune.evaluate.generation.LanguageModel`.

    Turns are given in the tokenizer's chat template; if it has none, as their plain text. Only
    safetensors are read, and no code that a folder brings along is run. The weights are loaded by
    `load_`; until then only the tokenizer is there.

    Raises:
        UserError: not such a folder, its tokenizer cannot be read, it does not say how many tokens
            the model reads, or the model cannot be asked in batches.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: str = "auto") -> None:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} is neither a run folder (it has no config.yaml) nor a Hugging Face "
                "model (it has no config.json)."
            )
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:  # some need a package
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} has no tokenizer that can be read: {reason}") from error
        _refuse_unbatched(folder, config)
        self._folder, self._dtype = folder, dtype
        self.name = str(folder)
        self.identity = _identity(folder)
        self.chat = self._tokenizer.chat_template is not None
        self.max_length = _max_length(folder, config, self._tokenizer)
        self.stop_tokens: Sequence[int] = _stop_tokens(folder, self._tokenizer)
        self.device = torch.device(device)
        self._past: Any = None

    def load_(self) -> None:
        """Load the weights.

        Raises:
            UserError: they are not there, or not of a causal language model.
        """
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self._folder, dtype=self._dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self._folder} cannot be loaded: {reason}") from error
        self._model = model.to(self.device).eval()

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Return a conversation's tokens up to where the next answer begins."""
        if not self.chat:
            return list(self._tokenizer("".join(turn.content for turn in turns))["input_ids"])
        conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
        tokens = self._tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return list(tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer's tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def start(self, rows: int, length: int) -> None:
        """Forget what was read; the cache grows as it is needed."""
        self._past = None

    def logits(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Read on, and return what follows the last token: (rows, vocabulary).

        Raises:
            UserError: the model keeps nothing of what it read.
        """
        found = self._model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=visible.long(),
            past_key_values=self._past,
            use_cache=True,
            logits_to_keep=1,
        )
        self._past = getattr(found, "past_key_values", None)
        if self._past is None:
            raise UserError(
                f"{self.name}: {type(self._model).__name__} returns no past_key_values, without "
                "which it cannot go on with an answer, so that it is not asked."
            )
        logits: Tensor = found.logits[:, -1].float()
        return logits


_LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")


def _max_length(folder: Path, config: Any, tokenizer: Any) -> int:
    """Return how many tokens the model reads: its own limit, or the tokenizer's."""
    text = config.get_text_config(decoder=True)
    said = [getattr(text, name, None) for name in _LENGTHS]
    # A tokenizer without a limit says 10 ** 30.
    said.append(tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None)
    for length in said:
        if isinstance(length, int) and length > 0:
            return length
    raise UserError(
        f"{folder} does not say how many tokens the model reads; set model_max_length in its "
        "tokenizer_config.json."
    )


def _refuse_unbatched(folder: Path, config: Any) -> None:
    """Refuse a model that would not notice a row's padding, or has no key-value cache."""
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{folder} holds a {config.model_type}, which is no causal language model.")
    model = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    # Only a table of positions has to be told where a row begins.
    placed = hasattr(config.get_text_config(decoder=True), "max_position_embeddings")
    asked = ("past_key_values", "attention_mask", *(("position_ids",) if placed else ()))
    taken, read = inspect.signature(model.forward).parameters, _variables_read(model.forward)
    for name in asked:
        if name not in read or name not in taken:
            does = "does nothing with its" if name in taken else "takes no"
            raise UserError(
                f"{folder} holds a {config.model_type}; {model.__name__} {does} {name}, without "
                "which prompts of a batch are not read each as if alone, so that it is not asked."
            )


# How a function reads a variable; the third is for a function inside of it.
_READING = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "STORE_FAST_LOAD_FAST")


def _variables_read(function: Any) -> set[str]:
    """Return the variables that a function's code reads; some models take a mask and never do."""
    code = dis.get_instructions(inspect.unwrap(function))
    read = [s.argval for s in code if s.opname.startswith(_READING)]
    return {name for names in read for name in (names if isinstance(names, tuple) else (names,))}


def _identity(folder: Path) -> str:
    """Return a digest of the weights, the tokenizer, its chat template, and the settings."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".safetensors", ".txt"):
            found.update(f"{path.name} {digest(path)} ".encode())
    return found.hexdigest()


def _stop_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the generation settings' and the tokenizer's."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ends = settings.get("eos_token_id")
    found = ends if isinstance(ends, list) else [ends]
    return sorted({end for end in (*found, tokenizer.eos_token_id) if end is not None})
