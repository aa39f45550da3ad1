"""Methods: LightningModules that train and apply a network."""

from organseg.methods.partial_label import PartialLabelModule

__all__ = ["PartialLabelModule"]
