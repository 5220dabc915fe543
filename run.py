"""Run KV-cache strategies: python run.py allocator=paged scheduler=continuous (-m sweeps)."""

import sys

from experiments.entry import main

if __name__ == "__main__":
    sys.exit(main())
