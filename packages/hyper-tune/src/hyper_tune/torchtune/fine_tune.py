"""A configuration, run from its start to a folder that explains itself."""

from functools import partial

from omegaconf import DictConfig, OmegaConf

from hyper_tune import parallel
from hyper_tune.provenance import start_record
from hyper_tune.report import write_report
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings


def fine_tune(config: DictConfig) -> None:
    """Train by ``config``, and keep beside the results what they came from.

    The run folder gets ``config.yaml``, a line in ``starts.jsonl`` for each start, and at the end
    a model card in ``adapter/`` and, with matplotlib, ``loss.png`` and ``ranks.png``.

    Raises:
        UserError: a setting, file or record that cannot be used.
    """
    settings = RecipeSettings.from_config(config)
    with FineTuning(settings) as run:
        parallel.on_rank_zero(partial(_record_start, run, config), run.device)
        run.train()
        parallel.on_rank_zero(lambda: write_report(run.folder.path), run.device)


def _record_start(run: FineTuning, config: DictConfig) -> None:
    run.folder.write_text("config.yaml", OmegaConf.to_yaml(config, resolve=True))
    run.folder.starts.append(start_record(run.device))
    run.loggers.log_config(config)
