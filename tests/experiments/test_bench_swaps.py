"""What the swap benchmark fits, and what it says without a GPU."""

import pytest
import torch

from kvarena.engine.errors import ConfigError
from kvarena.experiments.benchmarks.kernels import swaps


def test_the_fit_finds_the_cost_of_a_transfer_and_of_a_byte():
    lines = []
    for block_size in swaps.BLOCK_SIZES:
        transfers, num_bytes = 512 // block_size, 512 * 819_200
        microseconds = transfers * 6.0 + num_bytes / 25e3
        lines.append({"num_transfers": transfers, "bytes": num_bytes})
        lines[-1] |= {"swap_out_us": 1.1 * microseconds, "swap_in_us": 0.9 * microseconds}
    assert swaps.fit(lines) == {"us_per_transfer": 6.0, "gb_per_second": 25.0, "largest_error": 0.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on this machine")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    with pytest.raises(ConfigError, match="run it on a CUDA machine"):
        swaps.main([])
    assert capsys.readouterr().out == ""
