"""Requests of two runs side by side."""

import numpy as np

from kvarena.reports.comparing.paired import request_ratios


def test_requests_without_a_value_are_left_out():
    values = np.array([1.0, np.nan, 2.0, 0.0, 3.0])
    assert request_ratios(values, np.array([2.0, 1.0, np.nan, 1.0, 1.0])).tolist() == [0.5, 3.0]
    assert len(request_ratios(values[:0], values[:0])) == 0
