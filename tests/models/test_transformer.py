"""Norms, GEGLU, mapping network and parameter tags of the transformers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from k_diffusion.models.transformer import (
    AdaRMSNorm,
    FeedForwardBlock,
    Linear,
    LinearGEGLU,
    MappingNetwork,
    RMSNorm,
    apply_wd,
    filter_params,
    log_sigma,
    rms_norm,
    scale_for_cosine_sim,
    split_heads,
    tag_module,
    tag_param,
    tagged_param_groups,
    zero_init,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 5, 8)])
def test_rms_norm_is_the_formula(shape):
    x, scale = torch.randn(shape, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    want = F.rms_norm(x, (8,), scale, 1e-3)
    torch.testing.assert_close(rms_norm(x, scale, 1e-3), want)


def test_rms_norm_gradients():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: rms_norm(x, s, 1e-6), (x, scale))


def test_rms_norm_of_nothing_is_nothing_and_has_a_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = RMSNorm(8)(x)
    y.sum().backward()
    assert y.equal(torch.zeros(2, 8))
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1e3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_takes_the_mean_in_float32(dtype):
    x = torch.full((2, 4096), 300.0, dtype=dtype)  # its sum of squares is beyond float16
    y = rms_norm(x, torch.ones(4096), 1e-6)
    assert y.dtype == dtype
    torch.testing.assert_close(y, torch.ones_like(x), atol=0.01, rtol=0)


def test_adaptive_norm_starts_plain_and_scales_each_item():
    norm, x, cond = AdaRMSNorm(8, 3), torch.randn(2, 4, 5, 8), torch.randn(2, 3)
    plain = F.rms_norm(x, (8,), eps=1e-6)
    torch.testing.assert_close(norm(x, cond), plain)
    nn.init.normal_(norm.linear.weight)
    scale = 1 + cond @ norm.linear.weight.T
    torch.testing.assert_close(norm(x, cond), plain * scale[:, None, None])


def test_cosine_scaling():
    q, k = torch.randn(5, 2, 8), torch.randn(5, 2, 8) * 7
    scale = torch.tensor([10.0, 3.0])
    a, b = scale_for_cosine_sim(q, k, scale, 1e-6)
    want = scale * torch.cosine_similarity(q, k, dim=-1)
    torch.testing.assert_close((a * b).sum(-1), want, rtol=1e-4, atol=1e-4)
    zero = scale_for_cosine_sim(torch.zeros_like(q), k, scale, 1e-6)[0]
    assert zero.equal(torch.zeros_like(q))
    c, d = scale_for_cosine_sim(q.bfloat16(), k.bfloat16(), scale, 1e-6)
    assert c.dtype == d.dtype == torch.bfloat16


def test_heads_are_split_after_queries_keys_and_values():
    q, k, v = split_heads(torch.arange(24).view(1, 1, 1, 24), 2)
    assert q.tolist() == [[[[[0, 1, 2, 3], [4, 5, 6, 7]]]]]
    assert k[0, 0, 0, 1].tolist() == [12, 13, 14, 15]
    assert v[0, 0, 0, 0].tolist() == [16, 17, 18, 19]


def test_log_sigma_is_finite_at_zero():
    sigma = torch.tensor([0.0, 1.0, 80.0], requires_grad=True)
    y = log_sigma(sigma)
    y.sum().backward()
    assert y.isfinite().all()
    assert sigma.grad.isfinite().all()
    torch.testing.assert_close(y[1:], sigma[1:].log())


# ---------------------------------------------------------------- blocks


def test_geglu_is_the_first_half_times_gelu_of_the_second():
    layer, x = LinearGEGLU(4, 6), torch.randn(2, 4)
    assert layer.weight.shape == (12, 4)
    y = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), y[:, :6] * F.gelu(y[:, 6:]))


def test_blocks_start_as_the_identity():
    x, cond = torch.randn(2, 3, 4, 8), torch.randn(2, 5)
    assert FeedForwardBlock(8, 16, 5)(x, cond).equal(x)
    network = MappingNetwork(2, 8, 16)
    torch.testing.assert_close(network(x), F.rms_norm(x, (8,), eps=1e-6), atol=1e-5, rtol=1e-5)


def test_an_int_of_zero_is_a_dropout():
    block = FeedForwardBlock(8, 16, 5, dropout=0)
    assert block.train()(torch.randn(2, 3, 8), torch.randn(2, 5)).isfinite().all()


def test_zero_init():
    layer = nn.Linear(3, 4)
    assert zero_init(layer) is layer
    assert not layer.weight.any()
    assert not layer.bias.any()
    assert not zero_init(nn.Linear(3, 4, bias=False)).weight.any()


# ---------------------------------------------------------------- tags


def make_tagged():
    body = apply_wd(nn.Sequential(Linear(2, 3), RMSNorm(3)))
    return nn.ModuleDict({"body": body, "mapping": tag_module(apply_wd(Linear(2, 2)), "mapping")})


def names(module, function):
    found = {id(p) for p in filter_params(function, module)}
    return {name for name, p in module.named_parameters() if id(p) in found}


TAGGED = {
    "plain": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "other device": lambda m: m.to("meta"),
    "wrapped": lambda m: nn.Sequential(m),
}


@pytest.mark.parametrize("how", TAGGED)
def test_tags_select_parameters_and_survive_copies(how):
    module = TAGGED[how](make_tagged())
    prefix = "0." if how == "wrapped" else ""
    wd = {f"{prefix}body.0.weight", f"{prefix}mapping.weight"}
    mapping = {f"{prefix}mapping.weight", f"{prefix}mapping.bias"}
    assert names(module, lambda tags: "wd" in tags) == wd
    assert names(module, lambda tags: "mapping" in tags) == mapping
    assert names(module, lambda tags: not tags) == {f"{prefix}body.0.bias", f"{prefix}body.1.scale"}


def test_one_parameter_is_tagged():
    layer = apply_wd(Linear(2, 2))
    assert tag_param(layer.bias, "mapping") is layer.bias
    assert names(layer, lambda tags: tags == {"mapping"}) == {"bias"}
    assert names(layer, lambda tags: tags == {"wd"}) == {"weight"}


def test_four_groups_hold_every_parameter_once():
    module = make_tagged()
    groups = tagged_param_groups(module, 3e-4, 1 / 3)
    assert [len(g["params"]) for g in groups] == [1, 2, 1, 1]
    assert [g["lr"] for g in groups] == pytest.approx([3e-4, 3e-4, 1e-4, 1e-4])
    assert [g.get("weight_decay") for g in groups] == [None, 0.0, None, 0.0]
    params = [p for g in groups for p in g["params"]]
    assert {id(p) for p in params} == {id(p) for p in module.parameters()}
