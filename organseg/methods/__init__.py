"""Methods: LightningModules that train and apply a network."""

from organseg.methods.partial_label import PartialLabelModule
from organseg.methods.prior import PriorModule
from organseg.methods.transformer import TransformerModule

__all__ = ["PartialLabelModule", "PriorModule", "TransformerModule"]
