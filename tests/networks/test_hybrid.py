"""6.2: convolutions see patches, attention sees the volume, and memory does not grow with the number of patches."""

import pytest
import torch

from organseg.networks import HybridUNet, UTransformer
from organseg.networks.hybrid import _assembled, _parts


def small(dims=3, patch=8, **options) -> HybridUNet:
    torch.manual_seed(0)
    made = HybridUNet(out_channels=2, patch=(patch,) * dims, heads=2, width=4, depth=3, dims=dims, **options)
    return made.eval()


@pytest.mark.parametrize("size", [(8, 8, 8), (16, 24, 8), (12, 20, 4)])
def test_parts_are_put_together_again(size):
    image = torch.randn(2, 3, *size)
    assert torch.equal(_assembled(list(_parts(image, (8, 8, 8))), size, (8, 8, 8)), image)


@pytest.mark.parametrize("dims", [2, 3])
def test_one_patch_is_a_u_transformer(dims):
    hybrid = small(dims, patch=16)
    plain = UTransformer(out_channels=2, width=4, depth=3, dims=dims, heads=2, mhca=False, levels=1, block=True,
                         options={"norm": "instance", "norm_after": "convolution"}).eval()  # fmt: skip
    weights = {name.replace("unet.", "backbone."): value for name, value in hybrid.state_dict().items()}
    plain.load_state_dict({
        name.replace("bottom.", "backbone.bottom.", 1) if name.startswith("bottom.") else name: value
        for name, value in weights.items()
    })  # fmt: skip
    image = torch.randn(2, 1, *(13, 16, 15)[:dims])
    with torch.no_grad():
        assert torch.allclose(hybrid(image), plain(image), atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_tokens_that_see_padding_alone_take_no_part(dims):
    hybrid, sizes = small(dims), []
    hybrid.bottom.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[2:]))
    image = torch.randn(1, 1, *(9, 20, 8)[:dims])  # patches of 8 voxels, tokens of 4
    with torch.no_grad():
        assert hybrid(image).shape[2:] == image.shape[2:]
    assert sizes == [(3, 5, 2)[:dims]]


def test_far_patches_are_seen_through_attention_alone():
    image = torch.randn(1, 1, 8, 8, 32, requires_grad=True)
    for hybrid, seen in ((small(), True), (small(), False)):
        if not seen:
            hybrid.bottom = torch.nn.Identity()
        gradient = torch.autograd.grad(hybrid(image)[..., :8].square().sum(), image)[0]
        assert bool(gradient[..., 24:].any()) is seen
        assert gradient[..., :8].any()


def test_gradients_are_those_of_keeping_everything(monkeypatch):
    hybrid, image = small(), torch.randn(1, 1, 8, 16, 12)
    hybrid(image).square().sum().backward()
    expected = [p.grad.clone() for p in hybrid.parameters()]
    hybrid.zero_grad()
    monkeypatch.setattr("organseg.networks.hybrid.checkpoint", lambda function, *inputs, **_: function(*inputs))
    hybrid(image).square().sum().backward()
    assert all(
        torch.allclose(p.grad, wanted, atol=1e-4) for p, wanted in zip(hybrid.parameters(), expected, strict=True)
    )


def test_a_remainder_of_one_stride_has_something_to_normalise_over():
    with torch.no_grad():
        assert small()(torch.randn(1, 1, 12, 12, 12)).shape == (1, 2, 12, 12, 12)


def kept_values(network, size) -> int:
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.features(torch.randn(1, 1, *size)).sum()
    return sum(kept.values())


def test_little_is_kept_for_the_gradient():
    size = (16, 16, 32)
    plain = UTransformer(out_channels=2, width=4, depth=3, dims=3, heads=2, mhca=False, levels=1)
    assert kept_values(small(), size) < 0.25 * kept_values(plain, size)


def test_a_step_under_autocast_in_channels_last_is_close_to_one_in_fp32():
    hybrid, image = small().train(), torch.randn(1, 1, 12, 16, 8)
    found = []
    for mixed in (False, True):
        hybrid.zero_grad()
        if mixed:
            hybrid = hybrid.to(memory_format=torch.channels_last_3d)
            image = image.to(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = hybrid(image)
        logits.float().square().mean().backward()
        found.append((logits.float(), torch.cat([parameter.grad.flatten() for parameter in hybrid.parameters()])))
    (expected, exact), (logits, rounded) = found
    assert torch.allclose(logits, expected, atol=0.1)
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.95


@pytest.mark.parametrize("options", [{"patch": (8, 8)}, {"patch": (6, 8, 8)}, {"patch": (4, 4, 4)}, {"norm": "batch"}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="HybridUNet needs"):
        HybridUNet(**{"width": 4, "depth": 3, "patch": (8, 8, 8), **options})
