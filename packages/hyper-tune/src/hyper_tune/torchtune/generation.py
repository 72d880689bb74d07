"""Text from a trained model, with torchtune's generation and its key-value caches."""

from collections.abc import Sequence

import torch
from torchtune.data import Message
from torchtune.generation import generate

from hyper_tune.errors import UserError
from hyper_tune.torchtune.base_model import check_files, dtype_of
from hyper_tune.torchtune.components import build_tokenizer
from hyper_tune.torchtune.evaluate import answer_text, prompt_tokens
from hyper_tune.torchtune.trained import TrainedRun

_NEW_TOKENS = 256


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
    check_files(run.settings)
    tokenizer = build_tokenizer(run.settings.tokenizer)
    asked = [prompt_tokens(tokenizer, [Message(role="user", content=text)]) for text in prompts]
    model, device = run.model, run.device
    prompt = max(map(len, asked))
    if max_new_tokens is None:
        max_new_tokens = max(1, min(_NEW_TOKENS, model.max_seq_len - prompt))
    longest = prompt + max_new_tokens
    if longest > model.max_seq_len:
        raise UserError(
            f"the longest prompt and its answer take {longest} tokens, but the model reads "
            f"{model.max_seq_len}; shorten it, or lower --max-new-tokens."
        )
    run.load_base_()
    model.set_num_output_chunks(0)
    with device:
        model.setup_caches(1, dtype_of(run.settings), decoder_max_seq_len=longest)
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
