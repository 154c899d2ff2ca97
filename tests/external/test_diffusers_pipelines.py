"""diffusers' own pipelines with classifier-free guidance, tiny and with random weights, against a
sampler and `CFGDenoiser` on the same model. Those with text encoders need transformers to load."""

import pytest
import torch
from tiny_diffusers import diffusers, dit, normal, sd3, text_unet

from k_diffusion import sampling
from k_diffusion.external import make_diffusers_denoiser
from k_diffusion.guidance import CFGDenoiser

STEPS, SCALE = 6, 3.0


def sample(model, start, sigmas, null, cond):
    guided = CFGDenoiser(model, SCALE, **null)
    with torch.no_grad():
        return sampling.sample_euler(guided, start, sigmas, extra_args=cond, disable=True)


def on_table(pipeline, model, x, null, cond):
    """DDIM, from noise in variance-preserving form."""
    denoiser = make_diffusers_denoiser(model, pipeline.scheduler)
    sigmas = sampling.append_zero(denoiser.t_to_sigma(pipeline.scheduler.timesteps))
    return sample(denoiser, x * (1 + sigmas[0] ** 2).sqrt(), sigmas, null, cond)


def test_dit_pipeline():
    model = dit(classes=1000)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    pipeline = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    latents, decode = [], vae.decode
    vae.decode = lambda z: (latents.append(z * vae.config.scaling_factor), decode(z))[1]
    pipeline(
        class_labels=[3, 7],
        guidance_scale=SCALE,
        generator=torch.Generator().manual_seed(1),
        num_inference_steps=STEPS,
        output_type="np",
    )
    null, cond = {"class_labels": torch.tensor([1000])}, {"class_labels": torch.tensor([3, 7])}
    got = on_table(pipeline, model, normal(1, 2, 4, 8, 8), null, cond)
    torch.testing.assert_close(got, latents[0], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # theirs about configs
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_pipeline(prediction):
    pytest.importorskip("transformers")
    model = text_unet()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
    )
    parts = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipeline = diffusers.StableDiffusionPipeline(
        unet=model, scheduler=scheduler, **dict.fromkeys(parts), requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    x, text, no_text = normal(1, 2, 4, 8, 8), normal(5, 2, 7, 12), normal(6, 2, 7, 12)
    want = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=no_text,
        latents=x,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="latent",
    ).images
    null, cond = {"encoder_hidden_states": no_text}, {"encoder_hidden_states": text}
    got = on_table(pipeline, model, x, null, cond)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_stable_diffusion_3_pipeline():
    pytest.importorskip("transformers")
    model = sd3()
    parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    parts += ("tokenizer", "tokenizer_2", "tokenizer_3")
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(parts),
    )
    pipeline.set_progress_bar_config(disable=True)
    x = normal(1, 2, 4, 8, 8)
    cond = {"encoder_hidden_states": normal(5, 2, 7, 12), "pooled_projections": normal(6, 2, 10)}
    null = {"encoder_hidden_states": normal(7, 2, 7, 12), "pooled_projections": normal(8, 2, 10)}
    want = pipeline(
        prompt_embeds=cond["encoder_hidden_states"],
        pooled_prompt_embeds=cond["pooled_projections"],
        negative_prompt_embeds=null["encoder_hidden_states"],
        negative_pooled_prompt_embeds=null["pooled_projections"],
        latents=x,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        height=64,
        width=64,
        output_type="latent",
    ).images
    denoiser = make_diffusers_denoiser(model, pipeline.scheduler)
    # the pipeline's times; its first one, 1, is as near as sigma_max is far
    sigmas = denoiser.t_to_sigma(pipeline.scheduler.sigmas)
    got = sample(denoiser, x * sigmas[0], sigmas, null, cond)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
