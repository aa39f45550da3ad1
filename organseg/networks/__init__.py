"""Networks: plain modules that every method can train."""

from organseg.networks.attention import MultiHeadCrossAttention, MultiHeadSelfAttention, TransformerBlock
from organseg.networks.attention_unet import AttentionUNet
from organseg.networks.confidence import ConfidenceHead
from organseg.networks.hybrid import HybridUNet
from organseg.networks.nnunet import NNUNet
from organseg.networks.unet import UNet
from organseg.networks.utransformer import UTransformer

__all__ = [
    "AttentionUNet",
    "ConfidenceHead",
    "HybridUNet",
    "MultiHeadCrossAttention",
    "MultiHeadSelfAttention",
    "NNUNet",
    "TransformerBlock",
    "UNet",
    "UTransformer",
]
