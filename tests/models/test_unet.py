"""The U-Net's building blocks: mathematics first."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from k_diffusion import layers
from k_diffusion.models.flops import flop_counter

KERNELS = ["linear", "cubic", "lanczos3"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ada_gn(channels):
    return layers.AdaGN(5, channels, 2)


def randomize(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def two_heads(q, k, v, size):
    """The plain formula, with a loop over items and heads: (n, tokens, 8) to (n, 8, *size)."""
    out = torch.empty_like(q)
    for i in range(len(q)):
        for head in (slice(0, 4), slice(4, 8)):
            scores = q[i, :, head] @ k[i, :, head].T / math.sqrt(4)
            out[i, :, head] = torch.softmax(scores, dim=1) @ v[i, :, head]
    return out.mT.unflatten(2, size)


# ---------------------------------------------------------------- resampling


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cls", [layers.Downsample2d, layers.Upsample2d])
def test_resampling_preserves_constants_up_to_the_border(cls, kernel):
    x = torch.full((2, 3, 12, 16), 1.7)
    y = cls(kernel)(x)
    assert y.shape[2:] == ((6, 8) if cls is layers.Downsample2d else (24, 32))
    torch.testing.assert_close(y, torch.full_like(y, 1.7))


@pytest.mark.parametrize("kernel", KERNELS)
def test_downsampling_is_centred_between_pixels(kernel):
    ramp = torch.arange(40.0).expand(1, 1, 40, 40)
    y = layers.Downsample2d(kernel)(ramp)[0, 0, 10, 4:-4]
    torch.testing.assert_close(y, 2 * torch.arange(4.0, 16) + 0.5)


@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_upsampling_reproduces_a_ramp(kernel):
    ramp = torch.arange(20.0).expand(1, 1, 20, 20)
    y = layers.Upsample2d(kernel)(ramp)[0, 0, 10, 8:-8]
    torch.testing.assert_close(y, torch.arange(8.0, 32) / 2 - 0.25)


@pytest.mark.parametrize("kernel", KERNELS)
def test_upsampling_is_four_times_the_adjoint_of_downsampling(kernel):
    x, y = torch.zeros(1, 2, 40, 32), torch.zeros(1, 2, 20, 16)
    x[:, :, 12:-12, 12:-12].normal_()
    y[:, :, 6:-6, 6:-6].normal_()
    down, up = layers.Downsample2d(kernel)(x), layers.Upsample2d(kernel)(y)
    torch.testing.assert_close(4 * (down * y).sum(), (x * up).sum())


@pytest.mark.parametrize(
    ("kernel", "filter"),
    [
        ("linear", Image.Resampling.BILINEAR),
        ("cubic", Image.Resampling.BICUBIC),
        ("lanczos3", Image.Resampling.LANCZOS),
    ],
)
def test_downsampling_equals_pillow_inside(kernel, filter):
    x = torch.randn(1, 1, 32, 40)
    want = np.array(Image.fromarray(x[0, 0].numpy()).resize((20, 16), filter))
    got = layers.Downsample2d(kernel)(x)[0, 0].numpy()
    np.testing.assert_allclose(got[3:-3, 3:-3], want[3:-3, 3:-3], atol=1e-5)


def test_channels_are_resampled_alone():
    x = torch.randn(2, 3, 8, 8)
    for cls in (layers.Downsample2d, layers.Upsample2d):
        module = cls("cubic")
        alone = torch.cat([module(x[:, i : i + 1]) for i in range(3)], dim=1)
        torch.testing.assert_close(module(x), alone)


def test_resampling_says_what_is_wrong():
    with pytest.raises(ValueError, match="unknown kernel 'sinc'.*; there are linear, cubic"):
        layers.Upsample2d("sinc")
    with pytest.raises(ValueError, match=r"at least 4; got \(8, 2\)"):
        layers.Downsample2d("cubic")(torch.zeros(1, 1, 8, 2))
    assert layers.Upsample2d(pad_mode="replicate")(torch.ones(1, 1, 1, 1)).shape == (1, 1, 2, 2)


# ---------------------------------------------------------------- norms and wiring


@pytest.mark.parametrize("size", [(7,), (3, 4), (2, 3, 4)])
def test_ada_gn_is_a_modulated_group_norm(size):
    norm = layers.AdaGN(5, 6, 3, eps=1e-3)
    x, cond = torch.randn(2, 6, *size), {"cond": torch.randn(2, 5)}
    plain = F.group_norm(x, 3, eps=1e-3)
    torch.testing.assert_close(norm(x, cond), plain)

    randomize(norm)
    scale, shift = norm.mapper(cond["cond"]).view(2, 2, 6, *[1] * len(size)).unbind(1)
    torch.testing.assert_close(norm(x, cond), plain * (1 + scale) + shift)


def test_ada_gn_says_what_is_wrong():
    with pytest.raises(ValueError, match="6 / 4"):
        layers.AdaGN(5, 6, 4)
    with pytest.raises(ValueError, match=r"needs cond\['cond'\]; it got \['cross'\]"):
        layers.AdaGN(5, 6, 2)(torch.zeros(1, 6, 2, 2), {"cross": torch.zeros(1)})


class Add(layers.ConditionedModule):
    def forward(self, input, cond):
        return input + cond["cond"]


def test_residual_blocks_and_sequences_pass_cond_to_whom_it_concerns():
    x, cond = torch.randn(3, 4), {"cond": torch.randn(3, 4)}
    double = nn.Linear(4, 4, bias=False)
    double.weight.data = 2 * torch.eye(4)
    sequence = layers.ConditionedSequential(double, Add(), layers.UnconditionedModule(double))
    torch.testing.assert_close(sequence(x, cond), 2 * (2 * x + cond["cond"]))
    torch.testing.assert_close(layers.UnconditionedModule(double)(x), 2 * x)

    torch.testing.assert_close(layers.ResidualBlock(double)(x), 3 * x)
    torch.testing.assert_close(layers.ResidualBlock(double, skip=double)(x), 4 * x)
    block = layers.ConditionedResidualBlock(double, Add())
    torch.testing.assert_close(block(x, cond), 3 * x + cond["cond"])
    block = layers.ConditionedResidualBlock(double, skip=Add())
    torch.testing.assert_close(block(x, cond), 3 * x + cond["cond"])


class Record(layers.ConditionedModule):
    """Adds a number, and notes how many channels it saw."""

    def __init__(self, number, seen):
        super().__init__()
        self.number, self.seen = number, seen

    def forward(self, input, cond, skip=None):
        input = input if skip is None else torch.cat([input, skip], dim=1)
        self.seen.append((self.number, input.shape[1], input[0, -1, 0, 0].item()))
        return input[:, :1] + self.number


def test_unet_joins_each_level_with_what_went_down_there():
    seen = []
    net = layers.UNet([Record(n, seen) for n in (1, 2, 4)], [Record(n, seen) for n in (8, 16, 32)])
    y = net(torch.zeros(1, 1, 1, 1), {})
    # up: the middle has no skip; then the outputs 3 and 1 come as the last channel
    assert seen == [(1, 1, 0), (2, 1, 1), (4, 1, 3), (8, 1, 7), (16, 2, 3), (32, 2, 1)]
    assert y.item() == 63

    seen.clear()
    net.skip_stages = 1
    assert net(torch.zeros(1, 1, 1, 1), {}).item() == 2 + 4 + 8 + 16
    assert [number for number, *_ in seen] == [2, 4, 8, 16]


def test_unet_says_what_is_wrong():
    with pytest.raises(ValueError, match="got 1 down and 2 up"):
        layers.UNet([Add()], [Add(), Add()])
    with pytest.raises(ValueError, match="less than the number of levels, 2; got 2"):
        layers.UNet([Add(), Add()], [Add(), Add()], skip_stages=2)


# ---------------------------------------------------------------- attention


def test_self_attention_equals_the_formula():
    attn = randomize(layers.SelfAttention2d(8, 2, ada_gn))
    x, cond = torch.randn(2, 8, 3, 5), {"cond": torch.randn(2, 5)}
    q, k, v = attn.qkv_proj(attn.norm_in(x, cond)).flatten(2).mT.chunk(3, dim=-1)
    torch.testing.assert_close(attn(x, cond), x + attn.out_proj(two_heads(q, k, v, (3, 5))))


def cross_attention(**kw):
    attn = layers.CrossAttention2d(8, 6, 2, ada_gn, **kw)
    cond = {"cond": torch.randn(2, 5), "cross": torch.randn(2, 7, 6)}
    return attn, torch.randn(2, 8, 3, 5), cond


def test_cross_attention_equals_the_formula():
    attn, x, cond = cross_attention()
    randomize(attn)
    q = attn.q_proj(attn.norm_dec(x, cond)).flatten(2).mT
    k, v = attn.kv_proj(attn.norm_enc(cond["cross"])).chunk(2, dim=-1)
    torch.testing.assert_close(attn(x, cond), x + attn.out_proj(two_heads(q, k, v, (3, 5))))


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_padding_equals_leaving_the_tokens_out(dtype):
    attn, x, cond = cross_attention()
    randomize(attn)
    padding = torch.tensor([0, 1, 0, 0, 1, 1, 0]).to(dtype).expand(2, 7)
    kept = {**cond, "cross": cond["cross"][:, [0, 2, 3, 6]]}
    torch.testing.assert_close(attn(x, {**cond, "cross_padding": padding}), attn(x, kept))


def test_an_item_of_padding_alone_attends_to_nothing():
    attn, x, cond = cross_attention()
    randomize(attn)
    cond["cross"].requires_grad_()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0] = True
    y = attn(x, {**cond, "cross_padding": padding})
    torch.testing.assert_close(y[0], x[0] + attn.out_proj.bias[:, None, None])
    torch.testing.assert_close(y[1], attn(x, cond)[1])
    y.sum().backward()
    assert cond["cross"].grad[0].eq(0).all()
    assert all(p.grad.isfinite().all() for p in attn.parameters())


def test_attention_starts_as_the_identity():
    attn, x, cond = cross_attention()
    assert attn(x, cond).equal(x)
    assert layers.SelfAttention2d(8, 2, ada_gn)(x, cond).equal(x)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attention_drops_out_in_training_only(kind):
    attn, x, cond = cross_attention(dropout_rate=0.5)
    if kind == "self":
        attn = layers.SelfAttention2d(8, 2, ada_gn, dropout_rate=0.5)
    randomize(attn)
    assert not attn(x, cond).equal(attn(x, cond))
    attn.eval()
    y = attn(x, cond)
    assert y.equal(attn(x, cond))
    attn.dropout_rate = 0
    torch.testing.assert_close(attn.train()(x, cond), y)


def test_attention_gradients():
    attn, x, cond = cross_attention()
    self_attn = layers.SelfAttention2d(8, 2, ada_gn)
    for module in (randomize(attn).double(), randomize(self_attn).double()):
        inputs = [x[:1, :, :2, :2].double().requires_grad_()]
        inputs += [c[:1].double().requires_grad_() for c in (cond["cond"], cond["cross"][:, :3])]

        def call(x, c, cross, module=module):
            return module(x, {"cond": c, "cross": cross})

        assert torch.autograd.gradcheck(call, inputs)


def test_attention_says_what_is_wrong():
    with pytest.raises(ValueError, match="8 / 3"):
        layers.SelfAttention2d(8, 3, ada_gn)
    attn, x, cond = cross_attention()
    with pytest.raises(ValueError, match=r"\(2, 7\) expected .* got \(2, 6\)"):
        attn(x, {**cond, "cross_padding": torch.zeros(2, 6)})
    with pytest.raises(ValueError, match=r"needs cond\['cross'\]"):
        attn(x, {"cond": cond["cond"], "cross": None})


# ---------------------------------------------------------------- Fourier features and counts


def test_fourier_features_are_cosines_and_sines():
    module = layers.FourierFeatures(3, 10, std=2)
    x = torch.randn(2, 4, 3)
    angles = 2 * math.pi * x @ module.weight.T
    y = module(x)
    torch.testing.assert_close(y[..., :5], angles.cos())
    torch.testing.assert_close(y[..., 5:], angles.sin())
    assert layers.FourierFeatures(1, 20_000, std=2).weight.std().item() == pytest.approx(2, 0.05)
    with pytest.raises(ValueError, match="must be even, got 7"):
        layers.FourierFeatures(1, 7)


def test_fourier_features_keep_their_angles_in_low_precision():
    module = layers.FourierFeatures(1, 64)
    x = torch.tensor([[-1.15]])
    want = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x), want)
    module.weight = module.weight.bfloat16()
    assert module(x).dtype == torch.bfloat16


def test_convolutions_and_attention_are_counted():
    x, cond = torch.randn(2, 8, 3, 5), {"cond": torch.randn(2, 5)}
    with flop_counter() as counter:
        layers.Conv2d(8, 4, 3, stride=2, padding=1)(x)
    assert counter.flops == 2 * (2 * 3) * (8 * 9) * 4
    with flop_counter() as counter:
        layers.SelfAttention2d(8, 2, ada_gn)(x, cond)
    assert counter.flops == 2 * (5 * 16 + 15 * 8 * (24 + 8) + 15 * 15 * 2 * 8)
