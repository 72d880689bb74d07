"""What a trained method can be written as, from one process."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from hyper_tune.assembly import Assembly
from hyper_tune.errors import UserError
from hyper_tune.merged import Edit, write_merged
from hyper_tune.torchtune.base_model import check_files, weight_files
from hyper_tune.torchtune.hf_names import hf_module_name, output_row_order
from hyper_tune.torchtune.settings import RecipeSettings
from hyper_tune.torchtune.trained import TrainedRun
from lowrank_adapters import LowRankLinear


def export_adapter(
    method: Assembly,
    model: TransformerDecoder,
    settings: RecipeSettings,
    folder: Path,
    *,
    rank: int | None = None,
    form: Literal["padded", "compact"] = "padded",
) -> Path:
    """Write the adapter as plain LoRA, or DoRA, in PEFT's layout; return the folder.

    ``rank``: of a method with nested ranks; None takes all of them. ``form``: as `export_peft`'s.
    """
    return method.export(
        folder,
        rank=rank,
        form=form,
        rename=hf_module_name,
        transform_b=_row_order(model, settings),
        base_model_name_or_path=base_name(settings),
        task_type="CAUSAL_LM",
    )


def export_merged(
    run: TrainedRun,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    texts: Mapping[str, str] | None = None,
    rank: int | None = None,
) -> Path:
    """Write the base with the updates added, for `AutoModelForCausalLM`; return the folder.

    The base is read from its checkpoint, file by file; the model's memory is not needed.
    ``dtype`` and ``texts`` are those of `write_merged`, ``rank`` that of `export_adapter`.

    Raises:
        UserError: the base is not there or of another model, or the folder exists.
    """
    check_files(run.settings)
    run.method.write_factors_()
    order = _row_order(run.model, run.settings)
    edits = {
        f"{hf_module_name(name)}.weight": _adding(name, layer, partial(order, name))
        for name, layer in run.method.layers.items()
    }
    checkpointer = run.settings.checkpointer
    with run.method.at_rank(rank):
        return write_merged(
            Path(checkpointer["checkpoint_dir"]),
            weight_files(checkpointer),
            folder,
            edits,
            dtype=dtype,
            texts=texts,
        )


def _adding(name: str, layer: LowRankLinear, order: Callable[[Tensor], Tensor]) -> Edit:
    def add(weight: Tensor) -> Tensor:
        trained = (layer.out_features, layer.in_features)
        if tuple(weight.shape) != trained:
            raise UserError(
                f"{name} is {tuple(weight.shape)} in the base's files, but {trained} in the model "
                "that was trained; give the base that the run had."
            )
        return layer.merged_weight(weight, order)

    return add


def _row_order(
    model: TransformerDecoder, settings: RecipeSettings
) -> Callable[[str, Tensor], Tensor]:
    kv_heads = int(model.layers[0].attn.num_kv_heads)
    return output_row_order(str(settings.checkpointer["model_type"]), model.num_heads, kv_heads)


def base_name(settings: RecipeSettings) -> str:
    """Return the base's name on the Hub, or where it is on this machine."""
    named = settings.base_model
    if named is not None and "/" in named:
        return named
    return str(Path(settings.checkpointer["checkpoint_dir"]).absolute())


DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
