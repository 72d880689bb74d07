"""The classification tasks of GLUE, from the hub."""

from collections.abc import Mapping

from hyper_tune.checks import require_choice
from hyper_tune.errors import UserError

GLUE: Mapping[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "wnli": ("sentence1", "sentence2"),
}
_OTHER = {
    "stsb": "its labels are similarities from 0 to 5, which is regression",
    "ax": "it has no labels, and no rows to train on",
}
REPOSITORY = "nyu-mll/glue"

Texts = tuple[tuple[str, ...], str, str]


def check_glue(task: str) -> None:
    """Refuse what is no classification task of GLUE.

    Raises:
        UserError: an unknown name, or a task of another kind.

    >>> check_glue("rte")
    """
    name = str(task).lower().replace("-", "")
    if name in _OTHER:
        raise UserError(
            f"data.glue is {task!r}, but {_OTHER[name]}; only classification is trained here: "
            f"{', '.join(GLUE)}."
        )
    require_choice("data.glue", task, GLUE)


def load_glue(task: str) -> tuple[list[Texts], list[Texts], tuple[str, ...]]:
    """Return texts, label and place of each row of a task's train and validation splits, and the
    names of the labels in GLUE's order, in which 1 is what F1 counts.

    Raises:
        UserError: the hub cannot be reached; what to download and where to put it.
    """
    from datasets import load_dataset

    try:
        splits = load_dataset(REPOSITORY, task)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data.glue={task}: the hub's {REPOSITORY} cannot be reached ({reason}). Where there "
            f"is a network, run `hf download {REPOSITORY} --repo-type dataset --include '{task}/*'"
            " --local-dir glue`; then leave data.glue out, and set data.train and data.validation "
            f"to the files in glue/{task}/."
        ) from error
    held_out = "validation_matched" if task == "mnli" else "validation"
    train, validation = (
        [
            (
                tuple(row[column] for column in GLUE[task]),
                splits[split].features["label"].int2str(row["label"]),
                f"GLUE {task}, {split}, row {number}",
            )
            for number, row in enumerate(splits[split], 1)
        ]
        for split in ("train", held_out)
    )
    return train, validation, tuple(splits["train"].features["label"].names)
