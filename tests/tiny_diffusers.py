"""diffusers' models, tiny and with random weights."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")


def unet(**options):
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        **options,
    )
    return model.eval().requires_grad_(False)


def text_unet():
    """Stable Diffusion's kind, of text embeddings of 12 features."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=12,
    )
    return model.eval().requires_grad_(False)


def dit(classes=10):
    """It also estimates variances, in twice the channels."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=classes,
    )
    return model.eval().requires_grad_(False)


def sd3():
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return model.eval().requires_grad_(False)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def autoencoder(kind="AutoencoderKL", **options):
    """Its latents have 4 channels and half the sides, unless options say otherwise."""
    torch.manual_seed(0)
    levels = len(options.setdefault("block_out_channels", (8, 8)))
    options.setdefault("norm_num_groups", 32 if min(options["block_out_channels"]) > 8 else 4)
    model = getattr(diffusers, kind)(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **{"layers_per_block": 1, "latent_channels": 4, **options},
    )
    return model.eval().requires_grad_(False)
