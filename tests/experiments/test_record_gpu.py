"""The founding claim's kept cells, and what its measurement says without a GPU."""

import shutil
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from experiments.gpu import claims


def test_kept_cells_of_the_founding_claim_still_make_their_report(tmp_path: Path):
    kept = Path(__file__).parents[2] / "docs/results/h200-claim"
    for name in ("pagedxcontinuous", "contiguousxstatic"):
        shutil.copy(kept / f"{name}.json.gz", tmp_path)
    claims.report(tmp_path, "0" * 40)
    text = (tmp_path / "report.md").read_text()
    assert "paged × continuous is the fastest of 2 cells with 3,894 output tokens/s" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_they_say_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="run it on a CUDA machine"):
        claims.measure(tmp_path, "tiny", 1, 64, "cuda")
