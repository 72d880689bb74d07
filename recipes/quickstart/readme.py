"""Puts the figures of the last quickstart into the README and the documentation.

nox -s quickstart && python recipes/quickstart/readme.py
"""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = ROOT / "quickstart-run" / "run"
ASSETS = ROOT / "docs" / "assets" / "quickstart"


def main() -> None:
    """Replace the README's block and the files in `ASSETS` by those of the last run."""
    ASSETS.mkdir(parents=True, exist_ok=True)
    for name in ("report.txt", "loss.png", "ranks.png"):
        shutil.copyfile(RUN / name, ASSETS / name)
    readme = ROOT / "README.md"
    report = (ASSETS / "report.txt").read_text()
    block = re.compile(r"(<!-- quickstart -->\n```\n).*?(```\n<!-- /quickstart -->)", re.DOTALL)
    text, count = block.subn(lambda found: found[1] + report + found[2], readme.read_text())
    assert count == 1, f"{readme} must have one block between <!-- quickstart --> comments"
    readme.write_text(text)


if __name__ == "__main__":
    main()
