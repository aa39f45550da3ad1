"""Rotary positions: what queries and keys make together depends on how far apart their pixels are, and where to."""

import math

import pytest
import torch

from organseg.networks import MultiHeadCrossAttention, MultiHeadSelfAttention, TransformerBlock, UTransformer
from organseg.networks.attention import attend, rotated, split_heads, to_map, to_tokens


def tokens(size, channels=8, heads=2):
    torch.manual_seed(0)
    return torch.randn(1, heads, math.prod(size), channels)


def test_angles_by_hand():
    # Two pixels in 1D and four channels: pairs (0, 2) and (1, 3), periods 2 and 32.
    turned = rotated(torch.tensor([[[[1.0, 1, 0, 0], [1, 1, 0, 0]]]]), [2])[0, 0]
    assert torch.equal(turned[0], torch.tensor([1.0, 1, 0, 0]))
    sixteenth = math.pi / 16
    assert torch.allclose(turned[1], torch.tensor([-1, math.cos(sixteenth), 0, math.sin(sixteenth)]), atol=1e-6)


def test_each_axis_has_pairs_of_its_own():
    one = torch.zeros(1, 1, 6, 4)
    one[..., :2] = 1
    turned = to_map(rotated(one, [2, 3])[0], [2, 3])[0]  # channels 0 and 2 along the rows, 1 and 3 along the columns
    assert torch.allclose(turned[0], torch.tensor([1.0, -1])[:, None].expand(2, 3), atol=1e-6)
    assert torch.allclose(turned[1], torch.tensor([1.0, -1, 1])[None].expand(2, 3), atol=1e-6)
    assert turned[2:].abs().max() < 1e-6


@pytest.mark.parametrize(("size", "channels"), [((5,), 4), ((3, 4), 8), ((3, 4), 11), ((2, 3, 4), 13)])
def test_lengths_stay_and_what_is_left_over_too(size, channels):
    given = tokens(size, channels)
    turned = rotated(given, size)
    assert torch.allclose(turned.norm(dim=-1), given.norm(dim=-1), atol=1e-5)
    used = 2 * len(size) * (channels // 2 // len(size))
    assert torch.equal(turned[..., used:], given[..., used:])
    assert not torch.allclose(turned[..., 1:, :used], given[..., 1:, :used])


@pytest.mark.parametrize("size", [(4, 5), (3, 4, 3)])
def test_scores_depend_on_the_distance_alone(size):
    query, key = (vector.expand(1, 1, math.prod(size), 24) for vector in torch.randn(2, 24))
    scores = rotated(query, size)[0, 0] @ rotated(key, size)[0, 0].T
    index = torch.cartesian_prod(*(torch.arange(n) for n in size))
    by_distance: dict[tuple[int, ...], list[float]] = {}
    for i, here in enumerate(index):
        for j, there in enumerate(index):
            by_distance.setdefault(tuple((there - here).tolist()), []).append(float(scores[i, j]))
    assert all(max(found) - min(found) < 1e-4 for found in by_distance.values())
    assert len({round(found[0], 3) for found in by_distance.values()}) > 0.9 * len(by_distance)


def test_keys_of_a_coarser_map_lie_in_the_middle_of_their_pixels():
    keys = torch.randn(1, 1, 1, 8).expand(1, 1, 2, 8)
    fine = rotated(keys[:, :, :1].expand(1, 1, 5, 8), [5])
    # Four pixels pooled to two: indices 0.5 and 2.5; six to two: 1 and 4.
    assert torch.allclose(rotated(keys, [2], [6])[0, 0], fine[0, 0, [1, 4]], atol=1e-5)
    half = rotated(keys, [2], [4])[0, 0]
    assert torch.allclose(half[1] @ fine[0, 0, 3], half[0] @ fine[0, 0, 1], atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_self_attention_is_torchs_with_turned_queries_and_keys(dims):
    torch.manual_seed(0)
    module = MultiHeadSelfAttention(24, 2, dims, "rotary").eval()
    image = torch.randn(2, 24, *(3, 4, 2)[:dims])
    size = image.shape[2:]
    query, key, value = (split_heads(map_(to_tokens(image)), 2) for map_ in (module.query, module.key, module.value))
    mixed = attend(rotated(query, size), rotated(key, size), value)
    with torch.no_grad():
        expected = to_map(module.out(mixed.transpose(1, 2).flatten(2)), size)
        assert torch.allclose(module(image), expected, atol=1e-6)
        weights = module.weights(image)
        again = to_map(module.out((weights @ value).transpose(1, 2).flatten(2)), size)
        assert torch.allclose(again, expected, atol=1e-5)
        assert torch.allclose(module.weights(image, slice(1, 3)), weights[:, :, 1:3])


def test_it_knows_an_order_but_no_absolute_place():
    torch.manual_seed(0)
    module = MultiHeadSelfAttention(16, 2, 2, "rotary").eval()
    image = torch.randn(1, 16, 3, 5)
    with torch.no_grad():
        weights = module.weights(image)
        mirrored = module.weights(image.flip(3)).view(1, 2, 3, 5, 3, 5).flip(3, 5).reshape(weights.shape)
        assert not torch.allclose(weights, mirrored, atol=1e-3)
        same = module.weights(torch.ones(1, 16, 3, 5)).view(2, 3, 5, 3, 5)
    # Where all pixels are alike, ratios of weights are those of their distances: the same from (0, 0) and from (1, 2).
    assert torch.allclose(
        same[:, 0, 0, 1, 1] / same[:, 0, 0, 0, 1], same[:, 1, 2, 2, 3] / same[:, 1, 2, 1, 3], atol=1e-4
    )


@pytest.mark.parametrize("keys", [None, 4])
def test_a_gate_with_rotary_positions(keys):
    torch.manual_seed(0)
    module = MultiHeadCrossAttention(16, 8, 2, positional_encoding="rotary", keys=keys).eval()
    high, skip = torch.randn(2, 16, 4, 6), torch.randn(2, 8, 8, 12)
    with torch.no_grad():
        gate, weights = module.gate(high, skip), module.weights(high, skip)
    size = module.key_size((4, 6))
    assert gate.min() > 0 and gate.max() < 1
    seen = high if keys is None else torch.nn.functional.adaptive_avg_pool2d(high, size)
    query, key = split_heads(module.query(to_tokens(high)), 2), split_heads(module.key(to_tokens(seen)), 2)
    scores = rotated(query, (4, 6)) @ rotated(key, size, (4, 6)).transpose(-1, -2) / math.sqrt(8)
    assert torch.allclose(weights, scores.softmax(-1), atol=1e-6)
    module.positional_encoding = False
    with torch.no_grad():
        assert not torch.allclose(module.gate(high, skip), gate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_and_finite(dtype):
    torch.manual_seed(0)
    network = UTransformer(width=8, depth=4, heads=2, positional_encoding="rotary", block=True, qk_norm=True).eval()
    image = torch.randn(1, 1, 64, 48)
    with torch.no_grad():
        exact = network(image)
        with torch.autocast("cpu", dtype):
            rounded = network(image)
    assert torch.isfinite(rounded).all()
    assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_it_has_no_parameters_and_gradients_go_through():
    plain, turned = (TransformerBlock(16, 2, 2, positions, qk_norm=True) for positions in (False, "rotary"))
    turned.load_state_dict(plain.state_dict())
    turned(torch.randn(1, 16, 3, 3)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in turned.parameters())


def test_compiled_it_is_the_same():
    torch.manual_seed(0)
    module = MultiHeadSelfAttention(16, 2, 2, "rotary").eval()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=False)
    for size in ((3, 4), (5, 2)):
        image = torch.randn(1, 16, *size)
        assert torch.allclose(compiled(image), module(image), atol=1e-5)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: MultiHeadSelfAttention(16, 8, 2, "rotary"), "rotary positions need 8 channels a head in 2D, got 2"),
    (lambda: MultiHeadSelfAttention(32, 8, 3, "rotary"), "need 12 channels a head in 3D, got 4 of 32 channels and 8"),
    (lambda: MultiHeadCrossAttention(16, 8, 8, positional_encoding="rotary"), "choose fewer heads"),
    (lambda: MultiHeadSelfAttention(16, 2, 2, "rotated"), "positional_encoding is 'rotated', expected true"),
])  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
