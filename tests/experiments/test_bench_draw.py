"""The draw's benchmark, as far as it needs no GPU."""

import pytest
import torch

from kvarena.experiments.benchmarks.kernels import draw


def test_rows_are_drawn_with_the_settings_of_their_line():
    fields = {"top_k": 20, "top_p": 0.95}
    params = draw.params_of(4, fields, 1, 100, half=True)
    assert params[4].tolist() == [20, 0, 20, 0]
    assert torch.allclose(params[5].view(torch.float32), torch.tensor([0.95, 1.0, 0.95, 1.0]))
    other = draw.params_of(4, fields, 2, 100, half=True)
    assert torch.equal(params[4:], other[4:]) and (params[2:4] != other[2:4]).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is a GPU")
def test_what_it_cannot_measure_is_refused(capsys):
    with pytest.raises(SystemExit):
        draw.main(["--sampling", "top_p=3.0"])
    assert "top_p=3.0 must be in (0, 1]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        draw.main(["--rows", "0"])
    assert "--rows must be at least 1" in capsys.readouterr().err
