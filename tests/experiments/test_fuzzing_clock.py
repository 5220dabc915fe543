"""The clock of the fuzzing of constraints."""

import subprocess
import sys

from kvarena.experiments.fuzzing.constraints import processor_seconds

BUSY = "import time\nwhile time.process_time() < 0.4: pass"


def test_time_of_a_worker_that_has_ended_still_counts():
    start = processor_seconds()
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    assert processor_seconds() - start >= 0.35  # counted in ticks
