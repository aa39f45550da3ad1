"""Table A.1's head."""

import pytest
import torch

from organseg.networks import ConfidenceHead


def test_parameters_of_table_a1():
    assert sum(p.numel() for p in ConfidenceHead().parameters()) == 769_487


@pytest.mark.parametrize("dims", [2, 3])
def test_shape_range_and_precision(dims):
    head = ConfidenceHead(4, 3, hidden=(6, 5), dims=dims)
    with torch.autocast("cpu", torch.bfloat16):
        confidence = head(torch.randn(2, 4, *(7, 5, 6)[:dims]))
    assert confidence.shape == (2, 3, *(7, 5, 6)[:dims])
    assert confidence.dtype == torch.float32
    assert confidence.min() > 0 and confidence.max() < 1
