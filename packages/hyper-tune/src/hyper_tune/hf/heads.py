"""What of a transformers model is a head for its task, what PEFT calls the task, and its loss."""

import inspect
import warnings
from collections.abc import Collection

from torch import nn

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
_COUNTING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")


def head_names(model: nn.Module) -> list[str]:
    """Return the modules beside the pretrained body, which are new and trained as a whole.

    The output embedding of a language model is no such head: it is pretrained, and stays frozen.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> size = BertConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                   num_attention_heads=1)
    >>> head_names(BertForSequenceClassification(size))
    ['classifier']
    """
    body = getattr(model, "base_model_prefix", "")
    if not body or body not in dict(model.named_children()):
        return []
    find = getattr(model, "get_output_embeddings", None)
    embedding = find() if callable(find) else None
    return [
        name
        for name, module in model.named_children()
        if name != body
        and next(module.parameters(), None) is not None
        and (embedding is None or all(inner is not embedding for inner in module.modules()))
    ]


def new_modules(model: nn.Module, missing_keys: Collection[str]) -> list[str]:
    """Return the head, and the modules of the body that a checkpoint has no weights of.

    ``missing_keys``: what transformers reports: ``from_pretrained(..., output_loading_info=True)``.
    Such modules start at random, as the pooler of a BERT that was a masked language model: frozen,
    and not in the adapter, no two loads would be the same model. A parameter of the body itself,
    in no module beneath it, cannot be named; a warning says so.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> size = BertConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                   num_attention_heads=1)
    >>> new_modules(BertForSequenceClassification(size), {"bert.pooler.dense.weight"})
    ['classifier', 'bert.pooler.dense']
    """
    heads = head_names(model)
    whole = ("", getattr(model, "base_model_prefix", ""))
    places = dict.fromkeys(heads)
    for name in (name for name, _ in model.named_parameters() if name in missing_keys):
        place = name.rpartition(".")[0]
        if place not in whole:
            places[place] = None
            continue
        warnings.warn(
            f"{name} is not in the base: it starts at random, stays frozen, and is not in the "
            "adapter, since it is in no module that could be trained as a whole; save the base "
            "with it.",
            stacklevel=2,
        )
    inside = tuple(f"{place}." for place in places)
    return [place for place in places if not place.startswith(inside)]


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's name of the model's task; None where it has none.

    >>> from transformers import GPT2LMHeadModel
    >>> task_type(GPT2LMHeadModel.__new__(GPT2LMHeadModel))
    'CAUSAL_LM'
    """
    name = type(model).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def ignores_count(model: nn.Module) -> bool:
    """Return whether the model's loss is a mean whatever count of items it is given.

    Many models take the count and do not use it: it is for the loss functions of transformers that
    language models share.

    >>> from transformers import BertForMaskedLM, GPT2LMHeadModel
    >>> [ignores_count(kind.__new__(kind)) for kind in (BertForMaskedLM, GPT2LMHeadModel)]
    [True, False]
    """
    kind = type(model)
    if not hasattr(kind, "loss_function") or hasattr(kind, "accepts_loss_kwargs"):
        return False
    code = inspect.unwrap(kind.forward).__code__
    return not kind.__name__.endswith(_COUNTING) or "loss_function" not in code.co_names
