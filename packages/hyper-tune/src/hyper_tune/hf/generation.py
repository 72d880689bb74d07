"""Text from a causal language model of `transformers`, with its key-value cache."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hyper_tune.durable import digest
from hyper_tune.errors import UserError
from hyper_tune.records import Turn


class FolderModel:
    """A Hugging Face folder as a `hyper_tune.evaluate.generation.LanguageModel`.

    Turns are given in the tokenizer's chat template; if it has none, as their plain text. Only
    safetensors are read, and no code that a folder brings along is run. The weights are loaded by
    `load_`; until then only the tokenizer is there.

    Raises:
        UserError: not such a folder, or its tokenizer cannot be read.
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
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} has no tokenizer that can be read: {reason}") from error
        self._folder, self._dtype = folder, dtype
        self.name = str(folder)
        self.identity = _identity(folder)
        self.chat = self._tokenizer.chat_template is not None
        self.max_length: int = config.get_text_config().max_position_embeddings
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
        """Read on, and return what follows the last token: (rows, vocabulary)."""
        found = self._model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=visible.long(),
            past_key_values=self._past,
            use_cache=True,
            logits_to_keep=1,
        )
        self._past = found.past_key_values
        logits: Tensor = found.logits[:, -1].float()
        return logits


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
