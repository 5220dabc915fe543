"""Run KV-cache strategies: python run.py allocator=paged scheduler=continuous (-m sweeps)."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (this is where it is said)
    sys.exit("error: kvarena needs Python 3.11 or newer, and this is {}.{}".format(*sys.version_info))

from kvarena.reports.reading.packages import missing_package

try:
    from kvarena.experiments.entry import main
except ModuleNotFoundError as error:
    if (reason := missing_package(error)) is None:
        raise
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
