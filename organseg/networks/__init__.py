"""Networks: plain modules that every method can train."""

from organseg.networks.unet import UNet

__all__ = ["UNet"]
