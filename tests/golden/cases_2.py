"""The cases of golden_2.safetensors: models beyond even depths, configs, losses, samplers.

A case returns a tensor, or a fact that is held against the file's metadata. It starts after
`torch.manual_seed(0)`.
"""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import k_diffusion as K
from k_diffusion.models import image_transformer_v1 as v1, image_transformer_v2 as v2, image_v1

from . import fill as _fill, normal

SIGMA = torch.tensor([0.05, 1.3])
SIGMAS = torch.tensor([0.02, 0.3, 2.0, 40.0])
X = normal(1, (2, 3, 16, 16))


def fill(module: nn.Module) -> nn.Module:
    return _fill(module).eval()


# ---------------------------------------------------------------- models


def unet(skip: int = 0) -> Any:
    attention = [False, True, True]
    return image_v1.ImageDenoiserModelV1(
        3, 64, [1, 1, 2], [32, 64, 64], attention, skip_stages=skip
    )


def hourglass(*levels: tuple[int, Any], patch: tuple[int, int] = (2, 2), **kw: Any) -> Any:
    specs = [v2.LevelSpec(depth, 64, 96, attn, 0.0) for depth, attn in levels]
    return v2.ImageTransformerDenoiserModelV2(
        specs, v2.MappingSpec(2, 64, 96, 0.0), 3, 3, patch, **kw
    )


def transformer(**kw: Any) -> Any:
    args: dict[str, Any] = {"n_layers": 2, "d_model": 128, "d_ff": 256, "in_features": 3}
    args |= {"out_features": 3, "patch_size": (2, 2)}
    return v1.ImageTransformerDenoiserModelV1(**(args | kw))


def run(model: nn.Module, h: int = 16, w: int = 16) -> torch.Tensor:
    return fill(model)(normal(1, (2, 3, h, w)), SIGMA)


def clamped() -> Any:
    model: Any = fill(transformer())
    for block in model.blocks:
        block.self_attn.qk_norm.scale.data.fill_(6.0)
    return model


def small_queries() -> torch.Tensor:
    model: Any = fill(transformer())
    for block in model.blocks:
        block.self_attn.qkv_proj.weight.data.mul_(1e-2)
    return model(X, SIGMA)


def clamped_scale() -> float:
    model = clamped()
    model(X, SIGMA)
    return float(model.blocks[0].self_attn.qk_norm.scale[0])


def cross_attention() -> torch.Tensor:
    model = fill(K.layers.CrossAttention2d(64, 16, 2, lambda c: K.layers.AdaGN(8, c, 2)))
    padding = torch.zeros(2, 5)
    padding[:, 3:] = 1
    cond = {"cond": normal(2, (2, 8)), "cross": normal(3, (2, 5, 16)), "cross_padding": padding}
    return model(normal(1, (2, 64, 4, 4)), cond)


class Down(K.layers.ConditionedModule):
    def forward(self, x, cond):
        return x + 1


class Up(K.layers.ConditionedModule):
    def forward(self, x, cond, skip=None):
        return x if skip is None else x * 2 + skip


G, W = v2.GlobalAttentionSpec(32), v2.ShiftedWindowAttentionSpec
CASES: dict[str, Callable[[], Any]] = {
    "skip0_16": lambda: run(unet()),
    "skip1": lambda: run(unet(1)),
    "skip2": lambda: run(unet(2)),
    "skip1_odd": lambda: run(unet(1), 10, 10),
    "set_skip1": lambda: run(unet().set_skip_stages(1)),
    "set_skip_returns": lambda: type(unet().set_skip_stages(1)).__name__,
    "sw_odd": lambda: run(hourglass((1, W(32, 4)), (1, G)), 32, 32),
    "sw_3": lambda: run(hourglass((3, W(32, 4)), (1, G)), 32, 32),
    "sw_even": lambda: run(hourglass((2, W(32, 4)), (1, G)), 32, 32),
    "sw_mid_odd": lambda: run(hourglass((2, G), (3, W(32, 4))), 32, 32),
    "sw_oddwindow_nonsquare": lambda: run(hourglass((2, W(32, 3)), (1, G)), 24, 36),
    "none_level": lambda: run(hourglass((2, v2.NoAttentionSpec()), (1, G)), 24, 36),
    "nbh_nonsquare": lambda: run(
        hourglass((2, v2.NeighborhoodAttentionSpec(32, 5)), (1, G)), 24, 36
    ),
    "v2_numclasses_ctor": lambda: list(hourglass((1, G), num_classes=11).class_emb.weight.shape),
    "v2_nonsquare_patch": lambda: run(hourglass((1, G), patch=(2, 4)), 16, 32),
    "t1": lambda: run(transformer()),
    "t1_freqs_init": lambda: (
        transformer().state_dict()["blocks.0.self_attn.pos_emb.freqs_h"].exp() / math.pi
    ),
    "t1_nonsquare_patch": lambda: run(transformer(patch_size=(2, 4)), 16, 32),
    "t1_nonsquare_image": lambda: run(transformer(), 16, 24),
    "t1_clamp": lambda: clamped()(X, SIGMA),
    "t1_clamp_param": clamped_scale,
    "t1_smallq": small_queries,
    "t1_proj_": lambda: hasattr(transformer(), "proj_"),
    "t1_numclasses_ctor": lambda: list(transformer(num_classes=11).class_emb.weight.shape),
    "crossattn": cross_attention,
    "unet_custom_ublock": lambda: K.layers.UNet([Down(), Down()], [Up(), Up()])(
        normal(1, (1, 2, 4, 4)), {}
    ),
}

# ---------------------------------------------------------------- denoisers, resampling


class Inner(nn.Module):
    def forward(self, x, sigma, return_variance=False):
        y = torch.tanh(x)
        return (y, y.flatten(1).mean(1)) if return_variance else y


IMAGE, NOISE = normal(20, (4, 3, 8, 8)), normal(21, (4, 3, 8, 8))


def with_variance(**kw: Any) -> torch.Tensor:
    denoiser = K.layers.DenoiserWithVariance(Inner(), sigma_data=0.5, **kw)
    return denoiser.loss(IMAGE, NOISE, SIGMAS)


def resample(kernel: str) -> torch.Tensor:
    x = normal(3, (2, 3, 16, 16))
    down, up = K.layers.Downsample2d(kernel)(x), K.layers.Upsample2d(kernel)(x)
    return torch.cat([down.flatten(), up.flatten()])


CASES |= {
    "var_weighting": lambda: with_variance(weighting="soft-min-snr"),
    "var_scales": lambda: with_variance(scales=3),
    "scales4_3d": lambda: K.layers.Denoiser(Inner(), sigma_data=0.5, scales=4).loss(
        IMAGE[:, :, 0], NOISE[:, :, 0], SIGMAS
    ),
    "weighting_callable": lambda: K.layers.Denoiser(Inner(), weighting="snr").weighting(SIGMAS),
    "bilinear": lambda: K.layers.Downsample2d("bilinear")(IMAGE),
    "bicubic": lambda: K.layers.Upsample2d("bicubic")(IMAGE),
    "resample_linear": lambda: resample("linear"),
    "resample_cubic": lambda: resample("cubic"),
    "resample_lanczos3": lambda: resample("lanczos3"),
}

# ---------------------------------------------------------------- configs

LOGNORMAL = {"type": "lognormal", "mean": -1.2, "std": 1.2}
COMMON = {"input_channels": 3, "input_size": [32, 32], "sigma_data": 0.5, "sigma_min": 0.01}
COMMON |= {"sigma_max": 80, "sigma_sample_density": LOGNORMAL}
V2 = {
    **COMMON,
    "type": "image_transformer_v2",
    "patch_size": [2, 2],
    "depths": [1, 1],
    "widths": [64, 64],
    "self_attns": [
        {"type": "shifted-window", "d_head": 32, "window_size": 4},
        {"type": "global", "d_head": 32},
    ],
}
V1 = {
    **COMMON,
    "type": "image_v1",
    "mapping_out": 64,
    "depths": [1, 1],
    "channels": [32, 32],
    "self_attn_depths": [False, False],
}
FOLDER = {"type": "imagefolder", "location": "x"}


def load(base: dict[str, Any] = V2, sections: Any = None, **model: Any) -> dict[str, Any]:
    raw = {"model": {**copy.deepcopy(base), **model}, "dataset": FOLDER, **(sections or {})}
    return K.config.load_config(raw)


def made(**model: Any) -> str:
    return type(K.config.make_model(load(**model))).__name__


def image_d() -> torch.Tensor:
    config = load(sigma_sample_density={"type": "cosine-interpolated", "image_d": 64})
    return K.config.make_sample_density(config["model"])([8])


def density_of_two_keys() -> torch.Tensor:
    density = {"type": "lognormal", "mean": 0.0, "std": 1.0}
    return K.config.make_sample_density({"sigma_data": 1.0, "sigma_sample_density": density})([4])


def wrapper_of_one_key() -> str:
    return type(K.config.make_denoiser_wrapper({"model": {"sigma_data": 0.5}})(Inner())).__name__


def rounded(widths: Any) -> str:
    return str([K.config.round_to_power_of_two(w * 8 / 3, 0.05) for w in widths])


WIDTHS = (128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048)
CASES |= {
    "cfg_sgd": lambda: load(sections={"optimizer": {"type": "sgd", "lr": 0.1}})["optimizer"][
        "weight_decay"
    ],
    "cfg_i1_sched": lambda: str(sorted(load(V1)["lr_sched"].items())),
    "cfg_dataset_notype": lambda: load(sections={"dataset": {"location": "x", "num_classes": 3}})[
        "dataset"
    ]["type"],
    "cfg_nodataset": lambda: K.config.load_config({"model": V2})["dataset"]["type"],
    "cfg_image_d": image_d,
    "cfg_density_partial": density_of_two_keys,
    "cfg_wrapper_partial": wrapper_of_one_key,
    "cfg_empty_selfattns": lambda: str(load(self_attns=[])["model"]["self_attns"]),
    "cfg_nosize": lambda: made(input_size=None),
    "cfg_depth0": lambda: made(depths=[0, 1]),
    "cfg_mapdepth0": lambda: made(mapping_depth=0),
    "cfg_skip_i1": lambda: run(K.config.make_model(load(V1, skip_stages=1)), 32, 32),
    "round_pow2": lambda: rounded(range(64, 2050, 62)),
    "round_pow2b": lambda: rounded(WIDTHS),
}

# ---------------------------------------------------------------- utilities, wrappers


def exponential() -> Any:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    return optimizer, K.utils.ExponentialLR(optimizer, 10)


def exponential_loaded() -> float:
    optimizer, schedule = exponential()
    state = {"num_steps": 10, "decay": 0.5, "warmup": 0.0, "min_lr": 0.0, "base_lrs": [1.0]}
    state |= {"last_epoch": 5, "_step_count": 6, "_last_lr": [0.7]}
    schedule.load_state_dict(state)
    optimizer.step()
    schedule.step()
    return schedule.get_last_lr()[0]


def ema_values() -> torch.Tensor:
    schedule, values = K.utils.EMAWarmup(inv_gamma=2.0, power=0.7, start_at=3), []
    for _ in range(8):
        values.append(schedule.get_value())
        schedule.step()
    return torch.tensor(values)


def ema_dict() -> str:
    values: dict[str, Any] = {"a": torch.tensor(1.0)}
    tensor = values["a"]
    K.utils.ema_update_dict(values, {"a": 2.0, "b": 3.0}, 0.9)
    return str((float(values["a"]), values["b"], float(tensor)))


def stratified_by_accelerator() -> torch.Tensor:
    accumulation = SimpleNamespace(num_steps=4)
    accelerator = SimpleNamespace(
        process_index=0, num_processes=1, step=1, gradient_state=accumulation
    )
    with K.utils.enable_stratified_accelerate(accelerator):
        return K.utils.rand_log_uniform([4], 0.1, 1.0)


def split_within_stratified() -> torch.Tensor:
    with K.utils.enable_stratified():
        return K.utils.rand_split_log_normal([8], 0.0, 1.0, 2.0)


def wide_densities() -> torch.Tensor:
    dtype, u = torch.float64, K.utils
    draws = u.rand_log_normal([6], 0, 1, dtype=dtype), u.rand_v_diffusion([6], dtype=dtype)
    return torch.stack([*draws, u.rand_log_logistic([6], dtype=dtype)])


def discrete() -> torch.Tensor:
    d = K.external.DiscreteSchedule(torch.linspace(0.1, 10, 5), False)
    t = d.sigma_to_t(torch.tensor([0.05, 0.1, 3.3, 10.0, 20.0]))
    return torch.cat([t, d.t_to_sigma(torch.tensor([0.0, 1.5, 4.0])), d.get_sigmas(3)])


CASES |= {
    "ema_startat": lambda: K.utils.EMAWarmup(min_value=0.5, start_at=10).get_value(),
    "ema_startat2": ema_values,
    "explr_decay": lambda: str(exponential()[1].decay),
    "explr_load": exponential_loaded,
    "strat_acc": stratified_by_accelerator,
    "split_strat": split_within_stratified,
    "ema_dict": ema_dict,
    "dens16": wide_densities,
    "vtoy": lambda: K.external.VDenoiser(lambda x, t: torch.tanh(x + t.view(-1, 1, 1, 1)))(
        IMAGE, SIGMAS
    ),
    "disc_single": discrete,
}

# ---------------------------------------------------------------- samplers

SHAPE = (2, 1, 4, 4)
KARRAS = K.sampling.get_sigmas_karras(8, 0.05, 12.0)


def toy(x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.tanh(x.float() / (1 + sigma.float().view(-1, 1, 1, 1))).to(x.dtype)


def sample(name: str, x: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
    return getattr(K.sampling, f"sample_{name}")(toy, x, *args, disable=True, **kw)


def numbers(name: str, kw: dict[str, Any]) -> torch.Tensor:
    y = sample(name, normal(30, SHAPE, 12.0), KARRAS, **kw)
    return torch.cat([y.flatten(), torch.randn(3)])


def half(name: str, kw: dict[str, Any]) -> str:
    kw = {key: value for key, value in kw.items() if key != "s_churn"}
    return str(sample(name, normal(30, SHAPE, 12.0).half(), KARRAS, **kw).dtype)


def likelihood() -> torch.Tensor:
    torch.manual_seed(3)
    value, info = K.sampling.log_likelihood(toy, normal(50, SHAPE, 0.5), 1e-2, 20.0)
    return torch.cat([value, torch.tensor([float(info["fevals"])])])


def noise(sigma: Any, sigma_next: Any) -> torch.Tensor:
    return normal(int(float(sigma) * 1000), SHAPE)


CHURN = {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.01}
NOISY, QUIET = {"eta": 0.6, "s_noise": 1.1}, {"eta": 0.0}
START, WIDE = normal(1, SHAPE), normal(1, SHAPE, 10.0)
SAMPLING: dict[str, Callable[[], Any]] = {
    "dpm_fast_reverse": lambda: sample("dpm_fast", START, 10.0, 0.1, 9),
    "dpm_adaptive_reverse": lambda: sample("dpm_adaptive", START, 10.0, 0.1),
    "dpm_fast_eta": lambda: sample("dpm_fast", WIDE, 0.1, 10.0, 9, eta=0.7),
    "dpm_adaptive_eta": lambda: sample(
        "dpm_adaptive", WIDE, 0.1, 10.0, eta=0.7, noise_sampler=noise
    ),
    "dpm_adaptive_o2": lambda: sample("dpm_adaptive", WIDE, 0.1, 10.0, order=2),
    "no_zero_end": lambda: torch.stack(
        [
            sample(name, normal(30, SHAPE, 12.0), KARRAS[:-1])
            for name in ("dpmpp_2m", "lms", "heun", "dpm_2")
        ]
    ),
    "likelihood_gen": likelihood,
}
for _name, _kw in (
    *((name, CHURN) for name in ("euler", "heun", "dpm_2")),
    *((name, NOISY) for name in ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral")),
    *((name, NOISY) for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")),
    ("dpmpp_2m_sde", {"eta": 0.6, "solver_type": "heun"}),
    ("lms", {"order": 2}),
    ("dpmpp_sde", {"eta": 0.0, "r": 0.3}),
    *((name, QUIET) for name in ("euler_ancestral", "dpmpp_2s_ancestral", "dpm_2_ancestral")),
    ("dpmpp_3m_sde", QUIET),
):
    SAMPLING[f"s_{_name}_{_kw}"] = lambda name=_name, kw=_kw: numbers(name, kw)
    SAMPLING[f"sdtype_{_name}_{_kw}"] = lambda name=_name, kw=_kw: half(name, kw)
