"""U-Transformer: attention at the bottleneck and the skips of a U-Net or nnU-Net (METHOD.md 3; thesis, chapter 5)."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn

from organseg.networks.attention import MultiHeadCrossAttention, MultiHeadSelfAttention, Positions, TransformerBlock
from organseg.networks.attention_unet import AttentionUNet
from organseg.networks.nnunet import NNUNet
from organseg.networks.unet import UNet

Backbone = Literal["unet", "attention_unet", "nnunet"]
_BACKBONES: dict[Backbone, type[UNet] | type[NNUNet]] = {
    "unet": UNet,
    "attention_unet": AttentionUNet,
    "nnunet": NNUNet,
}


class UTransformer(nn.Module):
    """A backbone whose bottleneck and skips see the whole image; each part can be left out (Tables 5.1 to 5.6).

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the logits; K for sigmoids, K + 1 for a softmax. Set by the method.
        backbone: What the attention is put into.
        mhsa: Self-attention in the bottleneck.
        mhca: Cross-attention at the skips.
        levels: How many skips have it, from the deepest on.
        heads: Of every attention.
        positional_encoding: Whether attention knows where its tokens are: by sines (true), `rotary`, or false.
        width: Channels of the backbone's first level.
        depth: Its levels, the bottom one included.
        dims: 2 for slices, 3 for volumes.
        options: Further arguments of the backbone.
        block: The bottleneck's attention becomes a Transformer block, with norms, residuals and MLP.
        keys: Most keys of a cross-attention, see `MultiHeadCrossAttention`.
        qk_norm: Keep attention from becoming too sharp to learn, see `MultiHeadSelfAttention`.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 7,
        backbone: Backbone = "unet",
        mhsa: bool = True,
        mhca: bool = True,
        levels: int = 3,
        heads: int = 8,
        positional_encoding: Positions = True,
        width: int = 64,
        depth: int = 5,
        dims: int = 2,
        options: Mapping[str, Any] | None = None,
        block: bool = False,
        keys: int | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if backbone not in _BACKBONES:
            msg = f"backbone is {backbone!r}, expected one of {', '.join(_BACKBONES)}"
            raise ValueError(msg)
        if qk_norm and not (mhsa or mhca):
            msg = "`qk_norm` is an option of attention, which is off; leave it out, or set `mhsa` or `mhca`"
            raise ValueError(msg)
        for part, present, option, given in (("mhsa", mhsa, "block", block), ("mhca", mhca, "keys", keys is not None)):
            if given and not present:
                msg = f"`{option}` is an option of `{part}`, which is off; leave it out, or set `{part}: true`"
                raise ValueError(msg)
        if mhca and backbone == "attention_unet":
            msg = "`mhca` would replace the gates of attention_unet; set `mhca: false`, or another backbone"
            raise ValueError(msg)
        self.backbone = _BACKBONES[backbone](
            in_channels, out_channels, width=width, depth=depth, dims=dims, **(options or {})
        )
        self.head = self.backbone.head
        self.backbone.head = nn.Identity()
        deepest_first = self.backbone.channels[::-1]
        if mhca and not 1 <= levels < len(deepest_first):
            msg = (
                f"levels is {levels}; a backbone of depth {len(deepest_first)} has skips 1 to {len(deepest_first) - 1}"
            )
            raise ValueError(msg)
        if mhsa:
            bottom = TransformerBlock if block else MultiHeadSelfAttention
            self.backbone.bottom = bottom(deepest_first[0], heads, dims, positional_encoding, qk_norm)
        gated = levels if mhca else 0
        for level, (high, skip) in enumerate(pairwise(deepest_first[: gated + 1])):
            gate = MultiHeadCrossAttention(high, skip, heads, dims, positional_encoding, keys, qk_norm)
            self.backbone.gates[level] = gate

    def features(self, image: Tensor) -> Tensor:
        """What the last 1 x 1 convolution sees: [B, C, *S] -> [B, width, *S], any size."""
        return self.backbone.features(image)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """[B, C, *S] -> logits [B, out_channels, *S], or the backbone's list of them for deep supervision."""
        outputs: Tensor | list[Tensor] = self.backbone(image)
        if isinstance(outputs, list):
            return [self.head(outputs[0]), *outputs[1:]]
        logits: Tensor = self.head(outputs)
        return logits
