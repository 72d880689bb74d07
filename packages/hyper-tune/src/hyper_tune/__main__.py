"""`python -m hyper_tune`: the command `hyper-tune`."""

import sys

from hyper_tune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
