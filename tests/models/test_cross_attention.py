"""Cross-attention in the hourglass transformer, and images concatenated to its input."""

import pytest
import runs
import torch
from test_image_transformer_v2 import hourglass
from torch import nn

import k_diffusion as K
from k_diffusion.models import (
    ImageTransformerDenoiserModelV1,
    compile_model,
    flops,
    image_transformer_v2 as v2,
)
from k_diffusion.models.cross_attention import CrossAttentionBlock, CrossCondition
from k_diffusion.models.rope import make_axial_pos

NEAR, GLOBAL, NONE = (
    v2.NeighborhoodAttentionSpec(16, 3),
    v2.GlobalAttentionSpec(16),
    v2.NoAttentionSpec(),
)


def filled(model):
    """A model in which nothing is zero, so that all of it counts."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=g) * 0.1
    return model.eval()


def make(crosses=(True, True), attns=(NEAR, GLOBAL), **kw):
    """A small model of two levels; tokens of the condition have 6 features."""
    torch.manual_seed(0)
    pairs = zip(attns, crosses)
    levels = [v2.LevelSpec(1, 64, 32, attn, 0.0, cross) for attn, cross in pairs]
    cross = {"cross_cond_dim": 6} if any(crosses) else {}
    mapping = v2.MappingSpec(1, 16, 32, 0.0)
    return v2.ImageTransformerDenoiserModelV2(levels, mapping, 3, 3, (2, 2), **cross, **kw)


def inputs(n=3, tokens=4):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 12, 12, generator=g)
    return x, torch.rand(n, generator=g) + 0.1, torch.randn(n, tokens, 6, generator=g)


def rotated(q, theta):
    """RoPE: features i and i + m, of m angles, are turned; the others stay."""
    m = theta.shape[-1]
    a, b = q[..., :m], q[..., m : 2 * m]
    turned = a * theta.cos() - b * theta.sin(), b * theta.cos() + a * theta.sin()
    return torch.cat([*turned, q[..., 2 * m :]], dim=-1)


def test_a_block_is_softmax_attention_to_the_tokens_that_are_seen():
    block = filled(CrossAttentionBlock(16, 8, 5, 6)).double()
    x, cond, tokens = (
        torch.randn(*s, dtype=torch.double) for s in ((2, 3, 2, 16), (2, 5), (2, 4, 6))
    )
    seen = torch.tensor([[True, True, False, True], [False, True, False, False]])
    pos = make_axial_pos(3, 2, dtype=torch.double).view(3, 2, 2)
    want = x.clone()
    normed = block.norm(x, cond)
    for i in range(2):
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            q = rotated(normed[i] @ block.q_proj.weight[part].T, block.pos_emb(pos)[..., head, :])
            k = tokens[i][seen[i]] @ block.kv_proj.weight[part].T
            v = tokens[i][seen[i]] @ block.kv_proj.weight[16:][part].T
            cosine = nn.functional.cosine_similarity(q[:, :, None], k, dim=-1)
            y = (block.scale[head] * cosine).softmax(-1) @ v
            want[i] += y @ block.out_proj.weight[:, part].T
    torch.testing.assert_close(block(x, pos, cond, tokens, seen), want, atol=1e-6, rtol=1e-6)


def test_an_untrained_one_changes_nothing():
    x, sigma, tokens = inputs()
    plain, crossed = filled(make((False, False))), make()
    crossed.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(crossed.eval()(x, sigma, cross_cond=tokens), plain(x, sigma))


def test_what_is_attended_to_depends_on_the_place():
    """Equal queries at all places see two tokens in shares of their own."""
    block = filled(CrossAttentionBlock(16, 8, 5, 6))
    pos = make_axial_pos(2, 4).view(2, 4, 2)
    x, cond = torch.ones(1, 2, 4, 16), torch.zeros(1, 5)
    change = block(x, pos, cond, torch.randn(1, 2, 6), torch.ones(1, 2, dtype=torch.bool)) - x
    assert not torch.allclose(change[:, :, 0], change[:, :, 3], atol=1e-3)
    assert not torch.allclose(change[:, 0], change[:, 1], atol=1e-3)


def test_padding_has_no_influence():
    model = filled(make())
    x, sigma, tokens = inputs()
    padding = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]])
    got = model(x, sigma, cross_cond=tokens, cross_cond_padding=padding)
    other = torch.where(padding[..., None] > 0, 100 * torch.randn(tokens.shape), tokens)
    assert torch.equal(model(x, sigma, cross_cond=other, cross_cond_padding=padding), got)
    alone = model(x[1:2], sigma[1:2], cross_cond=tokens[1:2, :1])
    torch.testing.assert_close(alone, got[1:2])
    assert not torch.allclose(model(x, sigma, cross_cond=tokens)[0], got[0])


def test_all_padding_is_the_null_embedding():
    """Which is learned, and seen by no item that has a token."""
    model = filled(make())
    x, sigma, tokens = inputs()
    padding = torch.tensor([True, False, True])[:, None].expand(3, 4)
    got = model(x, sigma, cross_cond=tokens, cross_cond_padding=padding)
    null = model(x, sigma)
    torch.testing.assert_close(got[::2], null[::2])
    assert not torch.allclose(got[1], null[1])
    (grad,) = torch.autograd.grad(got[1].sum(), model.cross_cond.null, retain_graph=True)
    assert not grad.any()
    (grad,) = torch.autograd.grad(got[0].sum(), model.cross_cond.null)
    assert grad.all()


def test_guidance_takes_the_null_embedding():
    model = K.Denoiser(filled(make()))
    x, sigma, tokens = inputs()
    null = {
        "cross_cond": torch.zeros(1, 4, 6),
        "cross_cond_padding": torch.ones(1, 4, dtype=torch.bool),
    }
    given = {"cross_cond": tokens, "cross_cond_padding": torch.zeros(3, 4, dtype=torch.bool)}
    got = K.guidance.CFGDenoiser(model, 3.0, **null)(x, sigma, **given)
    want = torch.lerp(model(x, sigma), model(x, sigma, **given), 3.0)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("crosses", [(True, False), (False, True)])
def test_levels_have_it_by_themselves(crosses):
    model = make(crosses)
    has = [level[0].cross_attn is not None for level in (*model.down_levels, model.mid_level)]
    assert tuple(has) == crosses
    x, sigma, tokens = inputs()
    model = filled(model)
    changed = model(x, sigma, cross_cond=tokens) - model(x, sigma, cross_cond=tokens.roll(1, 0))
    assert changed.abs().max() > 1e-3


def test_checkpointing_and_second_derivatives():
    model, (x, sigma, tokens) = filled(make()), inputs()

    def gradients(**options):
        model.zero_grad()
        with K.models.checkpointing(**options):
            model(x, sigma, cross_cond=tokens).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients(enable=False)
    assert len(want) == len(list(model.parameters()))
    for keep in False, True:
        torch.testing.assert_close(gradients(keep_attention=keep), want)
    tokens.requires_grad_()
    (grad,) = torch.autograd.grad(
        model(x, sigma, cross_cond=tokens).square().sum(), tokens, create_graph=True
    )
    assert torch.autograd.grad(grad.square().sum(), tokens)[0].any()


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["model", "block"])
def test_compiled(unit):
    x, sigma, tokens = inputs()
    want = filled(make())(x, sigma, cross_cond=tokens)
    torch._dynamo.reset()
    model = compile_model(filled(make()), unit, backend="eager", fullgraph=True)
    torch.testing.assert_close(model(x, sigma, cross_cond=tokens), want)


def test_operations_are_counted():
    (x, sigma, tokens), counts = inputs(1), []
    for model in make((False, False)), make((True, False)):
        with flops.flop_counter() as counter:
            model(x, sigma, **({"cross_cond": tokens} if model.cross_cond else {}))
        counts.append(counter.flops)
    seen = 4 + 1  # with the null token
    projections = 36 * 64 * 64 * 2 + seen * 6 * 128 + 16 * 64  # with that of the norm's scale
    assert counts[1] - counts[0] == 2 * (projections + 36 * seen * 2 * 64)


def test_levels_are_described():
    levels = make((True, True), (NONE, GLOBAL)).describe_levels(16, 16)
    assert [level.attention for level in levels] == ["cross", "global and cross"]
    assert [level.heads for level in levels] == [1, 4]
    assert levels[0].backend == "sdpa"
    assert (
        make((True, False)).describe_levels(12, 12)[0].attention == "neighborhood 3 x 3 and cross"
    )


def test_what_is_wrong_is_said():
    x, sigma, tokens = inputs()
    with pytest.raises(ValueError, match=r"cross_cond of shape \(3, tokens, 6\) expected"):
        make()(x, sigma, cross_cond=tokens[..., :5])
    with pytest.raises(ValueError, match=r"cross_cond_padding of shape \(3, 4\) expected"):
        make()(x, sigma, cross_cond=tokens, cross_cond_padding=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="takes no cross_cond,"):
        make((False, False))(x, sigma, cross_cond=tokens)
    with pytest.raises(ValueError, match="takes no cross_cond_padding"):
        make()(x, sigma, cross_cond_padding=torch.zeros(3, 4))
    level, mapping = v2.LevelSpec(1, 32, 32, GLOBAL, 0.0, True), v2.MappingSpec(1, 16, 16, 0.0)
    with pytest.raises(ValueError, match="set cross_cond_dim, too"):
        v2.ImageTransformerDenoiserModelV2([level], mapping, 3, 3, (1, 1))
    with pytest.raises(ValueError, match="no level has cross-attention"):
        hourglass([1], [32], [GLOBAL], cross_cond_dim=3)


def test_the_condition_keeps_the_weights_type():
    cross = CrossCondition(6).bfloat16()(torch.randn(2, 3, 6), None, 2)
    assert cross.tokens.dtype == torch.bfloat16
    assert cross.seen.tolist() == [[False, True, True, True]] * 2


# ---------------------------------------------------------------- images


def transformer_v1(**kw):
    return ImageTransformerDenoiserModelV1(1, 64, 32, 3, 3, (2, 2), **kw)


@pytest.mark.parametrize("new", [lambda **kw: make((False, False), **kw), transformer_v1])
def test_an_image_is_concatenated(new):
    """A model of more input channels: with weights of 0 for them it is the plain one."""
    x, sigma, _ = inputs()
    image = torch.randn(3, 2, 12, 12)
    plain, model = filled(new()), filled(new(unet_cond_dim=2))
    first = "in_proj.weight" if hasattr(model, "in_proj") else "patch_in.proj.weight"
    old, state = plain.state_dict()[first], plain.state_dict()
    wide = torch.zeros(len(old), 20)
    # features of a patch: the transformer v1 has channels first, the hourglass last
    keep = (
        range(12) if hasattr(model, "in_proj") else [5 * p + c for p in range(4) for c in range(3)]
    )
    wide[:, list(keep)] = old
    model.load_state_dict(state | {first: wide})
    torch.testing.assert_close(model(x, sigma, unet_cond=image), plain(x, sigma))
    filled(model)
    assert not torch.allclose(model(x, sigma, unet_cond=image), model(x, sigma, unet_cond=-image))
    with pytest.raises(ValueError, match=r"needs unet_cond of shape \(3, 2, 12, 12\); got None"):
        model(x, sigma)
    with pytest.raises(ValueError, match=r"unet_cond of shape \(3, 2, 12, 12\) expected"):
        model(x, sigma, unet_cond=image[..., 1:])
    with pytest.raises(ValueError, match="takes no unet_cond"):
        plain(x, sigma, unet_cond=image)


def test_the_config_makes_it():
    model = {"cross_cond_dim": 6, "cross_attn_depths": [False, True], "unet_cond_dim": 2}
    made = K.config.make_model(runs.tiny_config(model=model))
    assert made.down_levels[0][0].cross_attn is None
    assert made.mid_level[0].cross_attn.n_heads == made.mid_level[0].self_attn.n_heads
    assert made.patch_in.proj.in_features == (1 + 2) * 4
    everywhere = K.config.make_model(runs.tiny_config(model={"cross_cond_dim": 6}))
    assert everywhere.down_levels[0][0].cross_attn is not None
    rule = r"model\.cross_attn_depths: a level asks for cross-attention: set cross_cond_dim"
    with pytest.raises(K.config.ConfigError, match=rule):
        runs.tiny_config(model={"cross_attn_depths": [True, True]})
    with pytest.raises(K.config.ConfigError, match="cross_attn_depths has 1"):
        runs.tiny_config(model={"cross_cond_dim": 6, "cross_attn_depths": [True]})
    none = [{"type": "none"}, {"type": "none"}]
    with pytest.raises(K.config.ConfigError, match=r"self_attns\[0\]: width 16 is not a multiple"):
        runs.tiny_config(model={"cross_cond_dim": 6, "self_attns": none})
