"""The frozen base: found on disk, built on the meta device, sharded, loaded."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.training.checkpointing._utils import FormattedCheckpointFiles
from tqdm import tqdm

from hyper_tune.errors import UserError
from hyper_tune.layout import BaseLayout, own_shard
from hyper_tune.parallel import rank, shard_base_, world_size
from hyper_tune.torchtune.components import build
from hyper_tune.torchtune.nf4 import quantisable, quantised
from hyper_tune.torchtune.same_model import check_config_file, refuse_other_model
from hyper_tune.torchtune.settings import TOKENIZER_FILES, RecipeSettings
from hyper_tune.torchtune.weights import WeightFiles
from lowrank_adapters import LowRankLinear, freeze_base_, inside_adapters

OUTPUT_CHUNKS = 8
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def check_files(settings: RecipeSettings) -> None:
    """Find the base's weights and tokenizer on disk before anything is built.

    Raises:
        UserError: the folder or a file is missing (with the command that fetches it), or a weight
            file is not safetensors; or config.json is of another model than the configuration's.
    """
    folder = Path(settings.checkpointer["checkpoint_dir"])
    wanted = ["config.json", *weight_files(settings.checkpointer)]
    pickled = [name for name in wanted[1:] if not name.endswith(".safetensors")]
    if pickled:
        raise UserError(
            f"checkpointer.checkpoint_files names {pickled[0]}, which may be a pickle; "
            "only .safetensors files are read."
        )
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        found = "the folder does not exist" if not folder.is_dir() else f"{missing[0]} is not there"
        raise UserError(
            f"no base model in {folder.absolute()}: {found} "
            f"({len(missing)} of {len(wanted)} files missing).\n{_remedy(settings, folder)}"
        )
    check_config_file(settings)
    for key in TOKENIZER_FILES:
        path = settings.tokenizer.get(key)
        if path is not None and not Path(path).is_file():
            raise UserError(
                f"no tokenizer: tokenizer.{key} is {Path(path).absolute()}, which does not exist.\n"
                f"{_remedy(settings, folder)}"
            )


def describe_files(settings: RecipeSettings) -> str:
    """Return the folder of the base's weights, how many files they are and their size."""
    folder = Path(settings.checkpointer["checkpoint_dir"])
    sizes = [(folder / name).stat().st_size for name in weight_files(settings.checkpointer)]
    files = "1 file" if len(sizes) == 1 else f"{len(sizes)} files"
    return f"{folder} ({files}, {sum(sizes) / 2**30:.2f} GiB)"


def weight_files(checkpointer: Mapping[str, Any]) -> list[str]:
    """Return the names of the base's weight files, in order.

    Raises:
        UserError: the section does not say them.
    """
    files = checkpointer.get("checkpoint_files")
    if isinstance(files, Mapping):
        try:
            formatted = FormattedCheckpointFiles.from_dict(dict(files))
            return [str(name) for name in formatted.build_checkpoint_filenames()]
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"checkpointer.checkpoint_files: {reason}") from error
    if not isinstance(files, list) or not files:
        raise UserError("checkpointer.checkpoint_files must list files, or give a filename_format.")
    return [str(name) for name in files]


def _remedy(settings: RecipeSettings, folder: Path) -> str:
    if settings.base_model is None:
        return "Set checkpointer.checkpoint_dir to a Hugging Face checkpoint folder."
    if settings.base_model == "quickstart":
        return (
            "The tiny base is made by `nox -s quickstart`, or by "
            f"`python recipes/quickstart/base.py --output {folder}`."
        )
    return (
        "Download it with:\n"
        f"  tune download {settings.base_model} --output-dir {folder} "
        '--ignore-patterns "original/consolidated*"\n'
        "or set checkpointer.checkpoint_dir to the folder that holds it."
    )


def base_digest(settings: RecipeSettings) -> str:
    """Return a fingerprint of the base: size and samples of each weight file, all of the tokenizer.

    A file of gigabytes is read at 64 places, so that a resumed run starts in seconds.
    """
    digest = hashlib.sha256()
    folder = Path(settings.checkpointer["checkpoint_dir"])
    for name in weight_files(settings.checkpointer):
        size = (folder / name).stat().st_size
        digest.update(f"{name} {size}".encode())
        with (folder / name).open("rb") as file:
            for place in range(_SAMPLES):
                file.seek(place * size // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    for key in TOKENIZER_FILES:
        if settings.tokenizer.get(key) is not None:
            digest.update(Path(settings.tokenizer[key]).read_bytes())
    return digest.hexdigest()


def dtype_of(settings: RecipeSettings) -> torch.dtype:
    """Return the dtype of the frozen base."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]


def build_on_meta(settings: RecipeSettings) -> TransformerDecoder:
    """Build the decoder without memory; `load_` gives it weights.

    Raises:
        UserError: the section ``model`` does not make one, or not one that can be quantised.
    """
    with training.set_default_dtype(dtype_of(settings)), torch.device("meta"):
        model = build("model", settings.model)
    if not isinstance(model, TransformerDecoder):
        raise UserError(
            f"model: {settings.model['_component_']} makes no decoder of torchtune's; name one, "
            "such as torchtune.models.llama3_1.llama3_1_8b."
        )
    if settings.quantize_base:
        quantisable(model)  # refuses what is not
    return model


def prepare_(
    model: TransformerDecoder,
    settings: RecipeSettings,
    leaves: Iterable[nn.Parameter],
    device: torch.device,
) -> None:
    """Compile, checkpoint activations and shard, in torchtune's order, before any weights."""
    blocks = list(model.layers)
    if settings.compile:
        training.compile_model(model, verbose=False)
    if settings.enable_activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={type(blocks[0])})
    layout = base_layout(settings)
    if layout.shard > 1:
        offload = settings.fsdp_cpu_offload
        shard_base_(model, list(model.layers), leaves, layout.mesh(device), offload=offload)


def base_layout(settings: RecipeSettings, processes: int | None = None) -> BaseLayout:
    """Return how the base lies over the processes, by default those of this job.

    Raises:
        UserError: the settings ask for another number of processes, for shards of NF4, or to
            offload what is not sharded.
    """
    shard, replicate = settings.data_parallel_shard_dim, settings.data_parallel_replicate_dim
    layout = BaseLayout.of(processes or world_size(), shard, replicate)
    if settings.quantize_base and layout.shard > 1:
        raise UserError(
            f"quantize_base is set, and the base would be sharded over {layout.shard} processes, "
            "which NF4 weights are not; run one process, set data_parallel_shard_dim=1 and "
            "data_parallel_replicate_dim to their number, or set quantize_base=False."
        )
    if settings.fsdp_cpu_offload and layout.shard == 1:
        raise UserError(
            "fsdp_cpu_offload is set, and each process would hold the whole base, of which nothing "
            "is offloaded: only shards are; run more processes, lower data_parallel_replicate_dim, "
            "or set fsdp_cpu_offload=False."
        )
    return layout


def open_weights(
    model: TransformerDecoder,
    settings: RecipeSettings,
    layers: Mapping[str, LowRankLinear] | None = None,
) -> WeightFiles:
    """Open the base's weight files, whose headers are compared with the model: no tensor is read.

    ``layers``: those that the model has by now.

    Raises:
        UserError: the checkpoint's names or shapes are those of another model, or not to be read.
    """
    with _explained(settings):
        names = weight_files(settings.checkpointer)
        folder = Path(settings.checkpointer["checkpoint_dir"])
        weights = WeightFiles(folder, names, str(settings.checkpointer["model_type"]))
        refuse_other_model(model, weights.shapes(), layers or {}, settings)
    return weights


@contextmanager
def _explained(settings: RecipeSettings) -> Iterator[None]:
    """Say of an error in reading weight files where they are and how to fetch them."""
    folder = Path(settings.checkpointer["checkpoint_dir"])
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"the weights in {folder} cannot be read: {error}; a file may be cut short or of "
            f"another model: fetch it again.\n{_remedy(settings, folder)}"
        ) from error


def load_(
    model: TransformerDecoder,
    settings: RecipeSettings,
    layers: Mapping[str, LowRankLinear],
    device: torch.device,
) -> None:
    """Load the base's weights into a model on the meta device, sharded or whole.

    One tensor is in memory at a time, besides what this process keeps.

    Raises:
        UserError: as `open_weights`.
    """
    weights = open_weights(model, settings, layers)
    places = model.state_dict(keep_vars=True)
    layers_in_nf4 = quantisable(model).values() if settings.quantize_base else ()
    in_nf4 = {id(layer.weight) for layer in layers_in_nf4}
    shards_on = torch.device("cpu") if settings.fsdp_cpu_offload else device
    held = {}
    # None: shown where there is a terminal.
    quiet = True if rank() else None
    with _explained(settings):
        reading = tqdm(weights.tensors(), "loading", unit="tensor", delay=5, disable=quiet)
        for name, whole in reading:
            place = places[inside_adapters(name, layers)]
            kept = _held(whole, place, dtype_of(settings), device, shards_on)
            held[inside_adapters(name, layers)] = quantised(kept) if id(place) in in_nf4 else kept
    model.load_state_dict(held, strict=False, assign=True)
    with training.set_default_dtype(dtype_of(settings)), device:
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    training.validate_no_params_on_meta_device(model)
    freeze_base_(model)
    model.set_num_output_chunks(OUTPUT_CHUNKS)


def _held(
    whole: Tensor, place: Tensor, dtype: torch.dtype, device: torch.device, shards_on: torch.device
) -> Tensor:
    """Return what this process keeps of a weight that goes to ``place``: its shard, or all."""
    if isinstance(place, DTensor):
        return own_shard(whole, place, dtype).to(shards_on)
    return whole.to(device, dtype, copy=True)
