"""Wrong arguments of the library's functions."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

import k_diffusion as K
from k_diffusion import sampling
from k_diffusion.common import images
from k_diffusion.config import load_config, make_model, make_sample_density

from .table import Call

NAN, INF = math.nan, math.inf
X = torch.ones(1, 1, 2, 2)
SIGMAS = [2.0, 1.0, 0.0]


def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x * 0.5


def run(sampler: str, *args: Any, **options: Any) -> Any:
    function = getattr(sampling, f"sample_{sampler}")
    where = {"dpm_adaptive": [0.1, 2.0], "dpm_fast": [0.1, 2.0, 5]}.get(sampler, [SIGMAS])
    return function(model, X, *where, *args, disable=True, **options)


def sampler(name: str, says: str, **options: Any) -> Call:
    text = ", ".join(f"{k}={v}" for k, v in options.items())
    return Call(f"{name}({text})", partial(run, name, **options), says)


def by_name(name: str, says: str, **options: Any) -> Call:
    call = partial(sampling.sample, model, X, SIGMAS, name, disable=True, **options)
    return Call(f"sample({name}, {options})", call, says)


def call(function: Any, says: str, *args: Any, **options: Any) -> Call:
    name = getattr(function, "__name__", str(function))
    text = ", ".join([*(str(a)[:20] for a in args), *(f"{k}={v}" for k, v in options.items())])
    return Call(
        f"{name}({text})"[:80].replace("\n", " "), partial(function, *args, **options), says
    )


ETA = [
    "ddim", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde",
    "dpmpp_2m_sde", "dpmpp_3m_sde", "tcd", "er_sde", "seeds_2", "seeds_3", "sa_solver",
    "sa_solver_pece", "res_multistep_ancestral", "dpm_fast", "dpm_adaptive",
    "euler_ancestral_cfg_pp", "euler_ancestral_RF",
]  # fmt: skip
CHURN = ["euler", "heun", "dpm_2", "heunpp2"]
LINEAR = nn.Linear(2, 2)
OPT = torch.optim.SGD(LINEAR.parameters(), 0.1)
DENSITIES = K.densities
ROWS = [
    *(sampler(name, "eta must be a finite number, 0 or more, got -1", eta=-1.0) for name in ETA),
    *(sampler(name, "eta must be a finite number, 0 or more, got nan", eta=NAN) for name in ETA),
    sampler("euler_ancestral", "eta must be .*got inf", eta=INF),
    *(sampler(name, "s_churn must be .*got -1", s_churn=-1.0) for name in CHURN),
    *(sampler(name, "s_churn must be .*got nan", s_churn=NAN) for name in CHURN),
    *(sampler(name, "s_noise must be .*got nan", s_noise=NAN)
      for name in ("euler", "ddpm", "lcm", "restart", "dpmpp_sde", "dpm_fast")),
    sampler("euler", "s_noise must be .*got -1", s_noise=-1.0),
    sampler("euler", "s_tmin must be .*got nan", s_tmin=NAN),
    sampler("euler", "s_tmax must be .*got nan", s_tmax=NAN),
    sampler("consistency", "sigma_min must be .*got nan", sigma_min=NAN),
    Call("euler_ancestral(eta by position)",
         lambda: sampling.sample_euler_ancestral(model, X, SIGMAS, None, None, True, -1.0), "eta"),
    by_name("euler_ancestral", "eta must be .*got -0.5", eta=-0.5),
    by_name("euler", "s_churn must be .*got nan", s_churn=NAN),
    by_name("dpm_adaptive", "rtol must be .*got nan", rtol=NAN),
    by_name("euler", "unknown option of euler 'etta'", etta=1),
    call(sampling.get_ancestral_step, "eta must be .*got -1", 2.0, 1.0, -1.0),
    call(sampling.get_ancestral_step, "eta must be .*got nan", 2.0, 1.0, NAN),
    sampler("dpm_adaptive", "rtol must be .*got nan", rtol=NAN),
    sampler("dpm_adaptive", "rtol must be .*got -1", rtol=-1.0),
    sampler("dpm_adaptive", "atol must be .*got nan", atol=NAN),
    sampler("dpm_adaptive", "rtol and atol", rtol=0.0, atol=0.0),
    sampler("dpm_adaptive", "h_init must be .*got 0", h_init=0.0),
    sampler("dpm_adaptive", "h_init must be .*got nan", h_init=NAN),
    sampler("dpm_adaptive", "pcoeff must be finite, got nan", pcoeff=NAN),
    sampler("dpm_adaptive", "accept_safety must .*got nan", accept_safety=NAN),
    sampler("dpm_adaptive", "accept_safety must .*got 3", accept_safety=3.0),
    sampler("dpm_adaptive", "order 2 or 3, got 4", order=4),
    sampler("lms", "order must be", order=0),
    sampler("gradient_estimation", "gamma must be finite, got nan", gamma=NAN),
    sampler("dpmpp_sde", "r must .*got nan", r=NAN),
    sampler("dpmpp_sde", "r must .*got 0", r=0.0),
    call(sampling.log_likelihood, "rtol must be .*got nan", model, X, 0.1, 2.0, rtol=NAN),
    call(sampling.log_likelihood, "atol must be .*got -1", model, X, 0.1, 2.0, atol=-1.0),
    call(sampling.log_likelihood, "prior_std must be .*got nan", model, X, 0.1, 2.0, prior_std=NAN),
    call(sampling.get_sigmas_karras, "sigma_min", 5, NAN, 2.0),
    call(sampling.get_sigmas_karras, "rho must be positive and finite, got nan", 5, 0.1, 2.0, NAN),
    call(sampling.get_sigmas_vp, "beta_d", 5, NAN),
    call(sampling.randn_per_seed, "seed", [-1], (1,)),
    # ---- guidance
    *(call(K.guidance.CFGDenoiser, f"scale must be finite, got {x}", LINEAR, x)
      for x in (NAN, INF)),
    call(K.guidance.AutoguidedDenoiser, "scale must be finite, got nan", LINEAR, LINEAR, NAN),
    call(K.guidance.GradientGuidedDenoiser, "scale must be finite, got nan", LINEAR, abs, NAN),
    call(K.guidance.IntervalDenoiser, "sigma_min < sigma_max", LINEAR, NAN, 1.0),
    call(K.guidance.Rescaled, "phi", NAN),
    call(K.guidance.APG, "eta must be finite, got nan", NAN),
    call(K.guidance.APG, "momentum", 0.0, 1.0, NAN),
    call(K.guidance.CFGPlusPlus, "strength must be finite, got nan", NAN, SIGMAS),
    call(K.guidance.ThresholdedDenoiser, "limit must be positive, got nan", LINEAR, NAN),
    # ---- densities
    call(DENSITIES.rand_log_normal, "loc must be finite, got nan", [1], NAN),
    call(DENSITIES.rand_log_normal, "scale must be positive.*got nan", [1], 0.0, NAN),
    call(DENSITIES.rand_log_normal, "scale must be positive.*got inf", [1], 0.0, INF),
    call(DENSITIES.rand_log_logistic, "loc must be finite, got inf", [1], INF),
    call(DENSITIES.rand_log_logistic, "min_value < max_value", [1], 0.0, 1.0, 2.0, 1.0),
    call(DENSITIES.rand_log_uniform, "min_value < max_value", [1], 2.0, 1.0),
    call(DENSITIES.rand_log_uniform, "max_value must be finite, got inf", [1], 2.0, INF),
    call(DENSITIES.rand_v_diffusion, "sigma_data must be positive.*got nan", [1], NAN),
    call(DENSITIES.rand_split_log_normal, "loc must be finite, got nan", [1], NAN, 1.0, 1.0),
    call(DENSITIES.rand_cosine_interpolated, "image_d must be positive", [1], NAN, 32.0, 64.0),
    # ---- averages and learning rates
    call(K.utils.ema_update, "decay must lie between 0 and 1, got 1.5", LINEAR, LINEAR, 1.5),
    call(K.utils.ema_update, "decay must lie between 0 and 1, got nan", LINEAR, LINEAR, NAN),
    call(K.utils.ema_update, "decay must lie between 0 and 1, got -0.1", LINEAR, LINEAR, -0.1),
    call(K.utils.ema_update_dict, "decay must lie between 0 and 1, got 2", {}, {"a": 1.0}, 2.0),
    call(K.utils.EMAWarmup, "min_value <= max_value <= 1", min_value=0.9, max_value=0.5),
    call(K.utils.EMAWarmup, "min_value <= max_value <= 1", max_value=1.5),
    call(K.utils.EMAWarmup, "power must be finite, got nan", power=NAN),
    call(K.utils.EMAWarmup, "inv_gamma must be positive, got nan", NAN),
    call(K.utils.InverseLR, "inv_gamma must be positive, got nan", OPT, NAN),
    call(K.utils.InverseLR, "power must be finite, got nan", OPT, 1.0, NAN),
    call(K.utils.InverseLR, "min_lr must be .*got -1", OPT, min_lr=-1.0),
    call(K.utils.ExponentialLR, "num_steps must be positive, got nan", OPT, NAN),
    call(K.utils.ExponentialLR, "decay must be .*got -0.5", OPT, 10, -0.5),
    call(K.utils.ConstantLRWithWarmup, "warmup must be", OPT, 1.0),
    # ---- configs
    call(load_config, "no config file gone", Path("gone")),
    call(load_config, "model: is required", {}),
    call(make_sample_density, "min_value 2.0 must be below max_value 1.0", {
        "sigma_data": 1.0,
        "sigma_sample_density": {"type": "v-diffusion", "min_value": 2.0, "max_value": 1.0}}),
    call(make_sample_density, "is required", {}),
    call(make_model, "model: is required", {}),
    # ---- images and downloads
    call(images.from_pil_image, "floats from 7 to 7", Image.new("F", (2, 2), 7)),
    call(images.from_pil_image, "integers from 70000", Image.new("I", (2, 2), 70000)),
    call(images.convert_mode, "pixels are LAB", Image.new("LAB", (2, 2)), "RGB"),
    call(K.utils.download_file, "by https alone, got 'file:", "x", "file:///etc/hosts", "0" * 64),
    call(K.utils.download_file, "by https alone, got 'http:", "x", "http://localhost/x", "0" * 64),
    call(K.utils.download_file, "by https alone, got 'x'", "x", "x"),
    call(K.utils.download_file, "digest must be a SHA-256", "x", "https://localhost/x", "md5"),
]  # fmt: skip
