"""Text from a trained model, with torchtune's generation and its key-value caches."""

from collections.abc import Sequence
from typing import Any

import torch
from torchtune.data import Message
from torchtune.generation import generate
from torchtune.modules import TransformerDecoder

from hyper_tune.errors import UserError
from hyper_tune.torchtune.base_model import dtype_of
from hyper_tune.torchtune.evaluate import answer_text, prompt_tokens
from hyper_tune.torchtune.settings import RecipeSettings


def answers(
    model: TransformerDecoder,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: RecipeSettings,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
) -> list[str]:
    """Return the assistant's answer to each prompt, up to its stop token.

    ``temperature``: 0 takes the likeliest token each time. The same seed gives the same answers.

    Raises:
        UserError: a prompt and its answer are longer than the model reads.
    """
    asked = [prompt_tokens(tokenizer, [Message(role="user", content=text)]) for text in prompts]
    longest = max(map(len, asked)) + max_new_tokens
    if longest > model.max_seq_len:
        raise UserError(
            f"the longest prompt and its answer take {longest} tokens, but the model reads "
            f"{model.max_seq_len}; shorten it, or lower --max-new-tokens."
        )
    model.set_num_output_chunks(0)
    with device:
        model.setup_caches(1, dtype_of(settings), decoder_max_seq_len=longest)
    random = torch.Generator(device).manual_seed(seed)
    texts = []
    for tokens in asked:
        model.reset_caches()
        found, _ = generate(
            model,
            torch.tensor(tokens, device=device),
            max_generated_tokens=max_new_tokens,
            pad_id=tokenizer.pad_id,
            temperature=temperature or 1.0,
            top_k=None if temperature else 1,
            stop_tokens=tokenizer.stop_tokens,
            rng=random,
        )
        texts.append(answer_text(tokenizer, found[0, len(tokens) :].tolist()))
    return texts
