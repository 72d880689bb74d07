"""What of a transformers model is a head for its task, and what PEFT calls the task."""

from torch import nn

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


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


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's name of the model's task; None where it has none.

    >>> from transformers import GPT2LMHeadModel
    >>> task_type(GPT2LMHeadModel.__new__(GPT2LMHeadModel))
    'CAUSAL_LM'
    """
    name = type(model).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
