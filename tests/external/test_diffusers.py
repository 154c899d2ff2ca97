"""diffusers' models, tiny and with random weights, against its own schedulers and pipelines."""

import math

import pytest
import torch
from tiny_diffusers import diffusers, dit, normal, sd3, unet
from torch import nn

from k_diffusion import external, sampling
from k_diffusion.external import make_diffusers_denoiser
from k_diffusion.external.diffusers import alphas_cumprod, flow_shift

STEPS = 6


def text():
    return {"encoder_hidden_states": normal(5, 2, 7, 12), "pooled_projections": normal(6, 2, 10)}


def by_their_scheduler(scheduler, model, x, **kwargs):
    """A diffusers sampling loop, without noise."""
    for t in scheduler.timesteps:
        output = model(x, timestep=t.expand(len(x)), return_dict=False, **kwargs)[0]
        x = scheduler.step(output[:, : x.shape[1]], t, x, return_dict=False)[0]
    return x


# ---------------------------------------------------------------------------- DDPMs against DDIM


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@torch.no_grad()
def test_ddim_is_euler_in_sigma(prediction, beta_schedule):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=beta_schedule, prediction_type=prediction, clip_sample=False
    )
    scheduler.set_timesteps(STEPS)
    model, x = unet(), normal(1, 2, 3, 8, 8)
    want = by_their_scheduler(scheduler, model, x)

    denoiser = make_diffusers_denoiser(model, scheduler)
    sigmas = torch.cat([denoiser.t_to_sigma(scheduler.timesteps), torch.zeros(1)])
    start = x * (1 + sigmas[0] ** 2).sqrt()  # theirs is divided by this
    got = sampling.sample_euler(denoiser, start, sigmas, disable=True)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_ddim_pipeline():
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample")
    model, shape = unet(), (2, 3, 8, 8)
    pipeline = diffusers.DDIMPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        2, torch.Generator().manual_seed(1), num_inference_steps=STEPS, output_type="np"
    ).images
    want = torch.from_numpy(images).movedim(-1, 1) * 2 - 1
    assert (want.abs() < 1).float().mean() > 0.8  # they clamp, and here little

    denoiser = make_diffusers_denoiser(model, dict(scheduler.config))
    sigmas = torch.cat([denoiser.t_to_sigma(pipeline.scheduler.timesteps), torch.zeros(1)])
    start = normal(1, *shape) * (1 + sigmas[0] ** 2).sqrt()
    got = sampling.sample_euler(denoiser, start, sigmas, disable=True)
    torch.testing.assert_close(got.clamp(-1, 1), want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_class_conditional_transformer_with_learned_variances():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    model, x, labels = dit(), normal(1, 2, 4, 8, 8), torch.tensor([3, 7])
    want = by_their_scheduler(scheduler, model, x, class_labels=labels)

    denoiser = make_diffusers_denoiser(model, scheduler, quantize=True)
    sigmas = torch.cat([denoiser.t_to_sigma(scheduler.timesteps), torch.zeros(1)])
    start = x * (1 + sigmas[0] ** 2).sqrt()
    cond = {"class_labels": labels}
    got = sampling.sample_euler(denoiser, start, sigmas, extra_args=cond, disable=True)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@torch.no_grad()
def test_euler_scheduler_on_its_own_sigmas():
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    scheduler.set_timesteps(STEPS)
    model, x = unet(), normal(1, 2, 3, 8, 8) * scheduler.init_noise_sigma
    want = x
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(want, t), t).sample
        want = scheduler.step(output, t, want).prev_sample
    denoiser = make_diffusers_denoiser(model, scheduler)
    got = sampling.sample_euler(denoiser, x, scheduler.sigmas, disable=True)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid", "num_train_timesteps": 100},
        {"trained_betas": [0.01, 0.02, 0.05]},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    ],
)
def test_tables(options):
    scheduler = diffusers.DDPMScheduler(**options)
    want = scheduler.alphas_cumprod
    torch.testing.assert_close(alphas_cumprod(scheduler.config), want, rtol=1e-4, atol=1e-6)


def test_zero_terminal_snr_samples_are_finite():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    denoiser = make_diffusers_denoiser(unet(), scheduler)
    sigmas = denoiser.get_sigmas(STEPS)
    assert sigmas[0] == pytest.approx(4096, rel=1e-3)
    x = normal(1, 2, 3, 8, 8) * sigmas[0]
    assert sampling.sample_heun(denoiser, x, sigmas, disable=True).isfinite().all()


# ------------------------------------------------------------------------------- flows


@pytest.mark.parametrize("shift", [1.0, 3.0])
@torch.no_grad()
def test_flow_match_euler_is_euler_in_sigma(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    model, x = sd3(), normal(1, 2, 4, 8, 8)
    denoiser = make_diffusers_denoiser(model, scheduler)
    sigmas = denoiser.get_sigmas(STEPS)
    # the same times, theirs before the shift
    times = denoiser.sigma_to_t(sigmas[:-1] / shift)
    scheduler.set_timesteps(sigmas=times.tolist())
    torch.testing.assert_close(scheduler.sigmas, denoiser.sigma_to_t(sigmas))
    want = by_their_scheduler(scheduler, model, x, **text())
    start = x * (1 + sigmas[0])
    got = sampling.sample_euler(denoiser, start, sigmas, extra_args=text(), disable=True)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_flow_from_pure_noise():
    """Theirs starts at t = 1, ours as near as sigma_max is far."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)])
    assert scheduler.timesteps[0] == 1000
    model, x = sd3(), normal(1, 2, 4, 8, 8)
    want = by_their_scheduler(scheduler, model, x, **text())
    denoiser = make_diffusers_denoiser(model, scheduler)
    sigmas = denoiser.get_sigmas(STEPS)
    start = x * sigmas[0]
    got = sampling.sample_euler(denoiser, start, sigmas, extra_args=text(), disable=True)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_packed_flow_transformer_whose_time_ends_at_one():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    cond = {**text(), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3)}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    denoiser = make_diffusers_denoiser(model, scheduler, tokens=16, time_scale=1)
    x, sigma = normal(1, 2, 16, 4), torch.tensor([0.3, 4.0])
    t = sigma / (1 + sigma)
    x_t = x / (1 + sigma)[:, None, None]
    want = x_t - t[:, None, None] * model(x_t, timestep=t, **cond).sample
    torch.testing.assert_close(denoiser(x, sigma, **cond), want)


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_shift_by_the_number_of_tokens(time_shift_type):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=time_shift_type
    )
    tokens, t = 1024, [0.9, 0.4]
    mu = 0.5 + 0.65 * (1024 - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=t, mu=mu)
    denoiser = make_diffusers_denoiser(nn.Identity(), scheduler, tokens=tokens)
    shifted = denoiser.shift * torch.tensor(t) / (1 - torch.tensor(t))
    torch.testing.assert_close(denoiser.sigma_to_t(shifted), scheduler.sigmas[:-1])


def test_shift():
    assert flow_shift({}) == 1
    assert flow_shift({"flow_shift": 5}) == 5  # of the DPM-Solver family
    assert flow_shift({"use_dynamic_shifting": True}, 256) == pytest.approx(math.exp(0.5))
    assert make_diffusers_denoiser(nn.Identity(), {"shift": 2.0}, shift=4.0).shift == 4
    config = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0
    ).config
    denoiser = make_diffusers_denoiser(nn.Identity(), config)
    assert isinstance(denoiser, external.RectifiedFlowDenoiser)
    assert (denoiser.shift, denoiser.time_scale) == (6, 1000)


# ------------------------------------------------------------------------- dtypes, losses, errors


def test_a_half_precision_model_samples_in_single_precision():
    model = unet()
    denoiser = make_diffusers_denoiser(model, diffusers.DDPMScheduler())
    x, sigma = normal(1, 2, 3, 8, 8), torch.tensor([0.5, 3.0])
    want = denoiser(x, sigma)
    model.to(torch.bfloat16)  # after a call, too
    y = denoiser(x, sigma)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want, rtol=0.1, atol=0.1)
    assert not torch.equal(y, want)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_losses_are_of_the_schedulers_targets(prediction):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    model, t = unet(), torch.tensor([20, 700])
    x, noise = normal(1, 2, 3, 8, 8), normal(2, 2, 3, 8, 8)
    target = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(x, noise, t),
        "sample": x,
    }[prediction]
    want = (model(scheduler.add_noise(x, noise, t), t).sample - target).pow(2).mean((1, 2, 3))
    denoiser = make_diffusers_denoiser(model, scheduler, quantize=True)
    got = denoiser.loss(x, noise, denoiser.t_to_sigma(t))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"prediction_type": "score"}, "unknown prediction_type 'score'.*; there are eps"),
        ({"sigma_data": 0.5}, "no beta_schedule, beta_start, beta_end, num_train_timesteps"),
        ({"use_dynamic_shifting": True, "shift": 1.0}, "pass tokens"),
        ({"invert_sigmas": True, "shift": 1.0}, "invert_sigmas isn't supported"),
        (
            {**diffusers.DDPMScheduler().config, "beta_schedule": "quadratic"},
            "unknown beta_schedule 'quadratic'.*; there are linear",
        ),
    ],
)
def test_other_schedulers_are_errors(config, match):
    with pytest.raises(ValueError, match=match):
        make_diffusers_denoiser(nn.Identity(), config)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_last_entry_of_a_table(beta_schedule):
    """In ratio: it is near 0, and the highest noise level follows from it."""
    scheduler = diffusers.DDPMScheduler(beta_schedule=beta_schedule)
    got = alphas_cumprod(scheduler.config)[-1]
    torch.testing.assert_close(got, scheduler.alphas_cumprod[-1], rtol=1e-3, atol=0)


def test_the_cosine_tables_variances_are_at_most_0_999():
    """Improved DDPM (arXiv:2102.09672), section 3.2."""
    table = alphas_cumprod(diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").config)
    assert 1 - (table[1:] / table[:-1]).min().item() == pytest.approx(0.999, abs=1e-5)
