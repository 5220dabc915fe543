"""The OpenMP wait policy is in place before torch is loaded, and the user's own setting is kept."""

import os
import subprocess
import sys

import pytest

PROBE = "import sys, experiments, os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_policy(given: str | None, expected: str):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [expected, "False"]
