"""Text from a trained model, with torchtune's key-value caches."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchtune.modules.common_utils import delete_kv_caches

from hyper_tune.checkpoint import checkpoint_digest
from hyper_tune.evaluate.generation import Decoding, Request, refuse_long
from hyper_tune.evaluate.generation import answers as generated
from hyper_tune.records import Turn
from hyper_tune.torchtune.base_model import check_files, dtype_of
from hyper_tune.torchtune.components import build_tokenizer
from hyper_tune.torchtune.data import messages
from hyper_tune.torchtune.evaluate import prompt_tokens
from hyper_tune.torchtune.trained import TrainedRun

_NEW_TOKENS = 256


class RunModel:
    """A trained run as a `hyper_tune.evaluate.generation.LanguageModel`.

    The base's weights are loaded by `load_`; until then only the tokenizer is there.

    Raises:
        UserError: the base's files are not there.
    """

    chat = True

    def __init__(self, run: TrainedRun) -> None:
        check_files(run.settings)
        self._run = run
        self._tokenizer = build_tokenizer(run.settings.tokenizer)
        folder = run.settings.output_dir
        self.name = f"{folder} at step {run.step}"
        self.identity = checkpoint_digest(folder / "checkpoints", run.step)
        self.max_length: int = run.model.max_seq_len
        self.stop_tokens: Sequence[int] = self._tokenizer.stop_tokens
        self.device = run.device

    def load_(self) -> None:
        """Load the base's weights and the trained factors."""
        self._run.load_base_()
        self._run.model.set_num_output_chunks(0)
        # Of a long prompt only the last token's logits are wanted.
        self._run.model.norm.register_forward_pre_hook(_last_token)

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Return a conversation's tokens, in the chat format, up to the next answer."""
        return prompt_tokens(self._tokenizer, messages(turns))

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer's tokens."""
        return str(self._tokenizer.decode(list(tokens)))

    def start(self, rows: int, length: int) -> None:
        """Make caches of this size anew."""
        model = self._run.model
        if model.caches_are_setup():
            delete_kv_caches(model)
        with self.device:
            model.setup_caches(rows, dtype_of(self._run.settings), decoder_max_seq_len=length)

    def logits(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Read on, and return what follows the last token: (rows, vocabulary)."""
        model = self._run.model
        rows, new = tokens.shape
        read = visible.shape[1]
        mask = torch.zeros(
            rows, new, model.decoder_max_cache_seq_len, dtype=torch.bool, device=self.device
        )
        before = torch.ones(new, read, dtype=torch.bool, device=self.device).tril(read - new)
        mask[:, :, :read] = before & visible.unsqueeze(1)
        # A padded token sees itself: softmax over nothing is not a number.
        mask[:, :, read - new : read] |= torch.eye(new, dtype=torch.bool, device=self.device)
        logits: Tensor = model(tokens, mask=mask, input_pos=positions)[:, -1]
        return logits


def _last_token(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0][:, -1:],)


def answers(
    run: TrainedRun,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
) -> list[str]:
    """Load the base, and return the answer to each prompt, up to the token that ends it.

    ``max_new_tokens``: None takes 256, or as many as the longest prompt leaves room for.
    ``temperature``: 0 takes the likeliest token each time. The same seed gives the same answers.

    Raises:
        UserError: the base's files are not there, or a prompt and its answer are longer than the
            model reads.
    """
    model = RunModel(run)
    asked = [
        Request(model.encode([Turn("user", text)]), str(number))
        for number, text in enumerate(prompts)
    ]
    if max_new_tokens is None:
        longest = max(len(request.tokens) for request in asked)
        max_new_tokens = max(1, min(_NEW_TOKENS, model.max_length - longest))
    decoding = Decoding(max_new_tokens, temperature, seed)
    refuse_long(model, asked, decoding)
    model.load_()
    found = dict(generated(model, asked, decoding))
    return [found[number].strip() for number in range(len(asked))]
