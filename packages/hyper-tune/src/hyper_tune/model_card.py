"""The card of an exported model: what it is, how to use it, what made it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyper_tune.comparison import compare_figures
from hyper_tune.method import METHODS
from hyper_tune.run_record import RunRecord
from rank_budget.tables import rank_table

CARD = "README.md"

_USE_ADAPTER = """\
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({base})
model = PeftModel.from_pretrained(base, "this folder")
"""
_USE_MERGED = """\
from transformers import {auto}

model = {auto}.from_pretrained("this folder")
"""

_PIPELINES = {"AutoModelForSequenceClassification": "text-classification"}


def model_card(
    run: RunRecord, ranks: Mapping[str, int], *, step: int | None = None, merged: bool = False
) -> str:
    """Return the card as Markdown, with the head that the Hugging Face Hub reads.

    ``ranks``: live components by module. ``step``: of the checkpoint that was exported; None at
    the end of the run. ``merged``: the base with the updates added, or an adapter.
    """
    method = run.config["method"]
    base = _base(run.config)
    kind = "model" if merged else "adapter"
    initial = int(method.get("init_rank") or max(ranks.values()))
    figures = compare_figures([run])
    done = figures if step is None else [("step of this checkpoint", str(step)), *figures]
    use = _USE_MERGED if merged else _USE_ADAPTER
    auto_class = str((run.summary or {}).get("auto_class", "AutoModelForCausalLM"))
    parts = [
        _head(base, str(method["name"]), auto_class, merged=merged),
        f"# {base or 'A local model'}, {method['name']} {kind}",
        _what(method, merged=merged),
        f"```python\n{use.format(base=json.dumps(base or 'the base model'), auto=auto_class)}```",
        "## The run",
        _table(done),
        "## Settings",
        f"```json\n{json.dumps(_shown(run.config), indent=2)}\n```",
        "## Live ranks",
        f"```\n{rank_table(ranks, initial)}\n```",
        "## Made with",
        _table(_origin(run)),
    ]
    return "\n\n".join(parts) + "\n"


def _what(method: Mapping[str, Any], *, merged: bool) -> str:
    if merged:
        return "The base model with the low-rank updates added to its weights."
    scalar = (method.get("magnitude") or {}).get("form") == "scalar"
    is_dora = METHODS[str(method["name"])].layer == "dora" and not scalar
    kind = "DoRA" if is_dora else "Plain LoRA"
    return (
        f"{kind} in PEFT's layout: scales, masks and scaling are folded into B, matrices of "
        "fewer ranks are padded with zeros, and `lora_alpha` equals `r`."
    )


def _base(config: Mapping[str, Any]) -> str | None:
    named = config.get("base_model")
    return str(named) if named is not None and "/" in str(named) else None


def _head(base: str | None, method: str, auto_class: str, *, merged: bool) -> str:
    head: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": _PIPELINES.get(auto_class, "text-generation"),
        "tags": ["hyper-tune", method] + ([] if merged else ["lora"]),
    }
    if base is not None:
        head["base_model"] = base
        head["base_model_relation"] = "finetune" if merged else "adapter"
    # JSON is YAML, and quotes whatever a name may hold.
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    return "\n".join(["---", *lines, "---"])


def _shown(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that made the numbers, with no folders of this machine."""
    keys = ("method", "dataset", "optimizer", "lr_scheduler", "clip_grad_norm", "seed", "shuffle")
    sizes = ("batch_size", "gradient_accumulation_steps", "epochs", "max_steps", "dtype")
    return {key: _without_folders(config[key]) for key in (*keys, *sizes) if key in config}


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    return Path(value).name if isinstance(value, str) and "/" in value else value


def _origin(run: RunRecord) -> list[tuple[str, str]]:
    if not run.starts:
        return [("started", "not recorded")]
    start = run.starts[-1]
    git = start["git"]
    commit = "none" if git is None else git["commit"] + (" with changes" if git["changed"] else "")
    return [
        ("started", start["time"]),
        ("git commit of the folder it was started in", commit),
        ("python", start["python"]),
        *start["versions"].items(),
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| | |", "|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
