"""Fine-tunes an encoder on a classification set by a method, as a file of settings says.

    python recipes/encoders/train.py --config recipes/encoders/rte.yaml \
        data_dir=glue method.name=hyperadalora
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hyper_tune.errors import EXIT_MISTAKE, PERSONS_MISTAKES, UserError
from hyper_tune.hf.encoder import fine_tune_encoder
from hyper_tune.overrides import apply_overrides
from hyper_tune.packaged import read_config


def main(words: Sequence[str]) -> int:
    """Run what the words say; return the status for the shell."""
    try:
        if "--config" not in words[:-1]:
            raise UserError("--config is missing; give a file, such as recipes/encoders/rte.yaml.")
        place = words.index("--config")
        path = Path(words[place + 1])
        if not path.is_file():
            raise UserError(f"--config {path} does not exist.")
        config = apply_overrides(read_config(path), [*words[:place], *words[place + 2 :]])
        summary = fine_tune_encoder(config)
    except PERSONS_MISTAKES as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_MISTAKE
    for when in ("before", "after"):
        print(f"{when}: " + ", ".join(f"{k} {v:.4f}" for k, v in summary[when].items()))
    print(f"ranks: {summary['live_ranks']} of {summary['total_ranks']}")
    print(f"adapter: {summary['adapter']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
