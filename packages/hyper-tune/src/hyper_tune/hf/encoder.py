"""One run of an encoder on texts with labels, from its settings to the exported adapter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from hyper_tune import parallel
from hyper_tune.errors import UserError
from hyper_tune.hf.adaptation import adapt
from hyper_tune.hf.adapted import AdaptedModel
from hyper_tune.hf.classification import LabelledTexts, load_classification
from hyper_tune.hf.encoder_settings import EncoderSettings
from hyper_tune.hf.heads import new_modules
from hyper_tune.hf.recorder import Recorder
from hyper_tune.hf.scores import SCORES, check_scores
from hyper_tune.metrics import Metrics
from hyper_tune.provenance import start_record
from hyper_tune.report import write_report
from hyper_tune.run_folder import RunFolder


def fine_tune_encoder(config: DictConfig) -> dict[str, Any]:
    """Train by ``config``; return the summary that is in the run's folder.

    The folder has ``config.yaml``, a line in ``starts.jsonl`` for each start, ``metrics.jsonl``
    with a row for each step and evaluation, ``summary.json``, ``checkpoints/`` of Trainer's, and
    ``adapter/``, plain LoRA in PEFT's layout with the head.

    Raises:
        UserError: a setting, file, row or model that cannot be used, before the model loads.
    """
    settings = EncoderSettings.from_config(config)
    parallel.usable_device(settings.device)
    train, held_out = load_classification(settings.data)
    check_scores(settings.metrics, train.names)
    tokenizer = _tokenizer(settings)
    arguments = _arguments(settings)
    folder = RunFolder(settings.output_dir)
    first = parallel.rank() == 0
    try:
        if first:
            folder.start(resume=settings.resume_from_checkpoint)
            folder.write_text("config.yaml", OmegaConf.to_yaml(config, resolve=True))
            folder.starts.append(start_record(torch.device(settings.device)))
        torch.manual_seed(settings.seed)
        model, loaded = _model(settings.model, train.names)
        whole = new_modules(model, loaded["missing_keys"])
        adapted = adapt(model, settings.method, modules_to_save=whole, device=arguments.device)
        trainer = _trainer(settings, adapted, arguments, tokenizer, train, held_out)
        trainer.remove_callback(PrinterCallback)
        recorder = Recorder(folder.metrics, adapted)
        if first:
            trainer.add_callback(recorder)
        before = _evaluated(trainer)
        last = _last_checkpoint(settings, folder.metrics)
        if finished := _finished(settings, last):
            adapted.load(finished)
        else:
            trainer.train(resume_from_checkpoint=last)
        trainer.remove_callback(recorder)  # what follows is in the summary
        summary = _summary(settings, adapted, before, _evaluated(trainer), recorder.seconds)
        if first:
            adapted.export(settings.output_dir / "adapter")
            folder.write_json("summary.json", summary)
            write_report(settings.output_dir)
        return summary
    finally:
        folder.close()


@contextmanager
def _from_hub(name: str) -> Iterator[None]:
    """Say what to do where a model is neither a folder nor to be had from the hub."""
    if not Path(name).is_dir() and Path(name).exists():
        raise UserError(f"model is {name!r}, which is a file; give the folder that it is in.")
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        there = "has files that cannot be read" if Path(name).is_dir() else "cannot be had"
        raise UserError(
            f"model {name!r} {there} ({reason}). Where there is a network, run `hf download {name} "
            f"--local-dir models/{Path(name).name}`, and set model=models/{Path(name).name}."
        ) from error


def _tokenizer(settings: EncoderSettings) -> Any:
    name = settings.model
    with _from_hub(name):
        AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    if settings.max_length > tokenizer.model_max_length:
        raise UserError(
            f"max_length is {settings.max_length}, but {name} reads "
            f"{tokenizer.model_max_length} tokens; lower it."
        )
    return tokenizer


def _model(name: str, labels: tuple[str, ...]) -> tuple[Any, Any]:
    """Return the model, and what transformers says of its loading."""
    classes = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    with _from_hub(name):
        return AutoModelForSequenceClassification.from_pretrained(  # type: ignore[no-any-return]
            name,
            output_loading_info=True,
            **(classes if labels else {"num_labels": 1, "problem_type": "regression"}),
            dtype=torch.float32,
            use_safetensors=True,
        )


def _arguments(settings: EncoderSettings) -> TrainingArguments:
    def when(steps: int | None) -> str:
        return {None: "epoch", 0: "no"}.get(steps, "steps")

    return TrainingArguments(
        output_dir=str(settings.output_dir / "checkpoints"),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=4 * settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm or 0.0,
        label_smoothing_factor=settings.label_smoothing,
        eval_strategy=when(settings.evaluate_every_n_steps),
        eval_steps=settings.evaluate_every_n_steps or None,
        save_strategy=when(settings.save_every_n_steps),
        save_steps=settings.save_every_n_steps or 500,
        save_total_limit=settings.keep_checkpoints,
        load_best_model_at_end=settings.keep_best,
        metric_for_best_model=settings.metrics[0],
        greater_is_better=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=settings.device == "cpu",
        report_to=[],
        disable_tqdm=True,
    )


class _Encoded(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows as a tokenizer has them, with their labels."""

    def __init__(self, rows: LabelledTexts, tokenizer: Any, longest: int) -> None:
        pairs = list(zip(*rows.texts, strict=True))
        encoded = tokenizer(*map(list, pairs), truncation=True, max_length=longest)
        self._rows = [
            {**{key: encoded[key][i] for key in encoded}, "labels": label}
            for i, label in enumerate(rows.labels)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


def _trainer(
    settings: EncoderSettings,
    adapted: AdaptedModel,
    arguments: TrainingArguments,
    tokenizer: Any,
    train: LabelledTexts,
    held_out: LabelledTexts,
) -> Any:
    patience = settings.early_stopping_patience
    stopping = [] if patience is None else [EarlyStoppingCallback(patience)]
    return Trainer(
        adapted.model,
        arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=_Encoded(train, tokenizer, settings.max_length),
        eval_dataset=_Encoded(held_out, tokenizer, settings.max_length),
        compute_metrics=_scorer(settings.metrics, regression=not train.names),
        callbacks=[adapted.callback(), *stopping],
        optimizers=adapted.optimizers(
            lr=settings.lr, head_lr=settings.head_lr, weight_decay=settings.weight_decay
        ),
    )


def _scorer(names: Any, *, regression: bool) -> Callable[[Any], dict[str, float]]:
    def scores(predictions: Any) -> dict[str, float]:
        given = torch.as_tensor(predictions.predictions)
        predicted = given.squeeze(dim=-1) if regression else given.argmax(dim=-1)
        labels = torch.as_tensor(predictions.label_ids)
        return {name: SCORES[name](predicted, labels) for name in names}

    return scores


def _last_checkpoint(settings: EncoderSettings, metrics: Metrics) -> str | None:
    folder = settings.output_dir / "checkpoints"
    if not settings.resume_from_checkpoint or not folder.is_dir():
        return None
    last: str | None = get_last_checkpoint(str(folder))
    if parallel.rank() == 0:
        metrics.truncate_after(int(last.rpartition("-")[2]) if last else 0)
    return last


def _finished(settings: EncoderSettings, last: str | None) -> str | None:
    """The checkpoint of a run that was over; Trainer would take one step more within an epoch."""
    if last is None or settings.max_steps is None:
        return None
    state = TrainerState.load_from_json(str(Path(last) / "trainer_state.json"))
    if not state.global_step >= state.max_steps == settings.max_steps:
        return None
    return (state.best_model_checkpoint if settings.keep_best else None) or last


def _evaluated(trainer: Any) -> dict[str, float]:
    found = trainer.evaluate()
    timing = ("time", "per_second", "epoch")
    return {
        key.removeprefix("eval_"): value for key, value in found.items() if not key.endswith(timing)
    }


def _summary(
    settings: EncoderSettings,
    adapted: AdaptedModel,
    before: dict[str, float],
    after: dict[str, float],
    seconds: list[float],
) -> dict[str, Any]:
    method = adapted.method
    whole = [p for m in method.modules_to_save.values() for p in m.parameters()]
    frozen = [p for p in adapted.model.parameters() if not p.requires_grad]
    return {
        "before": before,
        "after": after,
        "base_parameters": sum(p.numel() for p in frozen),
        "trainable_parameters": sum(p.numel() for p in method.parameters()),
        "factor_parameters": method.stack.values.numel(),
        "head_parameters": sum(p.numel() for p in whole),
        "ranks": method.ranks(),
        "initial_rank": settings.method.init_rank,
        "live_ranks": method.live_ranks,
        "total_ranks": method.total_ranks,
        "steps": adapted.steps,
        "auto_class": "AutoModelForSequenceClassification",
        "seconds_per_step": median(seconds) if seconds else None,
        "adapter": str(settings.output_dir / "adapter"),
    }
