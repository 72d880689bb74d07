"""Peak memory of the host while a sharded base is loaded: tensor by tensor, and all at once.

    python benchmarks/loading.py --write benchmarks/results/loading.md

Each of two processes over gloo loads its shards of a random Llama in bfloat16, once as hyper-tune
does and once as torchtune's recipes do: its checkpointer reads all files on every process. The
peak is the highest resident memory of a process above what it had before. Linux only.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchtune import training

from hyper_tune import MethodConfig, parallel
from hyper_tune.attach import attach
from hyper_tune.torchtune.base_model import build_on_meta, load_, prepare_
from hyper_tune.torchtune.settings import RecipeSettings
from lowrank_adapters import inside_adapters

SIZES = {"num_layers": 12, "num_heads": 16, "num_kv_heads": 4, "embed_dim": 1024}
SIZES |= {"intermediate_dim": 2816, "vocab_size": 16000, "max_seq_len": 128}
FILES, PROCESSES = 4, 2
WAYS = {"tensor by tensor": "hyper-tune", "all files at once": "torchtune's checkpointer"}


def make_base(folder: Path) -> None:
    """Write random weights under Hugging Face's names."""
    folder.mkdir()
    width, kv_width = SIZES["embed_dim"], SIZES["embed_dim"] // 4
    inner = SIZES["intermediate_dim"]
    per_layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {"model.embed_tokens.weight": (SIZES["vocab_size"], width)}
    for layer in range(SIZES["num_layers"]):
        shapes |= {f"model.layers.{layer}.{k}.weight": shape for k, shape in per_layer.items()}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (SIZES["vocab_size"], width)}
    names = list(shapes)
    for number in range(FILES):
        own = names[number * len(names) // FILES : (number + 1) * len(names) // FILES]
        tensors = {name: torch.randn(shapes[name]).bfloat16() for name in own}
        save_file(tensors, folder / f"model-{number}.safetensors")
    heads = {"num_attention_heads": SIZES["num_heads"], "hidden_size": width}
    config = heads | {"num_key_value_heads": SIZES["num_kv_heads"]}
    (folder / "config.json").write_text(json.dumps(config))


def settings_of(folder: Path) -> RecipeSettings:
    return RecipeSettings(
        output_dir=folder / "run",
        model={"_component_": "torchtune.models.llama3.llama3", **SIZES},
        checkpointer={
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(folder / "base"),
            "checkpoint_files": [f"model-{number}.safetensors" for number in range(FILES)],
            "model_type": "LLAMA3",
        },
        method=MethodConfig("lora", init_rank=2),
        dtype="bf16",
        **{key: {} for key in ("tokenizer", "dataset", "optimizer", "lr_scheduler")},
    )


def resident(field: str) -> int:
    """Return a figure of this process's memory in bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def work(folder: Path, way: str) -> None:
    """Load this process's shards, and write what that took."""
    torch.set_num_threads(1)
    device = parallel.start(torch.device("cpu"))
    settings = settings_of(folder)
    model = build_on_meta(settings)
    layers, stack, _ = attach(model, settings.method)
    prepare_(model, settings, stack.leaf_parameters(), device)
    Path("/proc/self/clear_refs").write_text("5")  # the highest is that from here
    before = resident("VmRSS")
    if way == "tensor by tensor":
        load_(model, settings, layers, device)
    else:
        checkpointer = dict(settings.checkpointer, output_dir=str(folder / "run"))
        del checkpointer["_component_"]
        weights = training.FullModelHFCheckpointer(**checkpointer).load_checkpoint()
        weights = {inside_adapters(k, layers): v for k, v in weights[training.MODEL_KEY].items()}
        training.load_from_full_model_state_dict(model, weights, device, strict=False)
    peak = resident("VmHWM") - before
    factors = {id(leaf) for leaf in stack.leaf_parameters()}
    base = [p for p in model.parameters() if id(p) not in factors]
    seen = {
        "peak": peak,
        "shards": sum(p.to_local().nbytes for p in base),
        "whole": sum(p.nbytes for p in base),
        "largest": max(p.nbytes for p in base),
        "digest": float(sum(p.to_local().double().abs().sum() for p in base)),
    }
    (folder / f"{way}-{parallel.rank()}.json").write_text(json.dumps(seen))
    parallel.stop()


def measure() -> str:
    """Return the table."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    seen = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base")
        for way in WAYS:
            command = [sys.executable, *launcher, __file__, "--work", name, way]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            files = [folder / f"{way}-{rank}.json" for rank in range(PROCESSES)]
            seen[way] = [json.loads(file.read_text()) for file in files]
    digests = [[rank["digest"] for rank in ranks] for ranks in seen.values()]
    assert digests[0] == digests[1], "the two ways loaded different weights"
    rows = [
        f"| {way} ({who}) | {max(rank['peak'] for rank in seen[way]) / 2**20:.0f} |"
        for way, who in WAYS.items()
    ]
    one = seen["tensor by tensor"][0]
    sizes = {key: f"{one[key] / 2**20:.0f}" for key in ("whole", "shards", "largest")}
    return "\n".join(
        [
            "# Loading a sharded base",
            "",
            f"`python benchmarks/loading.py`: {PROCESSES} processes, a Llama of {sizes['whole']} "
            f"MiB in bfloat16 in {FILES} files; each process keeps {sizes['shards']} MiB, and the "
            f"largest tensor has {sizes['largest']} MiB. Both ways end with the same weights. "
            f"PyTorch {torch.__version__}, {platform.machine()}.",
            "",
            "| each process reads | highest memory above the start, MiB |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--work", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(Path(arguments.work[0]), arguments.work[1])
        return
    table = measure()
    print(table)
    if arguments.write:
        arguments.write.write_text(table)


if __name__ == "__main__":
    main()
