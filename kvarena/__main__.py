"""`python -m kvarena`: the `kvarena` command where it is not installed."""

import sys

from kvarena.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
