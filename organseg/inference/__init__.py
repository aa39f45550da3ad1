"""Inference: a whole case through a callable, with bounded memory."""

from organseg.inference.slicewise import segment_slices

__all__ = ["segment_slices"]
