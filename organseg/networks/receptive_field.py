"""What a unit of a network sees: theoretical and effective receptive fields (METHOD.md 3.5; thesis, Figure 5.2).

The unit is the central one of a layer's output, summed over channels (Luo et al., Understanding the effective receptive
field in deep convolutional neural networks, NeurIPS 2016).
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

GAUSSIAN_SHARE = 1 - 0.9545
"""Of the maximum: where a Gaussian's value at two standard deviations is taken as its border."""

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def effective_receptive_field(
    network: nn.Module, layer: nn.Module, size: Sequence[int], samples: int = 20, seed: int = 0
) -> Tensor:
    """Gradient of the layer's central unit with respect to the input, averaged over random inputs.

    Args:
        network: Any network of images [B, 1, *S] with `features`; it is used as it is, in eval mode.
        layer: One of its layers, of which the unit is.
        size: S.
        samples: Random inputs (standard normal, like normalised images).
        seed: Of these.

    Returns:
        float32 [*S], absolute values.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    total = torch.zeros(*size)
    for _ in range(samples):
        image = torch.randn(1, 1, *size, generator=generator).to(device).requires_grad_()
        total += _central_gradient(network, layer, image).abs().cpu()
    network.train(training)
    return total / samples


def theoretical_receptive_field(network: nn.Module, layer_name: str, size: Sequence[int]) -> Tensor:
    """What the layer's central unit could see, whatever the weights.

    Computed on a copy in which nothing can cancel: positive weights, averages in the place of maxima, no norms (whose
    statistics see everything, but tell nothing of places).

    Args:
        network: As above.
        layer_name: Its name in `network.named_modules()`.
        size: S; as large as the field, or it is cut.

    Returns:
        bool [*S].
    """
    positive = copy.deepcopy(network).cpu().float().eval()
    for name, module in list(positive.named_modules()):
        replacement = _without_cancelling(module)
        if replacement is not None:
            parent, _, child = name.rpartition(".")
            setattr(positive.get_submodule(parent), child, replacement)
    for parameter in positive.parameters():
        # Sums over all inputs of a unit stay near 1, so that deep layers neither overflow nor vanish.
        parameter.data.fill_(1 / parameter[0].numel() if parameter.ndim > 1 else 0.1)
    image = torch.ones(1, 1, *size, requires_grad=True)
    return _central_gradient(positive, positive.get_submodule(layer_name), image) != 0


def field_size(field: Tensor) -> float:
    """Side of a square (or cube) with as many pixels as lie above `GAUSSIAN_SHARE` of the field's maximum."""
    inside = int((field > GAUSSIAN_SHARE * field.max()).sum())
    return float(inside ** (1 / field.ndim))


def _central_gradient(network: nn.Module, layer: nn.Module, image: Tensor) -> Tensor:
    """[1, 1, *S] -> gradient [*S] of the layer's central unit."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call: outputs.append(call[-1]))
    try:
        network.features(image)  # type: ignore[operator]  # every network has features
    finally:
        handle.remove()
    if len(outputs) != 1 or getattr(outputs[0], "ndim", 0) != image.ndim:
        raise ValueError("it gives no single map on the way to the network's features")
    unit = outputs[0][0]
    for n in unit.shape[1:]:
        unit = unit.select(1, n // 2)
    return torch.autograd.grad(unit.sum(), image)[0][0, 0]


def _without_cancelling(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.MaxPool2d):
        return nn.AvgPool2d(module.kernel_size, module.stride)
    if isinstance(module, nn.MaxPool3d):
        return nn.AvgPool3d(module.kernel_size, module.stride)
    return nn.Identity() if isinstance(module, _NORMS) else None
