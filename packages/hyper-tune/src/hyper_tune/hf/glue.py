"""The tasks of GLUE, from the hub."""

from collections.abc import Mapping

from hyper_tune.checks import require_choice
from hyper_tune.errors import UserError

GLUE: Mapping[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mnli_mismatched": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
REGRESSION = ("stsb",)  # similarities from 0 to 5
# Where it is not the split "validation" of the task's own rows.
_HELD_OUT = {
    "mnli": ("mnli", "validation_matched"),
    "mnli_mismatched": ("mnli", "validation_mismatched"),
}
REPOSITORY = "nyu-mll/glue"

Texts = tuple[tuple[str, ...], str, str]


def check_glue(task: str) -> None:
    """Refuse what is no task of GLUE that can be trained.

    Raises:
        UserError: an unknown name, or the set that has no labels.

    >>> check_glue("rte")
    """
    if task == "ax":
        raise UserError(
            "data.glue is 'ax', but it has no labels, and no rows to train on; choose of "
            f"{', '.join(GLUE)}."
        )
    require_choice("data.glue", task, GLUE)


def load_glue(task: str) -> tuple[list[Texts], list[Texts], tuple[str, ...]]:
    """Return texts, label and place of each row of a task's train and validation splits, and the
    names of the labels in GLUE's order, in which 1 is what F1 counts; none of a regression's.

    Raises:
        UserError: the hub cannot be reached; what to download and where to put it.
    """
    from datasets import load_dataset

    place, held_out = _HELD_OUT.get(task, (task, "validation"))
    try:
        splits = load_dataset(REPOSITORY, place)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data.glue={task}: the hub's {REPOSITORY} cannot be reached ({reason}). Where there "
            f"is a network, run `hf download {REPOSITORY} --repo-type dataset --include '{place}/*'"
            " --local-dir glue`; then leave data.glue out, and set data.train and data.validation "
            f"to the files in glue/{place}/."
        ) from error
    label = splits["train"].features["label"]
    train, validation = (
        [
            (
                tuple(row[column] for column in GLUE[task]),
                str(row["label"]) if task in REGRESSION else label.int2str(row["label"]),
                f"GLUE {task}, {split}, row {number}",
            )
            for number, row in enumerate(splits[split], 1)
        ]
        for split in ("train", held_out)
    )
    return train, validation, () if task in REGRESSION else tuple(label.names)
