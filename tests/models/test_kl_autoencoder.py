"""The KL autoencoder: against diffusers' by the same weights, and its weights' names."""

import re

import pytest
import torch

from k_diffusion.models.autoencoder import KLAutoencoder, compvis_autoencoder, compvis_weights

PLACES = [  # of diffusers' names, in latent diffusion's
    (r"(en|de)coder\.mid_block\.resnets\.0", r"\1coder.mid.block_1"),
    (r"(en|de)coder\.mid_block\.resnets\.1", r"\1coder.mid.block_2"),
    (r"(en|de)coder\.mid_block\.attentions\.0", r"\1coder.mid.attn_1"),
    (r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"decoder\.up_blocks\.(\d)\.resnets", r"decoder.up.\1.block"),
    (r"decoder\.up_blocks\.(\d)\.upsamplers\.0", r"decoder.up.\1.upsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_(q|k|v)", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
]


def in_compvis_names(weights, levels):
    out = {}
    for name, x in weights.items():
        for pattern, place in PLACES:
            name = re.sub(pattern, place, name)
        # diffusers counts the decoder's levels from the coarsest
        name = re.sub(r"up\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        out[name] = x
    return out


@pytest.mark.parametrize("whole", [False, True])
def test_weights_of_latent_diffusion_give_diffusers_numbers(whole):
    tiny_diffusers = pytest.importorskip("tiny_diffusers")
    theirs = tiny_diffusers.autoencoder(block_out_channels=(32, 64), layers_per_block=2)
    weights = in_compvis_names(theirs.state_dict(), 2)  # with attention as matrices
    if whole:
        weights = {f"first_stage_model.{name}": x for name, x in weights.items()}
        weights |= {"model.diffusion_model.out.0.weight": torch.ones(3), "betas": torch.ones(2)}
    weights = compvis_weights(weights)
    ours = compvis_autoencoder(weights, "it").requires_grad_(False)
    ours.load_state_dict(weights)
    images = torch.rand(2, 3, 16, 12) * 2 - 1
    dist = theirs.encode(images).latent_dist
    torch.testing.assert_close(ours.encode(images), (dist.mean, dist.logvar), rtol=1e-4, atol=1e-5)
    moments = torch.cat([dist.mean, dist.std], 1)
    torch.testing.assert_close(ours.moments(images), moments, rtol=1e-4, atol=1e-5)
    decoded = theirs.decode(dist.mean).sample
    torch.testing.assert_close(ours.decode(dist.mean), decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"quant": False, "middle": False},
        {"attentions": [False, True], "z_channels": 5},
        {"depth": 1},
    ],
)
def test_the_architecture_is_read_from_the_weights(options):
    made = KLAutoencoder(1, 3, [32, 64], **options)
    weights = compvis_weights(made.state_dict())
    again = compvis_autoencoder(weights, "it")
    again.load_state_dict(weights)
    images = torch.rand(1, 1, 8, 8)
    assert torch.equal(made.moments(images), again.moments(images))
    assert made.decode(torch.ones(1, 3, 4, 4)).shape == (1, 1, 8, 8)


def test_what_is_no_autoencoder_is_refused():
    with pytest.raises(ValueError, match="it is no autoencoder .* no encoder.down levels"):
        compvis_autoencoder({"layer.weight": torch.ones(2)}, "it")
    some = {"encoder.down.0.block.0.conv1.weight": torch.ones(8, 8, 3, 3)}
    with pytest.raises(ValueError, match=r"no encoder.conv_in.weight; name a folder"):
        compvis_autoencoder(some, "it")


def test_training_draws_the_latents_that_it_decodes():
    model = KLAutoencoder(1, 2, [8, 8], 1, num_groups=4, middle=False).requires_grad_(False)
    images = torch.rand(3, 1, 4, 6)
    mean, log_variance = model.encode(images)
    torch.manual_seed(1)
    noise = torch.randn_like(mean)
    torch.manual_seed(1)
    made, *moments = model(images)
    assert torch.equal(made, model.decode(mean + noise * (log_variance / 2).exp()))
    assert torch.equal(moments[0], mean)
    assert torch.equal(moments[1], log_variance)


def test_wrong_sizes_are_refused():
    model = KLAutoencoder(1, 2, [8, 8], 1, num_groups=4)
    with pytest.raises(ValueError, match="multiples of 2 and 2"):
        model.encode(torch.ones(1, 1, 4, 5))
    with pytest.raises(ValueError, match=r"latents of shape \(n, 2, h, w\) expected"):
        model.decode(torch.ones(1, 3, 4, 4))
    with pytest.raises(ValueError, match="num_groups must divide the channels: 12 / 8"):
        KLAutoencoder(1, 2, [8, 12], num_groups=8)
