"""The files of the data sets: which of those that one may have are in the folder."""

from dataclasses import dataclass
from pathlib import Path

from experiment import catalogue

from hyper_tune.errors import UserError

_PARTS = ("train", "test")


@dataclass(frozen=True)
class Source:
    """The files of a data set. ``test``: None where rows of ``train`` are held out instead.
    ``stand_in``: what they are where they are not that data set's.
    """

    train: Path
    test: Path | None
    stand_in: str | None


def find_source(name: str, scale: str, data: Path | None) -> Source:
    """Return the files of a data set.

    Raises:
        UserError: none are in the folder; what to download and where to put it.
    """
    entry = catalogue()["data"][name]
    offered = [*entry["sources"], *(entry.get("tiny", ()) if scale == "tiny" else ())]
    asked = " or ".join(" and ".join(s[k] for k in _PARTS if k in s) for s in offered)
    get = entry["get"].replace("DATA", str(data or "DATA"))
    if data is None or not data.is_dir():
        where = "--data is missing" if data is None else f"--data {data} is no folder"
        raise UserError(f"{where}; {name} needs {asked} in it. Where there is a network: {get}")
    for option in offered:
        parts = [(data / option[k]).resolve() for k in _PARTS if k in option]
        if all(part.exists() for part in parts):
            return Source(parts[0], (*parts, None)[1], option.get("stand_in"))
    raise UserError(f"{data} has no {name}: expected {asked}. Where there is a network: {get}")
