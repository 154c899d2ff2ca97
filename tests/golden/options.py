"""The cases of options.safetensors: the published package's numbers away from its defaults.

Non-square images and patches, odd depths, noise between none and all of it, utilities. Each case
returns a tensor, or what the file's metadata has of it. DIFFERENT names the cases on record in
which this version gives something else; who changes that moves the name to a case of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import k_diffusion as K
from k_diffusion.models import (
    image_transformer_v1 as v1,
    image_transformer_v2 as v2,
    image_v1,
)

from . import fill, normal

Case = Callable[[], Any]
CASES: dict[str, Case] = {}

DIFFERENT = {
    # kernels, losses and blocks called in other ways
    *("bicubic", "bilinear", "scales4_3d", "unet_custom_ublock"),
    *("var_scales", "var_weighting", "weighting_callable"),
    # skip_stages; shifts of odd windows and at odd depths; the older transformer
    *("cfg_skip_i1", "set_skip1", "set_skip_returns", "skip1", "skip1_odd", "skip2"),
    *("sw_3", "sw_odd", "sw_oddwindow_nonsquare", "v2_numclasses_ctor", "t1_numclasses_ctor"),
    *("t1_clamp", "t1_clamp_param", "t1_freqs_init", "t1_nonsquare_patch", "t1_proj_"),
    # configs that are incomplete, or have other keys
    *("cfg_dataset_notype", "cfg_density_partial", "cfg_depth0", "cfg_empty_selfattns"),
    *("cfg_i1_sched", "cfg_image_d", "cfg_mapdepth0", "cfg_nodataset", "cfg_nosize"),
    *("cfg_sgd", "cfg_wrapper_partial"),
    # samplers from low noise to high, and the dtype of half-precision samples
    *("dpm_adaptive_reverse", "dpm_fast_reverse"),
    "sdtype_dpmpp_2s_ancestral_{'eta': 0.0}",
    "sdtype_dpmpp_2s_ancestral_{'eta': 0.6, 's_noise': 1.1}",
    "sdtype_dpmpp_sde_{'eta': 0.0, 'r': 0.3}",
    "sdtype_dpmpp_sde_{'eta': 0.6, 's_noise': 1.1}",
    # utilities
    *("ema_dict", "ema_startat", "explr_decay", "explr_load", "split_strat", "strat_acc"),
}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# ---------------------------------------------------------------- models

GLOBAL = v2.GlobalAttentionSpec(32)
WINDOW = v2.ShiftedWindowAttentionSpec(32, 4)


def run_model(make: Callable[[], torch.nn.Module], h: int, w: int) -> torch.Tensor:
    with torch.no_grad():
        return fill(make()).eval()(normal(1, (2, 3, h, w)), torch.tensor([0.05, 1.3]))


def hourglass(*levels: tuple[int, Any], patch: tuple[int, int] = (2, 2)) -> torch.nn.Module:
    """A level for each depth and attention."""
    specs = [v2.LevelSpec(depth, 64, 96, attention, 0.0) for depth, attention in levels]
    mapping = v2.MappingSpec(2, 64, 96, 0.0)
    return v2.ImageTransformerDenoiserModelV2(specs, mapping, 3, 3, patch)


def transformer() -> torch.nn.Module:
    return v1.ImageTransformerDenoiserModelV1(2, 128, 256, 3, 3, (2, 2))


def small_queries() -> torch.nn.Module:
    model = fill(transformer())
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.qkv_proj.weight.mul_(1e-2)
    return model


CASES |= {
    name: partial(run_model, *args)
    for name, args in {
        "sw_even": (lambda: hourglass((2, WINDOW), (1, GLOBAL)), 32, 32),
        "sw_mid_odd": (lambda: hourglass((2, GLOBAL), (3, WINDOW)), 32, 32),
        "none_level": (lambda: hourglass((2, v2.NoAttentionSpec()), (1, GLOBAL)), 24, 36),
        "nbh_nonsquare": (
            lambda: hourglass((2, v2.NeighborhoodAttentionSpec(32, 5)), (1, GLOBAL)),
            24,
            36,
        ),
        "v2_nonsquare_patch": (lambda: hourglass((1, GLOBAL), patch=(2, 4)), 16, 32),
        "t1": (transformer, 16, 16),
        "t1_nonsquare_image": (transformer, 16, 24),
        "skip0_16": (
            lambda: image_v1.ImageDenoiserModelV1(
                3, 64, [1, 1, 2], [32, 64, 64], [False, True, True]
            ),
            16,
            16,
        ),
    }.items()
}


@case
def t1_smallq():
    with torch.no_grad():
        return small_queries().eval()(normal(1, (2, 3, 16, 16)), torch.tensor([0.05, 1.3]))


@case
def crossattn():
    model = fill(K.layers.CrossAttention2d(64, 16, 2, lambda c: K.layers.AdaGN(8, c, 2))).eval()
    padding = torch.zeros(2, 5)
    padding[:, 3:] = 1
    cond = {"cond": normal(2, (2, 8)), "cross": normal(3, (2, 5, 16)), "cross_padding": padding}
    return model(normal(1, (2, 64, 4, 4)), cond)


def resampled(kernel: str) -> torch.Tensor:
    x = normal(3, (2, 3, 16, 16))
    down, up = K.layers.Downsample2d(kernel), K.layers.Upsample2d(kernel)
    return torch.cat([down(x).flatten(), up(x).flatten()])


CASES |= {f"resample_{k}": partial(resampled, k) for k in ("linear", "cubic", "lanczos3")}

# ---------------------------------------------------------------- samplers


def toy(x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1)))


def toy_in_float32(x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
    return toy(x.float(), sigma.float()).to(x.dtype)


X = (2, 1, 4, 4)
CHURN = {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.01}
SOME = {"eta": 0.6, "s_noise": 1.1}
SAMPLERS: list[tuple[str, dict[str, Any]]] = [
    ("euler", CHURN),
    ("heun", CHURN),
    ("dpm_2", CHURN),
    ("euler_ancestral", SOME),
    ("dpm_2_ancestral", SOME),
    ("dpmpp_2s_ancestral", SOME),
    ("dpmpp_sde", SOME),
    ("dpmpp_2m_sde", SOME),
    ("dpmpp_2m_sde", {"eta": 0.6, "solver_type": "heun"}),
    ("dpmpp_3m_sde", SOME),
    ("lms", {"order": 2}),
    ("dpmpp_sde", {"eta": 0.0, "r": 0.3}),
    ("euler_ancestral", {"eta": 0.0}),
    ("dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpm_2_ancestral", {"eta": 0.0}),
    ("dpmpp_3m_sde", {"eta": 0.0}),
]


def run_sampler(name: str, options: dict[str, Any]) -> torch.Tensor:
    """The sample, and what the global generator gives after it."""
    sigmas = K.sampling.get_sigmas_karras(8, 0.05, 12.0)
    sample = getattr(K.sampling, f"sample_{name}")
    y = sample(toy, normal(30, X, 12.0), sigmas, disable=True, **options)
    return torch.cat([y.flatten(), torch.randn(3)])


def dtype_of_half(name: str, options: dict[str, Any]) -> str:
    """The dtype of a float16 sample by a float32 schedule."""
    options = {key: value for key, value in options.items() if key != "s_churn"}
    sigmas = K.sampling.get_sigmas_karras(8, 0.05, 12.0)
    sample = getattr(K.sampling, f"sample_{name}")
    x = normal(30, X, 12.0).half()
    return str(sample(toy_in_float32, x, sigmas, disable=True, **options).dtype)


for _name, _options in SAMPLERS:
    CASES[f"s_{_name}_{_options}"] = partial(run_sampler, _name, _options)
    if f"sdtype_{_name}_{_options}" not in DIFFERENT:
        CASES[f"sdtype_{_name}_{_options}"] = partial(dtype_of_half, _name, _options)


@case
def no_zero_end():
    sigmas, x = K.sampling.get_sigmas_karras(8, 0.05, 12.0)[:-1], normal(30, X, 12.0)
    names = "dpmpp_2m", "lms", "heun", "dpm_2"
    return torch.stack(
        [K.sampling.get_sampler(n).function(toy, x, sigmas, disable=True) for n in names]
    )


@case
def dpm_fast_eta():
    x = normal(1, X, 10.0)
    return K.sampling.sample_dpm_fast(toy, x, 0.1, 10.0, 9, disable=True, eta=0.7)


@case
def dpm_adaptive_eta():
    x = normal(1, X, 10.0)
    noise = lambda sigma, sigma_next: normal(int(float(sigma) * 1000), X)  # noqa: E731
    return K.sampling.sample_dpm_adaptive(
        toy, x, 0.1, 10.0, disable=True, eta=0.7, noise_sampler=noise
    )


@case
def dpm_adaptive_o2():
    x = normal(1, X, 10.0)
    return K.sampling.sample_dpm_adaptive(toy, x, 0.1, 10.0, disable=True, order=2)


@case
def likelihood_gen():
    torch.manual_seed(3)
    ll, info = K.sampling.log_likelihood(toy, normal(50, X, 0.5), 1e-2, 20.0)
    return torch.cat([ll, torch.tensor([float(info["fevals"])])])


# ---------------------------------------------------------------- wrappers and utilities


@case
def vtoy():
    wrapper = K.external.VDenoiser(lambda x, t: torch.tanh(x + t.view(-1, 1, 1, 1)))
    return wrapper(normal(20, (4, 3, 8, 8)), torch.tensor([0.02, 0.3, 2.0, 40.0]))


@case
def disc_single():
    schedule = K.external.DiscreteSchedule(torch.linspace(0.1, 10, 5), False)
    ts = schedule.sigma_to_t(torch.tensor([0.05, 0.1, 3.3, 10.0, 20.0]))
    sigmas = schedule.t_to_sigma(torch.tensor([0.0, 1.5, 4.0]))
    return torch.cat([ts, sigmas, schedule.get_sigmas(3)])


@case
def dens16():
    wide = {"dtype": torch.float64}
    return torch.stack(
        [
            K.utils.rand_log_normal([6], 0, 1, **wide),
            K.utils.rand_v_diffusion([6], **wide),
            K.utils.rand_log_logistic([6], **wide),
        ]
    )


@case
def ema_startat2():
    ema, decays = K.utils.EMAWarmup(inv_gamma=2.0, power=0.7, start_at=3), []
    for _ in range(8):
        decays.append(ema.get_value())
        ema.step()
    return torch.tensor(decays)


def rounded(widths: Any) -> str:
    return str([K.config.round_to_power_of_two(w * 8 / 3, 0.05) for w in widths])


CASES["round_pow2"] = partial(rounded, range(64, 2050, 62))
CASES["round_pow2b"] = partial(
    rounded, (128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048)
)
