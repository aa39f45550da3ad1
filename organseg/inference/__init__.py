"""Inference: a whole case through a callable."""

from organseg.inference.slicewise import segment_slices
from organseg.inference.windows import segment_windows

__all__ = ["segment_slices", "segment_windows"]
