"""Run KV-cache strategies: python run.py allocator=paged scheduler=continuous (-m sweeps; --help shows it all)."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (this is where it is said)
    sys.exit("error: kvarena needs Python 3.11 or newer, and this is {}.{}".format(*sys.version_info))

from kvarena.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
