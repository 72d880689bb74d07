"""The kinds of checkpoints that are trained, and those that are refused, with the reason."""

from hyper_tune.checks import require_choice
from hyper_tune.errors import UserError

MODEL_TYPES = ("LLAMA2", "LLAMA3", "LLAMA3_2", "MISTRAL", "GEMMA", "QWEN2")
_FUSED = (
    "Phi's checkpoints hold queries, keys and values in one matrix, for which there is no export"
)
REFUSED_TYPES = {
    "GEMMA2": "torchtune 0.6.1 caps Gemma 2's last hidden states in place of its logits, so that "
    "it would train another model than its weights are of",
    "PHI3_MINI": _FUSED,
    "PHI4": _FUSED,
}


def check_model_type(value: object) -> None:
    """Refuse what is not one of `MODEL_TYPES`, of torchtune's checkpointer.

    Raises:
        UserError: it is not; the choices are listed, and why a known one is refused.

    >>> check_model_type("QWEN2")
    """
    name = str(value)
    if name in REFUSED_TYPES:
        raise UserError(
            f"checkpointer.model_type is {name}, but {REFUSED_TYPES[name]}; train a model of "
            f"{', '.join(MODEL_TYPES)}."
        )
    require_choice("checkpointer.model_type", name, MODEL_TYPES)
