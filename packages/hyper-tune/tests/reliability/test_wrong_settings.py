"""A job of two processes that is given what it cannot do: one message, the same on both, status 2.

Each is a mistake of a different time of the start: the file, the settings, the base, the data, the
method, the optimizer, the loggers, the output folder, and the sizes of the job.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LOGGER = "torchtune.training.metric_logging.TensorBoardLogger"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["~seed.x"], "~seed.x: there is no such key to remove; "),
        (["batch_size=-1"], "batch_size is -1, but must be a whole number at least 1; "),
        (["method.name=lora"], "method.name 'lora' has no method.budget, method.hypernetwork, "),
        (["model=torchtune.models.llama3.llama9"], "torchtune.models.llama3 has no 'llama9'; did "),
        (["tokenizer.path=none.model"], "no tokenizer: tokenizer.path is "),
        (["model.rope_base=10000"], "config.json is of another model: its rope_theta is 500000.0"),
        (["dataset.path=none.jsonl"], "none.jsonl"),
        (["dataset.train_on_input=maybe"], "dataset.train_on_input is 'maybe', but must be "),
        (["method.init_rank=17", "method.budget=2"], "layers.0.attn.k_proj"),
        (["optimizer=torch.optim.LBFGS"], "torch.optim.LBFGS cannot take a step: "),
        ([f"metric_logger={LOGGER}"], "metric_logger.log_dir is missing; "),
        (["data_parallel_replicate_dim=3"], "need a multiple of 3 processes, but the job has 2; "),
        (["quantize_base=True"], "the base would be sharded over 2 processes"),
        (["split_generation=sometimes"], "split_generation is 'sometimes', but must be True, "),
    ],
)
def test_both_processes_refuse_alike(
    jobs: Any, job_config: Callable[..., Path], tmp_path: Path, overrides: list[str], expected: str
) -> None:
    job = jobs.start(job_config(), tmp_path / "run", *overrides, ranks=2)
    assert job.wait() == [2, 2], job.said(0)
    first, second = (error_of(job.said(rank)) for rank in (0, 1))
    assert expected in first
    assert second in (first, "rank 0 could not go on; its message says why.")
    assert not (tmp_path / "run" / "checkpoints").exists()


def error_of(said: str) -> str:
    """Return the one message of a process, which has no traceback."""
    assert "Traceback" not in said
    lines = said.splitlines()
    numbers = [number for number, line in enumerate(lines) if line.startswith("error")]
    assert len(numbers) == 1, said
    message = "\n".join(lines[numbers[0] :])
    return message.removeprefix("error: ").removeprefix("error (rank 1): ")
