"""METHOD.md 3.2 and 3.3, and the mistakes that public re-implementations make."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from organseg.networks import MultiHeadCrossAttention, MultiHeadSelfAttention, TransformerBlock
from organseg.networks.attention import (
    attend,
    attention_weights,
    fitting_size,
    sinusoidal_positions,
    split_heads,
    to_tokens,
    with_positions,
)


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def identity(linear: nn.Linear) -> None:
    linear.weight.data.copy_(torch.eye(*linear.weight.shape))
    linear.bias.data.zero_()


def self_attention(channels=8, heads=2, dims=2, positions=True) -> MultiHeadSelfAttention:
    torch.manual_seed(0)
    return MultiHeadSelfAttention(channels, heads, dims, positions).eval()


def cross_attention(high=8, skip=4, heads=2, dims=2, **options) -> MultiHeadCrossAttention:
    torch.manual_seed(0)
    return MultiHeadCrossAttention(high, skip, heads, dims, **options).eval()


def maps(high=8, skip=4, size=(3, 4), batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, high, *size), torch.randn(batch, skip, *(2 * n for n in size))


def test_parameters_of_the_thesis():
    with torch.device("meta"):
        assert count(MultiHeadSelfAttention(1024)) == count(nn.MultiheadAttention(1024, 8)) == 4_198_400
        found = [count(MultiHeadCrossAttention(high, high // 2)) for high in (1024, 512, 256)]
    assert found == [2_625_536, 657_408, 164_864]


def test_two_tokens_and_two_heads_by_hand():
    module = MultiHeadSelfAttention(2, heads=2, positional_encoding=False)
    for linear in (module.query, module.key, module.value, module.out):
        identity(linear)
    # Tokens (1, 0) and (0, 1); each head sees one channel. Head 0: scores (1, 0) and (0, 0), so that token 0 attends
    # with e / (e + 1) and 1 / (e + 1) to values 1 and 0, token 1 with 1/2 and 1/2; head 1 the other way round.
    out = module(torch.tensor([[[[1.0, 0]], [[0.0, 1]]]]))
    most = math.e / (math.e + 1)
    assert torch.allclose(out, torch.tensor([[[[most, 0.5]], [[0.5, most]]]]))
    weights = module.weights(torch.tensor([[[[1.0, 0]], [[0.0, 1]]]]))[0]
    assert torch.allclose(weights[0], torch.tensor([[most, 1 - most], [0.5, 0.5]]))
    assert torch.allclose(weights[1], torch.tensor([[0.5, 0.5], [1 - most, most]]))


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_torchs_module_with_the_same_weights(dims):
    ours = self_attention(12, heads=3, dims=dims)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key.weight, ours.value.weight])
    theirs.in_proj_bias.data = torch.randn(36)
    for linear, bias in zip((ours.query, ours.key, ours.value), theirs.in_proj_bias.split(12), strict=True):
        linear.bias.data = bias.clone()
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    image = torch.randn(2, 12, *(3, 5, 2)[:dims])
    tokens = to_tokens(with_positions(image))
    expected, weights = theirs(tokens, tokens, tokens, average_attn_weights=False)
    with torch.no_grad():
        assert torch.allclose(to_tokens(ours(image)), expected, atol=1e-5)
        assert torch.allclose(ours.weights(image), weights, atol=1e-6)


def test_cross_attention_is_equation_by_equation():
    module, (high, skip) = cross_attention(), maps()
    y, s = with_positions(high), with_positions(F.max_pool2d(skip, 2))
    with torch.no_grad():
        gates = []
        for head in range(2):
            query = module.query(to_tokens(y))[..., 4 * head : 4 * head + 4]
            key = module.key(to_tokens(y))[..., 4 * head : 4 * head + 4]
            value = module.value(to_tokens(s))[..., 2 * head : 2 * head + 2]
            gates.append((query @ key.mT / 2).softmax(-1) @ value)  # sqrt(4) = 2
        mixed = torch.cat(gates, -1).mT.reshape(2, 4, 3, 4)
        z = F.interpolate(torch.sigmoid(module.norm(module.conv(mixed))), scale_factor=2, mode="bilinear")
        assert torch.allclose(module(high, skip), skip * z, atol=1e-6)


def test_cudnns_kernel_is_never_chosen(monkeypatch):
    allowed = []
    fused = F.scaled_dot_product_attention

    def recorded(*tensors):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return fused(*tensors)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    attend(*(torch.randn(1, 2, 64, 8) for _ in range(3)))
    assert allowed == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_width", [3, 6, 10])
def test_fused_attention_agrees_with_explicit_weights(dtype, value_width):
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 7, 6).to(dtype), torch.randn(2, 3, 5, 6).to(dtype)
    value = torch.randn(2, 3, 5, value_width).to(dtype)
    weights = attention_weights(query, key)
    assert weights.dtype == torch.float32 and torch.allclose(weights.sum(-1), torch.ones(2, 3, 7), atol=1e-6)
    found = attend(query, key, value)
    assert found.shape == (2, 3, 7, value_width)
    assert torch.allclose(found.float(), weights @ value.float(), atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("channels", "size"), [(6, (2, 5)), (7, (3, 4)), (6, (2, 3, 4)), (64, (3, 2, 5)), (1, (2, 2))])
def test_positions_by_the_formula(channels, size):
    positions = sinusoidal_positions(channels, size)
    per_axis = math.ceil(channels / len(size))
    per_axis += per_axis % 2
    for channel in range(channels):
        axis, within = divmod(channel, per_axis)
        wave = 10_000 ** -((within - within % 2) / per_axis)
        for index in torch.cartesian_prod(*map(torch.arange, size)).tolist():
            angle = index[axis] * wave
            expected = math.cos(angle) if within % 2 else math.sin(angle)
            assert positions[(channel, *index)] == pytest.approx(expected, abs=1e-5)


def test_every_pixel_has_its_own_position():
    for size in [(16, 16), (8, 9, 10)]:
        tokens = sinusoidal_positions(32, size).flatten(1).T
        assert torch.cdist(tokens, tokens).fill_diagonal_(1).min() > 0.1


def test_without_positions_the_order_of_pixels_does_not_matter():
    image, order = torch.randn(1, 8, 4, 3), torch.randperm(12)
    shuffled = image.flatten(2)[..., order].unflatten(2, (4, 3))
    for positions in (False, True):
        module = self_attention(positions=positions)
        with torch.no_grad():
            same = torch.allclose(module(shuffled).flatten(2), module(image).flatten(2)[..., order], atol=1e-5)
        assert same is not positions


def test_positions_reach_neither_the_output_nor_the_skip():
    module = self_attention()
    module.value.weight.data.zero_()  # nothing of the input is passed on, so nothing of the positions may be
    image = torch.zeros(1, 8, 4, 4)
    with torch.no_grad():
        out = module(image)
    assert torch.allclose(out, out[..., :1, :1].expand_as(out), atol=1e-6)
    gate = cross_attention()
    gate.norm.bias.data.fill_(100)  # the gate is open
    gate.norm.weight.data.zero_()
    high, skip = maps()
    with torch.no_grad():
        assert torch.equal(gate(high, skip), skip)


def test_heads_are_separate():
    module = self_attention(8, heads=4)
    identity(module.out)
    image = torch.randn(1, 8, 3, 3)
    with torch.no_grad():
        before = module(image)
        module.query.weight.data[2:4] += 1  # head 1 alone
        changed = (module(image) - before).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, False, True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiHeadSelfAttention(10, 4), "10 channels cannot be shared equally by 4 heads"),
        (lambda: MultiHeadSelfAttention(8, 0), "8 channels cannot be shared equally by 0 heads"),
        (lambda: MultiHeadCrossAttention(20, 10, 4), "10 channels cannot be shared equally by 4 heads"),
        (lambda: MultiHeadCrossAttention(10, 20, 4), "10 channels cannot be shared equally by 4 heads"),
        (lambda: MultiHeadCrossAttention(16, 8, 0), "16 channels cannot be shared equally by 0 heads"),
    ],
)
def test_heads_that_do_not_divide_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}; choose a divisor"):
        make()


@pytest.mark.parametrize("keys", [0, -1])
def test_at_least_one_key(keys):
    with pytest.raises(ValueError, match=f"keys is {keys}; expected at least 1"):
        cross_attention(keys=keys)


def test_another_number_of_axes_is_refused():
    with pytest.raises(ValueError, match="2 spatial axes"):
        self_attention()(torch.randn(1, 8, 2, 2, 2))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_gate_stays_between_0_and_1(dims):
    module = cross_attention(dims=dims)
    module.conv.weight.data *= 100
    high, skip = maps(size=(3, 4, 2)[:dims])
    with torch.no_grad():
        gate = module.gate(high, 100 * skip)
    assert gate.shape == skip.shape
    assert gate.min() >= 0 and gate.max() <= 1 and gate.std() > 0.1


def test_what_a_gate_keeps_depends_on_far_pixels():
    module, (high, skip) = cross_attention(), maps()
    high.requires_grad_()
    module.gate(high, skip)[0, :, 0, 0].sum().backward()
    assert high.grad[0].abs().amax(0).min() > 0 and not high.grad[1].any()


@pytest.mark.parametrize("module", [self_attention(), TransformerBlock(8, 2), cross_attention()])
def test_evaluation_and_training_differ_by_batch_norm_alone(module):
    assert not [m for m in module.modules() if "Dropout" in type(m).__name__]
    inputs = maps() if isinstance(module, MultiHeadCrossAttention) else (torch.randn(2, 8, 3, 4),)
    module.eval()
    with torch.no_grad():
        first, second = module(*inputs), module(*inputs)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_and_finite(dtype):
    high, skip = maps()
    for module, inputs in ((self_attention(), (high,)), (cross_attention(), (high, skip)), (block(), (high,))):
        with torch.no_grad():
            expected = module(*inputs)
            with torch.autocast("cpu", dtype):
                found = module(*inputs)
        assert torch.allclose(found.float(), expected, atol=0.05, rtol=0.05)


def test_large_scores_do_not_overflow_half_precision():
    query = torch.full((1, 1, 4, 64), 200.0, dtype=torch.float16)  # scores of 320,000, above float16's largest
    assert torch.isfinite(attention_weights(query, query)).all()
    assert torch.isfinite(attend(query, query, query)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_those_of_fp32_inside_autocast(dtype):
    torch.manual_seed(0)
    query, key = 100 * torch.randn(1, 2, 5, 64), 100 * torch.randn(1, 2, 7, 64)  # scores beyond float16's largest
    expected = attention_weights(query, key)
    with torch.autocast("cpu", dtype):
        found = attention_weights(query, key)
        module = self_attention()
        assert module.weights(maps()[0]).dtype == torch.float32
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def kept_bytes(run) -> int:
    """What autograd keeps of `run`."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("value_width", [4, 8])
def test_memory_grows_linearly_with_the_tokens(value_width):
    def attended(tokens: int) -> int:
        query, key = (torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in range(2))
        value = torch.randn(1, 2, tokens, value_width, requires_grad=True)
        return kept_bytes(lambda: attend(query, key, value))

    once, twice = attended(256), attended(512)
    assert twice < 2.1 * once
    # Query, key, value and result of 8 channels and a sum per query, for each of 2 heads: no 256 x 256 weights.
    assert once <= 2 * 256 * (4 * 8 + 2) * 4


def block() -> TransformerBlock:
    torch.manual_seed(0)
    return TransformerBlock(8, 2).eval()


@pytest.mark.parametrize("make", [self_attention, block])
def test_memory_format_and_compilation_change_nothing(make):
    module, image = make(), torch.randn(2, 8, 5, 3)
    with torch.no_grad():
        expected = module(image)
        assert torch.allclose(module(image.to(memory_format=torch.channels_last)), expected, atol=1e-6)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(image), expected, atol=1e-6)


@pytest.mark.parametrize(("dims", "keys"), [(2, None), (2, 6), (3, 6)])
def test_compiled_cross_attention_has_the_same_gate_and_gradients(dims, keys):
    module, inputs = cross_attention(dims=dims, keys=keys), maps(size=(4, 6, 2)[:dims])
    compiled, found = torch.compile(module, backend="aot_eager", fullgraph=True), []
    for one in (module, compiled):
        module.zero_grad()
        result = one(*inputs)
        result.square().sum().backward()
        found.append([result.detach(), *(parameter.grad.clone() for parameter in module.parameters())])
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*found, strict=True))


def test_fewer_keys():
    high, skip = maps(size=(4, 6))
    few, all_ = cross_attention(keys=6), cross_attention()
    with torch.no_grad():
        assert few.weights(high, skip).shape == (2, 2, 24, 6)
        assert all_.weights(high, skip).shape == (2, 2, 24, 24)
        assert torch.equal(cross_attention(keys=24)(high, skip), all_(high, skip))
        assert not torch.allclose(few(high, skip), all_(high, skip), atol=1e-4)
        # Where all tokens are equal it does not matter how many are seen.
        flat_high, flat_skip = torch.ones_like(high), torch.ones_like(skip)
        few.positional_encoding = all_.positional_encoding = False
        assert torch.allclose(few(flat_high, flat_skip), all_(flat_high, flat_skip), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [((4, 6), 24, [4, 6]), ((4, 6), 12, [4, 3]), ((5, 5), 9, [3, 3]), ((2, 3, 4), 1, [1, 1, 1])],
)
def test_fitting_size(size, most, expected):
    assert fitting_size(size, most) == expected


def test_split_heads():
    tokens = torch.arange(8).view(1, 2, 4)
    assert split_heads(tokens, 2).tolist() == [[[[0, 1], [4, 5]], [[2, 3], [6, 7]]]]


def test_a_block_passes_its_input_on():
    module, image = block(), torch.randn(1, 8, 3, 3)
    for linear in (module.attention.out, module.mlp[-1]):
        linear.weight.data.zero_()
        linear.bias.data.zero_()
    with torch.no_grad():
        assert torch.equal(module(image), image)
        assert torch.allclose(module.weights(image).sum(-1), torch.ones(1, 2, 9))


def normed(make, *arguments):
    torch.manual_seed(0)
    return make(*arguments, qk_norm=True).eval()


def test_with_normed_queries_and_keys_scores_are_cosines_times_a_factor():
    module, image = normed(MultiHeadSelfAttention, 8, 2), torch.randn(2, 8, 3, 4)
    tokens = to_tokens(with_positions(image))
    query, key = (split_heads(map_(tokens), 2) for map_ in (module.query, module.key))
    with torch.no_grad():
        module.qk_norm.factor.copy_(torch.tensor([1.5, 3.0]).view(2, 1, 1))
        cosines = F.cosine_similarity(query[:, :, :, None], key[:, :, None], dim=-1)
        expected = torch.softmax(cosines * torch.tensor([1.5, 3.0]).view(2, 1, 1), dim=-1)
        assert torch.allclose(module.weights(image), expected, atol=1e-6)
        before = module(image)
        module.query.weight.mul_(100)
        module.query.bias.mul_(100)
        assert torch.allclose(module(image), before, atol=1e-5)  # however long the queries are


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normed_attention_agrees_with_its_weights(dtype):
    high, skip = maps()
    module = normed(MultiHeadCrossAttention, 8, 4, 2)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        value = module._projected(high, skip)[2].float()
        mixed = (module.weights(high, skip) @ value).transpose(1, 2).flatten(2)
        z = torch.sigmoid(module.norm(module.conv(mixed.transpose(1, 2).unflatten(2, high.shape[2:]))))
        expected = F.interpolate(z.float(), skip.shape[2:], mode="bilinear", align_corners=False)
        assert torch.allclose(module.gate(high, skip).float(), expected, atol=1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("module", [normed(TransformerBlock, 8, 2), normed(MultiHeadSelfAttention, 8, 2)])
def test_the_factor_of_normed_attention_is_learned(module):
    module(torch.randn(2, 8, 3, 4)).square().sum().backward()
    (factor,) = [p for name, p in module.named_parameters() if name.endswith("qk_norm.factor")]
    assert factor.grad.abs().min() > 0
