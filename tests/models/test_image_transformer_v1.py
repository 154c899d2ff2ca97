"""The transformer denoiser `image_transformer_v1`."""

import math

import pytest
import torch
from golden import check_model, fill, normal

import k_diffusion as K
from k_diffusion.models.flops import flop_counter
from k_diffusion.models.image_transformer_v1 import (
    ImageTransformerDenoiserModelV1,
    LearnedAxialRoPE,
    QKNorm,
    SelfAttentionBlock,
)
from k_diffusion.models.rope import make_axial_pos

SIGMA = torch.tensor([0.05, 1.3])


def make(**kw):
    """A small model of two heads, in eval mode, none of whose weights are 0."""
    args = {"n_layers": 1, "d_model": 128, "d_ff": 96, "in_features": 3, "out_features": 3}
    return fill(ImageTransformerDenoiserModelV1(**(args | {"patch_size": [2, 2]} | kw))).eval()


def test_numbers_of_the_published_model():
    model = ImageTransformerDenoiserModelV1(2, 128, 352, 3, 3, [2, 2], num_classes=11)
    x, classes = normal(18, (2, 3, 16, 16)), torch.tensor([0, 7])
    check_model("model_t1", model, x, SIGMA, class_cond=classes, tol=2e-4)


def test_sigma_data_is_left_to_the_denoiser():
    x = normal(0, (2, 3, 8, 8))
    assert make(sigma_data=0.3)(x, SIGMA).equal(make()(x, SIGMA))


def test_starts_with_an_output_of_zero_and_blocks_as_the_identity():
    model = ImageTransformerDenoiserModelV1(1, 64, 96, 3, 3, [2, 2])
    x, tokens = normal(0, (2, 3, 8, 8)), normal(1, (2, 4, 4, 64))
    assert model(x, SIGMA).equal(torch.zeros_like(x))
    pos = make_axial_pos(4, 4).view(4, 4, 2)
    assert model.blocks[0](tokens, pos, normal(2, (2, 64))).equal(tokens)


def test_transposed_images_and_axes_give_transposed_results():
    """Rows and columns are alike, on a picture that isn't square."""
    model, other = make(patch_size=[1, 2]), make(patch_size=[2, 1])
    other.load_state_dict(model.state_dict())
    for block in other.blocks:
        # the angles come in the order (y, x), so that a head's features change places too
        pos_emb, qkv = block.self_attn.pos_emb, block.self_attn.qkv_proj.weight.data
        freqs_h = pos_emb.freqs_h.data
        pos_emb.freqs_h.data, pos_emb.freqs_w.data = pos_emb.freqs_w.data, freqs_h
        qk = qkv[:256].view(2, 2, 2, 32, 128)
        qkv[:256] = qk.flip(2).reshape(256, 128)
    x = normal(0, (2, 3, 6, 16))
    torch.testing.assert_close(other(x.mT.contiguous(), SIGMA).mT, model(x, SIGMA))


def attention_block():
    block = fill(SelfAttentionBlock(128)).eval()
    # frequencies of the size that they start with, other ones in each head and axis
    for freqs in (block.pos_emb.freqs_h, block.pos_emb.freqs_w):
        freqs.data += 1.5
    return block


def test_attention_equals_the_formula():
    block = attention_block()
    x, cond = normal(0, (1, 3, 4, 128)), normal(1, (1, 128))
    pos = make_axial_pos(3, 4).view(3, 4, 2)
    q, k, v = block.qkv_proj(block.norm(x, cond)).view(12, 3, 2, 64).unbind(1)

    def turned(t):
        """Features (2i, 2i + 1) of head and token as a complex number, turned by its angle."""
        angles = torch.cat(
            [
                pos.reshape(12, 2)[:, i, None, None] * freqs.exp()
                for i, freqs in enumerate((block.pos_emb.freqs_h, block.pos_emb.freqs_w))
            ],
            dim=-1,
        )
        return torch.view_as_complex(t.reshape(12, 2, 32, 2)) * torch.polar(
            torch.ones_like(angles), angles
        )

    out = []
    for head in range(2):
        a, b = turned(q)[:, head], turned(k)[:, head]
        cosine = (a @ b.mH).real / (a.norm(dim=1)[:, None] * b.norm(dim=1))
        out.append((block.qk_norm.scale[head].exp() * cosine).softmax(dim=1) @ v[:, head])
    want = x + block.out_proj(torch.cat(out, dim=1)).view(1, 3, 4, 128)
    torch.testing.assert_close(block(x, pos, cond), want, atol=1e-5, rtol=1e-4)


def test_attention_depends_on_relative_positions_alone():
    block = attention_block()
    x, cond = normal(0, (2, 4, 6, 128)), normal(1, (2, 128))
    pos = make_axial_pos(4, 6).view(4, 6, 2)
    y = block(x, pos, cond)
    torch.testing.assert_close(block(x, pos + torch.tensor([0.7, -2.0]), cond), y)
    assert not block(x, pos * 2, cond).allclose(y, atol=1e-4)


def test_scores_start_at_ten_times_the_cosine():
    q, k = normal(0, (5, 2, 64), 3.0), normal(1, (5, 2, 64), 0.1)
    a, b = QKNorm(2)(q, k)
    cosine = torch.cosine_similarity(q, k, dim=-1)
    torch.testing.assert_close((a * b).sum(-1), 10 * cosine, atol=1e-3, rtol=1e-3)


def test_the_scale_is_clamped_to_a_hundred():
    norm = QKNorm(1)
    norm.scale.data.fill_(6.0)
    q, k = normal(0, (5, 1, 64)), normal(1, (5, 1, 64))

    def score(scale):
        a, b = torch.func.functional_call(norm, {"scale": scale}, (q, k))
        return (a * b).sum()

    # where it can't be changed, the value is the clamped one, and the gradient goes through
    start = norm.scale.detach().clone()
    gradient, value = torch.func.grad_and_value(score)(start)
    assert start.item() == 6
    torch.testing.assert_close(gradient.sum(), value)
    want = 100 * torch.cosine_similarity(q, k, dim=-1)
    a, b = norm(q, k)
    torch.testing.assert_close((a * b).sum(-1), want, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(value, want.sum(), atol=1e-1, rtol=1e-3)
    assert norm.scale.item() == pytest.approx(math.log(100))
    model = make()
    model.blocks[0].self_attn.qk_norm.scale.data.fill_(6.0)
    model.proj_()
    assert model.blocks[0].self_attn.qk_norm.scale.max().item() == pytest.approx(math.log(100))


def test_frequencies_start_from_pi_to_five_pi_in_every_head():
    rope = LearnedAxialRoPE(64, 2)
    assert rope.freqs_h[0].equal(rope.freqs_h[1])
    freqs = rope.freqs_h[0].exp()
    assert freqs[0].item() == pytest.approx(math.pi, rel=1e-5)
    ratios = freqs[1:] / freqs[:-1]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 5 ** (1 / 15)))
    assert rope.freqs_w.equal(rope.freqs_h)
    assert rope(torch.zeros(3, 4, 2)).shape == (3, 4, 2, 32)


@pytest.mark.parametrize(("patch_size", "size"), [((2, 2), (4, 10)), ((1, 4), (5, 8))])
def test_sizes_that_are_not_square(patch_size, size):
    model = make(patch_size=patch_size, out_features=4)
    x = normal(0, (2, 3, *size))
    y = model(x, SIGMA)
    assert y.shape == (2, 4, *size)
    # no item of the batch sees another
    torch.testing.assert_close(model(x[1:], SIGMA[1:]), y[1:])


def test_sigma_of_zero_is_finite():
    model = make()
    y = model(normal(0, (2, 3, 8, 8)), torch.zeros(2))
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_conditions():
    model = make(num_classes=11)
    x, classes = normal(0, (2, 3, 8, 8)), torch.tensor([3, 10])
    y = model(x, SIGMA, class_cond=classes)
    assert model(x, SIGMA, torch.zeros(2, 9), classes).equal(y)
    z = model(x, SIGMA, class_cond=torch.tensor([3, 9]))
    torch.testing.assert_close(z[0], y[0])
    assert (z[1] - y[1]).abs().mean() > 1e-3
    aug = torch.zeros(2, 9)
    aug[1, 4] = 1
    z = model(x, SIGMA, aug_cond=aug, class_cond=classes)
    torch.testing.assert_close(z[0], y[0])
    assert (z[1] - y[1]).abs().mean() > 1e-3


def test_dropout_is_off_in_eval_mode():
    model, x = make(dropout=0.5), normal(0, (2, 3, 8, 8))
    assert model(x, SIGMA).equal(make()(x, SIGMA))
    model.train()
    assert not model(x, SIGMA).allclose(model(x, SIGMA))


def test_checkpointing_changes_no_gradient():
    def gradients(enable):
        model = make(dropout=0.2).train()
        torch.manual_seed(0)
        with K.models.checkpointing(enable):
            y = model(normal(0, (2, 3, 8, 8)), SIGMA)
        y.square().sum().backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(False), gradients(True)):
        torch.testing.assert_close(a, b)


def test_low_precision():
    model, x = make(), normal(0, (2, 3, 8, 8))
    want = model(x, SIGMA)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, SIGMA)
    assert (y - want).abs().mean() < 0.03 * want.abs().mean()
    y = model.bfloat16()(x.bfloat16(), SIGMA)
    assert y.dtype == torch.bfloat16
    assert (y - want).abs().mean() < 0.03 * want.abs().mean()


def test_multiply_accumulates_are_counted():
    model = make()
    with flop_counter() as counter:
        model(torch.zeros(2, 3, 4, 8), SIGMA)
    tokens, d, d_ff = 2 * 2 * 4, 128, 96
    per_token = 12 * d + 4 * d * d + 3 * d * d_ff + d * 12 + 2 * 8 * d
    per_item = 2 * d * d + 2 * 3 * d * d_ff + 2 * d * d
    assert counter.flops == tokens * per_token + 2 * per_item


@pytest.mark.parametrize(
    ("x", "sigma", "cond", "message"),
    [
        ((2, 4, 8, 8), (2,), {}, r"x of shape \(n, 3, h, w\) expected, got \(2, 4, 8, 8\)"),
        ((2, 3, 8, 7), (2,), {}, "multiples of 2 and 2 .* got 8 x 7; .* valid size is 8 x 8"),
        ((2, 3, 8, 8), (), {}, r"sigma of shape \(2,\) expected, got \(\)"),
        ((2, 3, 8, 8), (2,), {}, r"needs class_cond of shape \(2,\)"),
        ((2, 3, 8, 8), (2,), {"aug_cond": (2, 8)}, r"aug_cond of shape \(2, 9\) expected"),
        ((2, 3, 8, 8), (2,), {"class_cond": (2, 1)}, r"class_cond of shape \(2,\) expected"),
    ],
)
def test_wrong_shapes_are_named(x, sigma, cond, message):
    cond = {name: torch.zeros(shape, dtype=torch.long) for name, shape in cond.items()}
    with pytest.raises(ValueError, match=message):
        make(num_classes=4)(torch.ones(x), torch.ones(sigma), **cond)


def test_wrong_configurations_are_named():
    with pytest.raises(ValueError, match="width 100 is not a multiple of d_head 64"):
        make(d_model=100)
    with pytest.raises(ValueError, match="takes no class_cond"):
        make()(torch.ones(2, 3, 8, 8), SIGMA, class_cond=torch.tensor([0, 0]))
