"""The cases of golden.safetensors: what was run, through the public API, to get its numbers.

Each case returns tensors by name, and under "json" what is held against the file's metadata.
Weights are filled from a hash of their names, so a renamed parameter shows up as a difference.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import k_diffusion as K

from . import fill, normal, outputs_and_gradients

Case = Callable[[], dict[str, Any]]

CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# ---------------------------------------------------------------- configs

V2 = {
    "model": {
        "type": "image_transformer_v2",
        "input_channels": 3,
        "input_size": [32, 32],
        "patch_size": [4, 4],
        "depths": [2, 2, 4],
        "widths": [128, 192, 256],
        "sigma_data": 0.5,
        "sigma_min": 0.01,
        "sigma_max": 80,
        "sigma_sample_density": {"type": "cosine-interpolated"},
    },
    "dataset": {"type": "imagefolder", "location": "x"},
}
V1 = {
    "model": {
        "type": "image_v1",
        "input_channels": 3,
        "input_size": [32, 32],
        "patch_size": 1,
        "mapping_out": 64,
        "depths": [1, 2],
        "channels": [32, 64],
        "self_attn_depths": [False, True],
        "sigma_data": 0.5,
        "sigma_min": 0.01,
        "sigma_max": 80,
        "sigma_sample_density": {"type": "lognormal", "mean": -1.2, "std": 1.2},
    },
    "dataset": {"type": "cifar10", "location": "data"},
    "lr_sched": {"type": "inverse", "inv_gamma": 1e4, "power": 1.0, "warmup": 0.99},
}
T1 = {
    "model": {
        "type": "image_transformer_v1",
        "input_channels": 3,
        "input_size": [16, 16],
        "patch_size": [2, 2],
        "depth": 2,
        "width": 128,
        "sigma_data": 0.5,
        "sigma_min": 0.01,
        "sigma_max": 80,
        "sigma_sample_density": {"type": "loglogistic"},
    },
    "dataset": {"type": "mnist", "location": "data", "num_classes": 10},
}


def changed(base: dict[str, Any], num_classes: int = 0, **model: Any) -> dict[str, Any]:
    config = copy.deepcopy(base)
    config["model"].update(model)
    if num_classes:
        config["dataset"]["num_classes"] = num_classes
    return config


for _name, _config in (("transformer_v2", V2), ("image_v1", V1), ("transformer_v1", T1)):
    CASES[f"config_defaults_{_name}"] = lambda config=_config: {
        "json": K.config.load_config(config)
    }

# ---------------------------------------------------------------- models


def run_model(config: dict[str, Any], x: torch.Tensor, **cond: torch.Tensor) -> dict[str, Any]:
    model = fill(K.config.make_model(K.config.load_config(config))).eval()
    names = {p: name for name, p in model.named_parameters()}
    groups = [
        {**group, "params": sorted(names[p] for p in group["params"])}
        for group in model.param_groups(1e-3)
    ]
    facts = {
        "state": {name: list(value.shape) for name, value in model.state_dict().items()},
        "groups": groups,
        "n_params": K.utils.n_params(model),
    }
    return outputs_and_gradients(model, x, torch.tensor([0.05, 1.3]), **cond) | {"json": facts}


GLOBAL = {"type": "global"}
MODELS: dict[str, Case] = {
    "v2_global": lambda: run_model(
        changed(
            V2,
            input_size=[16, 16],
            patch_size=[2, 2],
            depths=[1, 2],
            widths=[64, 128],
            self_attns=[GLOBAL, {**GLOBAL, "d_head": 32}],
        ),
        normal(1, (2, 3, 16, 16)),
    ),
    "v2_classes_augs": lambda: run_model(
        changed(V2, 10, input_channels=1, input_size=[28, 28], depths=[2], widths=[64]),
        normal(2, (2, 1, 28, 28)),
        class_cond=torch.tensor([3, 10]),
        aug_cond=normal(3, (2, 9)),
    ),
    "v2_shifted_window": lambda: run_model(
        changed(
            V2,
            patch_size=[2, 2],
            depths=[2, 1],
            widths=[64, 64],
            self_attns=[{"type": "shifted-window", "d_head": 32, "window_size": 4}, GLOBAL],
        ),
        normal(4, (2, 3, 32, 32)),
    ),
    "v2_neighborhood": lambda: run_model(
        changed(
            V2,
            patch_size=[2, 2],
            depths=[2, 1],
            widths=[64, 64],
            self_attns=[{"type": "neighborhood", "d_head": 32, "kernel_size": 5}, GLOBAL],
        ),
        normal(5, (2, 3, 32, 32)),
    ),
    "v1": lambda: run_model(V1, normal(11, (2, 3, 32, 32)), aug_cond=normal(12, (2, 9))),
    "t1": lambda: run_model(T1, normal(18, (2, 3, 16, 16)), class_cond=torch.tensor([0, 7])),
}
CASES |= {f"model_{name}": function for name, function in MODELS.items()}

# ---------------------------------------------------------------- denoisers and densities


def toy(x: torch.Tensor, sigma: torch.Tensor, scale: float = 1.0, **_: Any) -> torch.Tensor:
    """A smooth nonlinear denoiser in which pixels see their neighbours."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    y = torch.tanh(1.5 * (x + 0.3 * torch.roll(x, 1, -1)) / (1 + s))
    return scale * y * 0.8 + 0.1 * torch.sin(3 * x / (1 + s))


class Inner(nn.Module):
    def forward(self, x, sigma, return_variance=False):
        y = toy(x, sigma)
        return (y, y.flatten(1).mean(1)) if return_variance else y


def run_denoiser(cls: str, **kw: Any) -> dict[str, Any]:
    denoiser = getattr(K.layers, cls)(Inner(), **kw)
    x, noise = normal(20, (4, 3, 8, 8)), normal(21, (4, 3, 8, 8))
    sigma = torch.tensor([0.02, 0.3, 2.0, 40.0])
    return {"loss": denoiser.loss(x, noise, sigma), "y": denoiser(x, sigma)}


for _name, _cls, _kw in (
    ("karras", "Denoiser", {}),
    ("soft_min_snr", "Denoiser", {"sigma_data": 0.7, "weighting": "soft-min-snr"}),
    ("snr", "Denoiser", {"weighting": "snr"}),
    ("multiscale", "Denoiser", {"weighting": "soft-min-snr", "scales": 4}),
    ("simple", "SimpleLossDenoiser", {}),
    ("variance", "DenoiserWithVariance", {}),
):
    CASES[f"denoiser_{_name}"] = partial(run_denoiser, _cls, **({"sigma_data": 0.5} | _kw))


def run_density(density: dict[str, Any]) -> dict[str, Any]:
    config = K.config.load_config(changed(V2, sigma_sample_density=density))
    draw = K.config.make_sample_density(config["model"])
    torch.manual_seed(5)
    return {"s": draw([32])}


DENSITIES: dict[str, dict[str, Any]] = {
    "lognormal": {"type": "lognormal", "mean": -1.2, "std": 1.2},
    "loglogistic": {"type": "loglogistic", "min_value": 0.01, "max_value": 80.0},
    "loguniform": {"type": "loguniform"},
    "vdiff": {"type": "v-diffusion"},
    "split": {"type": "split-lognormal", "loc": -1.0, "scale_1": 0.5, "scale_2": 1.5},
    "cosint": {"type": "cosine-interpolated"},
}
CASES |= {f"density_{name}": partial(run_density, row) for name, row in DENSITIES.items()}

# ---------------------------------------------------------------- schedules and samplers


@case
def schedules():
    s = K.sampling
    return {
        "karras": s.get_sigmas_karras(10, 0.01, 80.0),
        "karras5": s.get_sigmas_karras(7, 0.1, 10.0, rho=5.0),
        "exp": s.get_sigmas_exponential(10, 0.01, 80.0),
        "poly": s.get_sigmas_polyexponential(10, 0.01, 80.0, rho=0.7),
        "vp": s.get_sigmas_vp(10),
    }


SHAPE = (3, 2, 6, 6)


def noise_of_the_interval(x: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A noise sampler without chance."""
    index = torch.arange(x.numel(), dtype=torch.float64).view(x.shape)

    def noise(sigma, sigma_next):
        phase = float(sigma) * 78.233 + float(sigma_next) * 37.719
        return (torch.sin(index * 12.9898 + phase) * 1.4).to(x)

    return noise


def mean_sq(x: torch.Tensor) -> float:
    return float(x.double().pow(2).mean())


def run_sampler(name: str, noise: bool = False, **kw: Any) -> dict[str, Any]:
    sigmas = K.sampling.get_sigmas_karras(9, 0.05, 12.0)
    x, log = normal(30, SHAPE, float(sigmas[0])), []
    if noise:
        kw["noise_sampler"] = noise_of_the_interval(x)

    def callback(d):
        numbers = [float(d[key]) for key in ("i", "sigma", "sigma_hat")]
        log.append([*numbers, mean_sq(d["denoised"]), mean_sq(d["x"])])

    torch.manual_seed(123)
    sample = getattr(K.sampling, f"sample_{name}")
    y = sample(toy, x, sigmas, {"scale": 0.9}, disable=True, callback=callback, **kw)
    return {"x": y, "callback": torch.tensor(log)}


CHURN = {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.003}
for _name, _kw in (
    ("euler", {}),
    ("euler", CHURN),
    ("heun", {}),
    ("dpm_2", {}),
    ("euler_ancestral", {"noise": True}),
    ("euler_ancestral", {}),
    ("dpm_2_ancestral", {"noise": True}),
    ("lms", {}),
    ("dpmpp_2s_ancestral", {"noise": True}),
    ("dpmpp_sde", {"noise": True}),
    ("dpmpp_sde", {}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {"noise": True}),
    ("dpmpp_2m_sde", {"noise": True, "solver_type": "heun"}),
    ("dpmpp_3m_sde", {"noise": True}),
):
    _options = "_".join(f"{key}={value}" for key, value in _kw.items()) or "default"
    CASES[f"sample_{_name}__{_options}"] = partial(run_sampler, _name, **_kw)


def run_dpm_solver(name: str, *args: Any, **kw: Any) -> Any:
    log = []

    def callback(d):
        log.append([float(d["sigma"]), float(d["sigma_hat"]), mean_sq(d["denoised"])])

    torch.manual_seed(7)
    x = normal(31, SHAPE, 12.0)
    sample = getattr(K.sampling, name)
    y = sample(toy, x, 0.05, 12.0, *args, disable=True, callback=callback, **kw)
    return y, torch.tensor(log)


@case
def dpm_fast_12():
    y, log = run_dpm_solver("sample_dpm_fast", 12)
    return {"x": y, "callback": log}


@case
def dpm_adaptive_3():
    (y, info), log = run_dpm_solver("sample_dpm_adaptive", return_info=True)
    return {"x": y, "callback": log, "json": info}


@case
def brownian_tree():
    x = normal(40, (4, 3, 5, 5))
    many = K.sampling.BrownianTreeNoiseSampler(x, 0.05, 12.0, seed=[1, 2, 3, 4])
    one = K.sampling.BrownianTreeNoiseSampler(x, 0.05, 12.0, seed=9)
    sigmas = torch.tensor([12.0, 6.0, 0.5])
    return {
        "batched": torch.stack([many(sigmas[0], sigmas[1]), many(sigmas[1], sigmas[2])]),
        "single": torch.stack([one(12.0, 3.0), one(3.0, 0.05)]),
    }


@case
def log_likelihood():
    torch.manual_seed(3)
    x = normal(50, (2, 1, 4, 4), 0.5)
    return {"ll": K.sampling.log_likelihood(toy, x, 1e-2, 20.0)[0]}


# ---------------------------------------------------------------- wrappers


class EpsNet(nn.Module):
    alphas_cumprod = (
        (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)
        .cumprod(0)
        .float()
    )

    def forward(self, x, t):
        return torch.tanh(x * 0.7 + 0.001 * t.view(-1, 1, 1, 1))

    def apply_model(self, x, t, cond):
        return self(x, t) + cond


class EpsAndVarianceNet(EpsNet):
    def forward(self, x, t):
        y = super().forward(x, t)
        return torch.cat([y, y * 2], 1)


class Diffusion:
    alphas_cumprod = EpsNet.alphas_cumprod.double().numpy()


def run_wrapper(wrapper: Any, **kw: Any) -> dict[str, Any]:
    x, noise = normal(60, (3, 2, 4, 4)), normal(61, (3, 2, 4, 4))
    sigma = torch.tensor([0.05, 1.1, 12.0])
    t = torch.as_tensor(wrapper.sigma_to_t(sigma)).float()
    out = {"y": wrapper(x, sigma, **kw), "loss": wrapper.loss(x, noise, sigma, **kw)}
    out |= {"t": t, "back": wrapper.t_to_sigma(t)}
    if hasattr(wrapper, "get_sigmas"):
        out["sig8"], out["sigall"] = wrapper.get_sigmas(8), wrapper.get_sigmas()
        out["minmax"] = torch.stack([wrapper.sigma_min, wrapper.sigma_max])
        out["tq"] = wrapper.sigma_to_t(sigma, quantize=True).float()
    return out


@case
def external_v():
    return run_wrapper(K.external.VDenoiser(EpsNet()))


@case
def external_openai():
    return run_wrapper(K.external.OpenAIDenoiser(EpsAndVarianceNet(), Diffusion()))


@case
def external_compvis():
    return run_wrapper(K.external.CompVisDenoiser(EpsNet()), cond=normal(62, (3, 2, 4, 4)))


# ---------------------------------------------------------------- training utilities


def learning_rates(cls: str, **kw: Any) -> torch.Tensor:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    sched, lrs = getattr(K.utils, cls)(optimizer, **kw), []
    for _ in range(12):
        lrs.append(sched.get_last_lr()[0])
        optimizer.step()
        sched.step()
    return torch.tensor(lrs)


@case
def ema_and_lr():
    ema, decays = K.utils.EMAWarmup(power=0.6667, max_value=0.9999), []
    for _ in range(12):
        decays.append(ema.get_value())
        ema.step()
    return {
        "ema": torch.tensor(decays),
        "inv": learning_rates("InverseLR", inv_gamma=3.0, power=0.7, warmup=0.9, min_lr=0.1),
        "exp": learning_rates("ExponentialLR", num_steps=4, decay=0.6, warmup=0.5),
        "const": learning_rates("ConstantLRWithWarmup", warmup=0.8),
    }


@case
def fid_kid():
    x, y = normal(80, (200, 16)), normal(81, (300, 16)) * 1.3 + 0.2
    e = K.evaluation
    return {
        "fid": e.fid(x, y),
        "kid": e.kid(x, y),
        "kid_parts": e.kid(x, y, max_size=64),
        "mmd": e.squared_mmd(x, y),
        "poly": e.polynomial_kernel(x[:5], y[:4]),
    }


@case
def gns():
    scale = K.gns.GradientNoiseScale(beta=0.9)
    values = [scale.update(5.0 + math.sin(i), 2.0 + 0.1 * i, 4, 32) for i in range(10)]
    stats = torch.tensor(scale.get_stats())
    return {"g": torch.tensor(values), "stats": stats, "json": scale.state_dict()}


@case
def augmentation():
    pixels = np.indices((24, 24)).sum(0)[..., None] * np.array([3, 4, 5]) % 256
    image = Image.fromarray(pixels.astype("uint8"))
    out = {}
    for seed in range(6):
        torch.manual_seed(seed)
        augmented, original, cond = K.augmentation.KarrasAugmentationPipeline(a_prob=0.8)(image)
        out |= {f"img{seed}": torch.as_tensor(augmented).float(), f"orig{seed}": original}
        out[f"cond{seed}"] = cond
    torch.manual_seed(0)
    pipeline = K.augmentation.KarrasAugmentationPipeline(0.0, disable_all=True)
    augmented, _, cond = pipeline(image)
    return out | {"off": torch.as_tensor(augmented).float(), "offc": cond}
