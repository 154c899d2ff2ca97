"""The hourglass transformer `image_transformer_v2`."""

import copy

import pytest
import runs
import torch
from golden import fill, normal
from torch.nn import functional as F

import k_diffusion as K
from k_diffusion.models import image_transformer_v2 as v2
from k_diffusion.models.image_transformer_v2 import (
    GlobalAttentionSpec,
    ImageTransformerDenoiserModelV2,
    LevelSpec,
    MappingSpec,
    NeighborhoodAttentionSpec,
    NoAttentionSpec,
    ShiftedWindowAttentionSpec,
)
from k_diffusion.models.rope import cos_sin, make_axial_pos

SIGMA = torch.tensor([0.05, 1.3])
ATTENTION = {
    "global": GlobalAttentionSpec(16),
    "neighborhood": NeighborhoodAttentionSpec(16, 3),
    "shifted-window": ShiftedWindowAttentionSpec(16, 4),
    "none": NoAttentionSpec(),
}


def hourglass(depths, widths, attns, patch=1, mapping=(1, 16, 32), classes=0, **kw):
    dropout = kw.pop("dropout", 0.0)
    levels = [LevelSpec(d, w, 3 * w, a, dropout) for d, w, a in zip(depths, widths, attns)]
    args = {"in_channels": 3, "out_channels": 3, "patch_size": (patch, patch)} | kw
    return ImageTransformerDenoiserModelV2(
        levels, MappingSpec(*mapping, dropout), num_classes=classes and classes + 1, **args
    )


def make(attention="neighborhood", **kw):
    """A small model of two levels, in eval mode, none of whose weights are 0."""
    attns = [ATTENTION[attention], ATTENTION["global"]]
    return fill(hourglass([2, 1], [32, 48], attns, **kw)).eval()


def gradients(model, *args, **kw):
    model.zero_grad()
    model(*args, **kw).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- the function


def test_the_bottleneck_of_patches_is_two_convolutions():
    """p x p to the bottleneck, then 1 x 1 (JiT); without one the weights are as published."""
    model = make(patch=2, patch_bottleneck=5)
    x = normal(0, (2, 3, 8, 8))
    first = model.patch_in.proj.weight.view(5, 2, 2, 3).movedim(-1, 1)
    last = model.patch_in.expand.weight[:, :, None, None]
    tokens = F.conv2d(F.conv2d(x, first, stride=2), last)
    torch.testing.assert_close(model.patch_in(x.movedim(1, -1)), tokens.movedim(1, -1))
    plain = [k for k in model.state_dict() if k != "patch_in.expand.weight"]
    assert plain == list(make(patch=2).state_dict())
    config = runs.tiny_config(model={"patch_bottleneck": 3})
    assert K.config.make_model(config).patch_in.proj.weight.shape == (3, 4)


@pytest.mark.parametrize("attention", ATTENTION)
def test_starts_with_an_output_of_zero_and_blocks_as_the_identity(attention):
    model = hourglass([1, 1], [32, 32], [ATTENTION[attention], ATTENTION["global"]])
    x, tokens = normal(0, (2, 3, 8, 8)), normal(1, (2, 8, 8, 32))
    assert model(x, SIGMA).equal(torch.zeros_like(x))
    assert model.down_levels[0](tokens, normal(2, (2, 16))).equal(tokens)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (8, 24)])
def test_sizes_that_are_not_square_and_items_that_are_alone(attention, size):
    model = make(attention, out_channels=4)
    x = normal(0, (2, 3, *size))
    y = model(x, SIGMA)
    assert y.shape == (2, 4, *size)
    torch.testing.assert_close(model(x[1:], SIGMA[1:]), y[1:])


@pytest.mark.parametrize("patch", [(1, 2), (3, 1)])
def test_patches_that_are_not_square(patch):
    x = normal(0, (2, 3, 6 * patch[0], 8 * patch[1]))
    assert make(patch_size=patch)(x, SIGMA).shape == x.shape


def test_attention_is_the_formula():
    """Cosine similarity of rotated queries and keys, scaled, one head at a time."""
    block = fill(v2.SelfAttentionBlock(32, GlobalAttentionSpec(16), 8))
    x, cond = normal(0, (1, 3, 4, 32)), normal(1, (1, 8))
    pos = make_axial_pos(3, 4).view(3, 4, 2)
    q, k, v = block.qkv_proj(block.norm(x, cond)).view(12, 3, 2, 16).unbind(1)
    theta = block.pos_emb(pos).view(12, 2, 4)
    out = []
    for head in range(2):
        angle = theta[:, head]
        turned = [v2.apply_rotary_emb(t[:, head], angle) for t in (q, k)]
        cosine = torch.cosine_similarity(turned[0][:, None], turned[1], dim=-1)
        out.append((block.scale[head] * cosine).softmax(dim=1) @ v[:, head])
    want = x + block.out_proj(torch.cat(out, dim=1)).view(1, 3, 4, 32)
    torch.testing.assert_close(block(x, pos, cond), want, atol=1e-4, rtol=1e-4)


def test_scales_and_merges_start_as_published():
    model = hourglass([1, 1], [32, 32], [ATTENTION["global"]] * 2)
    assert model.mid_level[0].self_attn.scale.tolist() == [10, 10]
    assert model.splits[0].fac.item() == 0.5
    buffers = dict(model.named_buffers())
    assert {"time_emb.weight", "aug_emb.weight"} <= set(buffers)


def test_a_skip_is_merged_by_interpolation():
    split = v2.TokenSplit(8, 4)
    x, skip = normal(0, (2, 3, 3, 8)), normal(1, (2, 6, 6, 4))
    split.fac.data.fill_(0)
    torch.testing.assert_close(split(x, skip), skip)
    split.fac.data.fill_(1)
    torch.testing.assert_close(split(x, skip), v2.TokenSplitWithoutSkip.forward(split, x))


def test_merging_tokens_and_splitting_them_again():
    """With inverse weights both are the identity: a patch's tokens come back in their places."""
    merge, split = v2.TokenMerge(2, 8, (2, 2)), v2.TokenSplitWithoutSkip(8, 2, (2, 2))
    merge.proj.weight.data = torch.eye(8)
    split.proj.weight.data = torch.eye(8)
    x = normal(0, (2, 4, 6, 2))
    assert merge(x)[0, 0, 0].equal(x[0, :2, :2].flatten())
    torch.testing.assert_close(split(merge(x)), x)


def test_windows_shift_in_every_other_block():
    model = hourglass([4], [32], [ShiftedWindowAttentionSpec(16, 4)])
    assert [block.self_attn.geometry.shift for block in model.mid_level] == [0, 2, 0, 2]


def test_conditions():
    model = make(classes=5, mapping_cond_dim=3)
    x = normal(0, (2, 3, 8, 8))
    cond = {"class_cond": torch.tensor([1, 5]), "mapping_cond": normal(1, (2, 3))}
    y = model(x, SIGMA, **cond)
    torch.testing.assert_close(model(x, SIGMA, torch.zeros(2, 9), **cond), y)
    changes = {
        "aug_cond": torch.eye(9)[:2] * torch.tensor([[0.0], [1.0]]),
        "class_cond": torch.tensor([1, 4]),
        "mapping_cond": cond["mapping_cond"] * torch.tensor([[1.0], [-1.0]]),
    }
    for name, value in changes.items():
        z = model(x, SIGMA, **(cond | {name: value}))
        torch.testing.assert_close(z[0], y[0])
        assert (z[1] - y[1]).abs().mean() > 1e-4, name


@pytest.mark.parametrize("attention", ATTENTION)
def test_sigma_of_zero_is_finite(attention):
    model = make(attention)
    x = normal(0, (2, 3, 8, 8)).requires_grad_()
    y = model(x, torch.zeros(2))
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_gradients_by_differences():
    model = make(patch=2).double()
    x = normal(0, (1, 3, 12, 12)).double().requires_grad_()
    sigma = torch.tensor([0.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: model(x, sigma), x, fast_mode=True)


def test_dropout_is_off_in_eval_mode():
    model, x = make(dropout=0.5), normal(0, (2, 3, 8, 8))
    torch.testing.assert_close(model(x, SIGMA), make()(x, SIGMA))
    model.train()
    assert not model(x, SIGMA).allclose(model(x, SIGMA))


# ---------------------------------------------------------------- precision


def test_low_precision():
    model, x = make(), normal(0, (2, 3, 8, 8))
    want = model(x, SIGMA)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, SIGMA)
    assert (y - want).abs().mean() < 0.06 * want.abs().mean()
    y = model.bfloat16()(x.bfloat16(), SIGMA)
    assert y.dtype == torch.bfloat16
    assert (y - want).abs().mean() < 0.06 * want.abs().mean()


def angles_seen(monkeypatch, pos, dtype):
    seen = []
    monkeypatch.setattr(
        v2, "cos_sin", lambda theta, dtype: seen.append(theta) or cos_sin(theta, dtype)
    )
    block = v2.SelfAttentionBlock(32, GlobalAttentionSpec(16), 8).to(dtype)
    block.pos_emb.float()
    block(torch.zeros(1, *pos.shape[:2], 32, dtype=dtype), pos, torch.zeros(1, 8, dtype=dtype))
    return seen[0].double(), pos.double()[..., None, :, None] * block.pos_emb.freqs.double()[
        :, None
    ]


def test_angles_are_exact_under_bf16_unless_parity_is_asked_for(monkeypatch):
    pos = make_axial_pos(64, 64).view(64, 64, 2)
    monkeypatch.delenv("K_DIFFUSION_ROPE_PARITY", raising=False)
    got, want = angles_seen(monkeypatch, pos, torch.bfloat16)
    torch.testing.assert_close(got, want.flatten(-2), atol=1e-5, rtol=0)
    monkeypatch.setenv("K_DIFFUSION_ROPE_PARITY", "1")
    got, want = angles_seen(monkeypatch, pos, torch.bfloat16)
    assert 0.02 < (got - want.flatten(-2)).abs().max() < 0.2
    got, want = angles_seen(monkeypatch, pos, torch.float32)
    torch.testing.assert_close(got, want.flatten(-2), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("attention", ATTENTION)
def test_checkpointing_changes_no_gradient(attention):
    model = make(attention, dropout=0.2).train()
    x = normal(0, (2, 3, 8, 8))
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        with K.models.checkpointing(enable):
            results.append(gradients(model, x, SIGMA))
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad)


def test_a_copy_has_the_same_parameter_groups():
    model = make(classes=3)

    def group_names(m):
        names = {p: n for n, p in m.named_parameters()}
        return [[names[p] for p in g["params"]] for g in m.param_groups()]

    groups = group_names(model)
    assert all(groups)
    assert sum(map(len, groups)) == len(list(model.parameters()))
    assert group_names(copy.deepcopy(model)) == groups
    # saved optimizer states go by the order of the parameters
    assert [groups[0][0], *groups[1][:2]] == [
        "patch_in.proj.weight",
        "time_in_proj.weight",
        "aug_in_proj.weight",
    ]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_compiled_is_the_same(model, compiled, n, size):
    """But for the rounding of sums, which goes by the largest of them."""
    x, sigma = normal(n, (n, 3, size, size)), torch.linspace(0.1, 2, n)
    want, got = model(x, sigma), compiled(x, sigma)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    want, got = gradients(model, x, sigma), gradients(compiled, x, sigma)
    largest = max(grad.abs().max().item() for grad in want.values())
    for name, grad in want.items():
        torch.testing.assert_close(got[f"_orig_mod.{name}"], grad, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("attention", [*ATTENTION, "tiles"])
def test_compiles_as_one_graph_forward_and_backward(attention):
    size = 20 if attention == "tiles" else 8  # a grid of 8 x 8 is one tile
    spec = ATTENTION["neighborhood" if attention == "tiles" else attention]
    model = fill(hourglass([2 if attention == "shifted-window" else 1], [32], [spec])).eval()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    assert_compiled_is_the_same(model, compiled, 2, size)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_an_hourglass_compiles_with_checkpointing():
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with K.models.checkpointing():
        assert_compiled_is_the_same(model, compiled, 2, 8)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("x", "sigma", "cond", "message"),
    [
        ((2, 4, 8, 8), (2,), {}, r"x of shape \(n, 3, h, w\) expected, got \(2, 4, 8, 8\)"),
        ((3, 8, 8), (2,), {}, r"x of shape .* got \(3, 8, 8\)"),
        ((2, 3, 8, 9), (2,), {}, "multiples of 2 and 2 .* got 8 x 9; .* valid size is 8 x 10"),
        ((2, 3, 8, 8), (), {}, r"sigma of shape \(2,\) expected, got \(\)"),
        ((2, 3, 8, 8), (2, 1, 1, 1), {}, r"sigma of shape \(2,\) expected"),
        ((2, 3, 8, 8), (2,), {"class_cond": None}, r"needs class_cond of shape \(2,\); got None"),
        ((2, 3, 8, 8), (2,), {"class_cond": (2, 1)}, r"class_cond of shape \(2,\) expected"),
        ((2, 3, 8, 8), (2,), {"mapping_cond": None}, r"needs mapping_cond of shape \(2, 5\)"),
        ((2, 3, 8, 8), (2,), {"mapping_cond": (2, 4)}, r"shape \(2, 5\) expected, got \(2, 4\)"),
        ((2, 3, 8, 8), (2,), {"aug_cond": (2, 8)}, r"aug_cond of shape \(2, 9\) expected"),
        (
            (2, 3, 4, 4),
            (2,),
            {},
            "kernel_size 5 is larger than the 4 x 4 tokens of this level; use at most 4",
        ),
    ],
)
def test_wrong_shapes_are_named(x, sigma, cond, message):
    attns = [NeighborhoodAttentionSpec(16, 5), ATTENTION["global"]]
    model = hourglass([1, 1], [32, 32], attns, classes=4, mapping_cond_dim=5)
    shapes = {"class_cond": (2,), "mapping_cond": (2, 5)} | cond
    given = {
        name: shape and torch.zeros(shape, dtype=torch.long if "class" in name else None)
        for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match=message):
        model(torch.ones(x), torch.ones(sigma), **given)


def test_conditions_that_a_model_does_not_take_are_named():
    model, x = make(), normal(0, (2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"takes no class_cond, got one of shape \(2,\)"):
        model(x, SIGMA, class_cond=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="takes no mapping_cond"):
        model(x, SIGMA, mapping_cond=torch.zeros(2, 3))


def test_wrong_heads_are_named():
    with pytest.raises(ValueError, match="width 32 is not a multiple of d_head 24"):
        hourglass([1], [32], [GlobalAttentionSpec(24)])
    with pytest.raises(ValueError, match=r"d_head must be a multiple of 8, .*, got 4"):
        hourglass([1], [32], [GlobalAttentionSpec(4)])


def test_windows_of_every_level_shift():
    levels = [ShiftedWindowAttentionSpec(16, 4)] * 2
    model = hourglass([2, 2], [32, 32], levels)
    for level in (*model.down_levels, model.mid_level, *model.up_levels):
        assert [block.self_attn.geometry.shift for block in level] == [0, 2]
