"""Networks: plain modules that every method can train."""

from organseg.networks.confidence import ConfidenceHead
from organseg.networks.unet import UNet

__all__ = ["ConfidenceHead", "UNet"]
