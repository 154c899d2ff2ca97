"""Autoencoders by one interface: conventions of scale and shift, ranges, tiles, fingerprints."""

import copy
import json

import pytest
import torch
from torch import nn

from k_diffusion import loading
from k_diffusion.encoders import tiling
from k_diffusion.encoders.autoencoder import (
    Autoencoder,
    _DiffusersNetwork,
    find_autoencoder,
    load_diffusers,
)
from k_diffusion.encoders.tiling import tiled
from k_diffusion.models.autoencoder import AttentionBlock, KLAutoencoder

MEAN, STD = [0.5, -1.0, 0.0, 2.0], [2.0, 1.0, 0.5, 3.0]


def small(**options):
    torch.manual_seed(0)
    return Autoencoder(KLAutoencoder(1, 2, [8, 8], 1, num_groups=4, middle=False), **options)


def per_channel(values):
    return torch.tensor(values)[:, None, None]


@pytest.mark.parametrize("convention", ["factors", "mean and std", "batch norm"])
def test_latents_of_diffusers_are_scaled_by_their_convention(convention, tmp_path):
    tiny_diffusers = pytest.importorskip("tiny_diffusers")
    kind = "AutoencoderKL"
    options = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    if convention == "mean and std":
        options = {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD}
    if convention == "batch norm":
        kind, options = "AutoencoderKLFlux2", {}
    theirs = tiny_diffusers.autoencoder(kind, **options)
    if convention == "batch norm":
        theirs.bn.running_mean.normal_()
        theirs.bn.running_var.uniform_(0.5, 2)
    theirs.save_pretrained(tmp_path / "vae")
    ours = loading.load_autoencoder(tmp_path)  # as of a pipeline's folder
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    raw = theirs.encode(images).latent_dist.mean
    if convention == "factors":
        want = (raw - 0.1159) * 0.3611
    elif convention == "mean and std":
        want = (raw - per_channel(MEAN)) * 0.5 / per_channel(STD)
    else:
        patches = raw.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # n c h 2 w 2
        patches = patches.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        want = (patches - theirs.bn.running_mean[:, None, None]) / (
            theirs.bn.running_var + theirs.bn.eps
        ).sqrt()[:, None, None]
        assert (ours.latent_channels, ours.factor) == (16, 4)
    moments = ours.encode(images)
    latents = ours.sample(moments, noise=torch.zeros_like(want))
    torch.testing.assert_close(latents, want, rtol=1e-4, atol=1e-5)
    decoded = theirs.decode(raw).sample
    torch.testing.assert_close(ours.decode(latents), decoded, rtol=1e-4, atol=1e-4)
    assert ours.latent_shape((3, 16, 24)) == latents.shape[1:]
    assert ours.image_shape(latents.shape[1:]) == (3, 16, 24)


def test_folders_without_an_autoencoder_are_refused(tmp_path):
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="has no autoencoder: diffusers' have a config.json"):
        load_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json is no config of a diffusers model"):
        load_diffusers(tmp_path)
    for kind in ("UNet2DModel", "Nothing"):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
        with pytest.raises(ValueError, match=f"holds a {kind}, which is no autoencoder"):
            load_diffusers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="AutoencoderKL can't be used as an autoencoder: "):
        load_diffusers(tmp_path)


def test_autoencoders_of_videos_are_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers", minversion="0.35")
    diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="used as an autoencoder: it is of videos; name an auto"):
        load_diffusers(tmp_path)


def test_noise_of_the_latents_comes_from_the_generator():
    made = small(shift=[1.0, 2.0], scale=0.5)
    moments = made.encode(torch.rand(2, 1, 8, 8))
    latents = made.sample(moments, torch.Generator().manual_seed(3))
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    mean, std = moments.chunk(2, 1)
    want = (mean + std * noise - per_channel([1.0, 2.0])) * 0.5
    torch.testing.assert_close(latents, want)


@pytest.mark.parametrize("elements", [False, True])
def test_statistics_bring_latents_to_sigma_data(elements):
    made = small()
    raw = made.encode(torch.rand(512, 1, 8, 8) * 2 - 1)[:, :2]
    dims = (0,) if elements else (0, 2, 3)
    made.normalize(raw.mean(dims), raw.std(dims, correction=0), 0.5)
    zero = torch.zeros_like(raw)
    latents = made.sample(torch.cat([raw, zero], 1), noise=zero)
    torch.testing.assert_close(latents.mean(dims), zero.mean(dims), atol=1e-5, rtol=0)
    spread = latents.std(dims, correction=0)
    torch.testing.assert_close(spread, torch.full_like(spread, 0.5))
    torch.testing.assert_close(made.decode(latents), made.network.decode(raw), atol=1e-5, rtol=1e-4)
    if elements:
        with pytest.raises(ValueError, match="statistics per channel fit any size"):
            made.decode(torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        ([1.0], [1.0], r"mean of the latents must be a finite number, 2 of them.*shape \(1,\)"),
        (0.0, [1.0, 0.0], "std of the latents must be positive"),
        (0.0, float("nan"), "std of the latents must be a finite number"),
        ("x", 1.0, "mean of the latents must be"),
    ],
)
def test_wrong_statistics_are_refused(mean, std, says):
    with pytest.raises(ValueError, match=says):
        small().normalize(mean, std, 1.0)


def test_pixels_are_brought_to_the_range_of_the_network():
    plain, ranged = small(), small(input_range=(0.0, 1.0))
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(ranged.encode(images * 2 - 1), plain.encode((images * 2 - 1 + 1) / 2))
    latents = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(ranged.decode(latents), plain.decode(latents) * 2 - 1)


@pytest.mark.parametrize("tile", [None, 8])
def test_it_is_frozen_and_computes_in_its_own_type(tile):
    made = small(tile=tile)
    images = torch.rand(1, 1, 8, 8)
    exact = made.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.encode(images), exact)
    assert not made.train().network.training
    assert not any(p.requires_grad for p in made.parameters())
    latents = torch.randn(1, 2, 4, 9, requires_grad=True)  # of three tiles
    made.decode(latents).square().sum().backward()  # as guidance by a loss needs it
    assert latents.grad.isfinite().all()
    assert (latents.grad != 0).all()
    half = copy.deepcopy(made).to(torch.bfloat16)
    assert half.encode(images).dtype == torch.bfloat16
    torch.testing.assert_close(half.encode(images).float(), exact, atol=0.05, rtol=0.05)
    assert half.decode(latents).dtype == torch.float32


def test_wrong_sizes_are_refused():
    made = small(name="ae.pth")
    with pytest.raises(ValueError, match=r"ae.pth takes images of 1 channels whose sides are .* 2"):
        made.encode(torch.ones(1, 1, 7, 8))
    says = r"latents of ae.pth have shape \(2, 4, 4\), but the model's are \(3, 4, 4\)"
    with pytest.raises(ValueError, match=says):
        made.image_shape((3, 4, 4))
    for call, shape, says in (
        (made.encode, (1, 8, 8), r"takes images of shape \(n, 1, h, w\), got \(1, 8, 8\)"),
        (made.sample, (1, 5, 4, 4), r"takes moments of shape \(n, 4, h, w\), got \(1, 5, 4, 4\)"),
        (made.decode, (1, 3, 4, 4), r"takes latents of shape \(n, 2, h, w\), got \(1, 3, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=f"ae.pth {says}"):
            call(torch.ones(shape))
    with pytest.raises(ValueError, match="tile must be a multiple of 2, .* at least 8; got 6"):
        small(tile=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_equal_the_whole_in_their_interior(dtype):
    whole, tiles = (small(tile=tile).to(dtype) for tile in (None, 64))
    # of a contrast that differs from tile to tile, which group norms see
    images = torch.randn(1, 1, 96, 80, dtype=dtype) * torch.linspace(0.1, 2, 80, dtype=dtype)
    found, want = tiles.encode(images), whole.encode(images)
    assert (found.dtype, found.shape) == (dtype, want.shape)
    # of 48 x 40 latents the first tile has 32 x 32, and the next ones begin at 16 and 8
    torch.testing.assert_close(found[..., :12, :6], want[..., :12, :6], atol=2e-4, rtol=0)
    assert (found - want).square().mean().sqrt() < 0.1 * want.std()
    latents = want[:, :2]
    found, want = tiles.decode(latents), whole.decode(latents)
    torch.testing.assert_close(found[..., :16, :8], want[..., :16, :8], atol=2e-3, rtol=0)
    assert (found - want).square().mean().sqrt() < 0.2 * want.std()


@pytest.mark.parametrize("whose", ["ours", "diffusers"])
def test_tiles_equal_the_whole_where_attention_matters(whose, monkeypatch):
    torch.manual_seed(0)
    if whose == "ours":
        network = KLAutoencoder(3, 4, [8, 8], 1, num_groups=4, attentions=[False, True])
    else:
        network = _DiffusersNetwork(pytest.importorskip("tiny_diffusers").autoencoder())
    layers = [m for m in network.modules() if type(m).__name__ in {"AttentionBlock", "Attention"}]
    assert len(layers) == (5 if whose == "ours" else 2)
    for layer in layers:
        for name, weight in layer.named_parameters():
            if "norm" not in name:
                weight.data.mul_(3)
    whole, tiles = Autoencoder(network), Autoencoder(network, tile=64)
    images = torch.randn(1, 3, 96, 80) * torch.linspace(0.1, 2, 80)
    found, want = tiles.encode(images), whole.encode(images)
    interior = (..., slice(12), slice(6))  # as without attention
    torch.testing.assert_close(found[interior], want[interior], atol=2e-4, rtol=0)
    latents = want[:, :4]
    found, decoded = tiles.decode(latents), whole.decode(latents)
    torch.testing.assert_close(found[..., :16, :8], decoded[..., :16, :8], atol=2e-3, rtol=0)
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    monkeypatch.setattr(tiling, "_global_layers", lambda _: norms)
    alone = tiles.encode(images)  # attention of a tile
    assert (alone - want)[interior].abs().max() > 0.01


def test_attention_in_tiles_is_that_of_the_whole_with_its_gradient():
    layer = AttentionBlock(4, 2)
    x = torch.randn(2, 4, 20, 28, requires_grad=True)
    found, want = tiled(layer, layer, x, tile=12, scale=1), layer(x)
    torch.testing.assert_close(found, want)
    slopes = torch.randn_like(x)
    grads = (torch.autograd.grad(y, x, slopes)[0] for y in (found, want))
    torch.testing.assert_close(*grads)


def test_tiles_keep_half_precision():
    whole, tiles = (small(tile=tile).to(torch.bfloat16) for tile in (None, 8))
    images = torch.randn(1, 1, 8, 12, dtype=torch.bfloat16)
    assert tiles.encode(images).dtype == torch.bfloat16
    found, want = (
        tiles.decode(tiles.encode(images)[:, :2]),
        whole.decode(whole.encode(images)[:, :2]),
    )
    assert (found.dtype, found.shape) == (torch.bfloat16, want.shape)


def test_convolutions_alone_are_equal_but_for_seams():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1))
    x = torch.randn(1, 1, 50, 70)
    found = tiled(network, network, x, tile=24, scale=1)
    torch.testing.assert_close(found[..., :13, :15], network(x)[..., :13, :15])  # the next begin
    x.requires_grad_()
    same = tiled(lambda x: x, network, x, tile=24, scale=1)  # shares of 1
    torch.testing.assert_close(same, x)
    slopes = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(same, x, slopes)[0], slopes)


def test_norms_see_the_whole_picture():
    norm = nn.GroupNorm(1, 1)
    x = torch.randn(1, 1, 32, 64) * torch.linspace(0.1, 2, 64)
    torch.testing.assert_close(tiled(norm, norm, x, tile=32, scale=1), norm(x))


def test_fingerprints_tell_weights_apart():
    made = small()
    assert made.fingerprint == small(scale=3.0).fingerprint
    other = KLAutoencoder(1, 2, [8, 8], 1, num_groups=4, middle=False)
    assert Autoencoder(other).fingerprint != made.fingerprint


def test_it_is_found_within_a_model():
    model = nn.Sequential(nn.Linear(1, 1))
    assert find_autoencoder(model) is None
    model[0].autoencoder = made = small()
    assert find_autoencoder(model) is made
