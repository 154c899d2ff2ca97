"""What only a CUDA device can show: kernels, compilation, mixed precision, memory."""

import copy
import csv

import pytest
import runs
import torch
from attention_oracle import assert_same, forget, qkv
from torch._dynamo.utils import counters

import k_diffusion as K
from k_diffusion.models import attention, compile_model, image_transformer_v2 as v2
from k_diffusion.models.attention import (
    BACKENDS,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    Request,
    ShiftedWindowAttentionSpec,
)
from k_diffusion.models.flags import CHECKPOINTING
from k_diffusion.training.dry_run import dry_run
from k_diffusion.training.step import batch_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def as_it_comes(monkeypatch):
    monkeypatch.delenv(attention.ENV_VAR, raising=False)
    forget()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------- attention

GRIDS = [
    (GlobalAttentionSpec(64), (16, 16)),
    (GlobalAttentionSpec(64), (23, 29)),
    (ShiftedWindowAttentionSpec(64, 8, shift=4), (32, 16)),
    (NeighborhoodAttentionSpec(64, 7), (16, 16)),
    (NeighborhoodAttentionSpec(64, 7), (23, 29)),
    (NeighborhoodAttentionSpec(64, 7), (64, 48)),
    (NeighborhoodAttentionSpec(64, 7), (16, 128)),
    (NeighborhoodAttentionSpec(64, 13), (32, 32)),
]
NAMES = sorted({(geometry, name) for geometry, rows in BACKENDS.items() for name in rows})
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 3 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 3 * torch.finfo(torch.float16).eps,
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("geometry_name", "name"), NAMES)
def test_backends_are_the_formula_forward_and_backward(geometry_name, name, dtype):
    row = BACKENDS[geometry_name][name]
    grids = [(g, size) for g, size in GRIDS if g.name == geometry_name]
    reason = row.why_not(Request(grids[0][0], *grids[0][1], "cuda", dtype))
    if reason is not None:
        pytest.skip(reason)
    with K.utils.tf32_mode(cudnn=False, matmul=False):
        for geometry, size in grids:
            inputs = qkv(*size, e=64, dtype=dtype, device="cuda")
            assert_same(row.run, geometry, inputs, TOLERANCE[dtype])


# ---------------------------------------------------------------- models


def hourglass(depth=2):
    """A level of each geometry."""
    attns = [
        NeighborhoodAttentionSpec(64, 7),
        ShiftedWindowAttentionSpec(64, 4),
        GlobalAttentionSpec(64),
    ]
    levels = [v2.LevelSpec(depth, 128, 256, attn, 0.0) for attn in attns]
    model = v2.ImageTransformerDenoiserModelV2(
        levels, v2.MappingSpec(1, 64, 128, 0.0), 3, 3, (1, 1)
    )
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=g) * 0.02
    return model.cuda()


def output_and_gradients(model, dtype=torch.float32):
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).cuda()
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = model(x, torch.linspace(0.1, 2, 3).cuda())
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_near(got, want, tol):
    """Each tensor's error, by the norm of the wanted one, if that isn't next to nothing."""
    largest = max(b.norm() for b in want)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= tol * max(b.norm(), 1e-4 * largest)


def test_bfloat16_autocast_is_near_float32():
    model = hourglass()
    want = output_and_gradients(model)
    assert_near(output_and_gradients(model, torch.bfloat16), want, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", ["model", "block"])
def test_compiled_models_have_no_graph_breaks(unit, dtype):
    model = hourglass()
    want = output_and_gradients(model, dtype)
    compile_model(model, unit)
    got = output_and_gradients(model, dtype)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0
    assert_near(got, want, 1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
def test_cuda_graphs_draw_what_eager_models_draw(sampler):
    """With a history, and with several evaluations in a step, though a graph reuses its memory."""
    model = hourglass().eval().requires_grad_(False)
    sigmas = K.sampling.get_sigmas_karras(5, 0.1, 10, device="cuda")

    def draw():
        denoiser = K.Denoiser(model, 0.5)
        x = K.sampling.randn_per_seed(range(2), (3, 32, 32), device="cuda") * sigmas[0]
        return [K.sampling.sample(denoiser, x, sigmas, sampler, disable=True) for _ in range(2)]

    want = draw()
    compile_model(model, mode=K.models.CUDA_GRAPHS)
    assert_near(draw(), want, 1e-3)


@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("unit", [None, "block"])
def test_checkpointing_changes_no_gradient(unit, keep_attention):
    model = hourglass(depth=1)
    want = output_and_gradients(model)
    if unit:
        compile_model(model, unit)
    with K.models.checkpointing(keep_attention=keep_attention):
        assert_near(output_and_gradients(model), want, 1e-4)


# ---------------------------------------------------------------- training

CONFIG = {
    "model": {
        "type": "image_transformer_v2",
        "input_channels": 3,
        "input_size": [64, 64],
        "patch_size": [2, 2],
        "depths": [2, 2],
        "widths": [128, 256],
        "self_attns": [
            {"type": "neighborhood", "d_head": 64, "kernel_size": 7},
            {"type": "global", "d_head": 64},
        ],
        "loss_weighting": "soft-min-snr",
        "sigma_sample_density": {"type": "lognormal", "mean": -1.0, "std": 1.0},
    },
    "dataset": {"type": "none"},
    "optimizer": {"type": "adamw", "lr": 1e-4},
}


@pytest.mark.parametrize("checkpointing", ["off", "full", "selective"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_dry_run_knows_the_peak_memory_of_a_step(precision, checkpointing):
    n, config = 32, K.config.load_config(copy.deepcopy(CONFIG))
    run = dry_run(config, "cuda", precision, n, checkpointing=checkpointing)
    inner = K.config.make_model(config).cuda()
    denoiser = K.config.make_denoiser_wrapper(config)(inner)
    density = K.config.make_sample_density(config["model"])
    batch = {"image": torch.randn(n, 3, 64, 64), "aug_cond": torch.zeros(n, 9)}

    def step():
        with (
            torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"),
            K.models.checkpointing(**CHECKPOINTING[checkpointing]),
        ):
            loss = batch_loss(denoiser, batch, density, config, torch.device("cuda")).mean()
        loss.backward()
        inner.zero_grad()

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    gradients = 4 * run.parameters
    estimated = run.activations[checkpointing].most
    print(f"{precision} {checkpointing}: estimated {estimated:,}, measured {measured:,}")
    # between the estimate alone and with all gradients there at the peak
    assert 0.85 * estimated <= measured <= 1.15 * (estimated + gradients)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_half_precision(tmp_path, precision):
    code, text = runs.run(
        *runs.python("train", "--config", runs.ROOT / "configs/config_digits_transformer.json"),
        *["--name", "half", "--mixed-precision", precision, "--end-step", 60, "--demo-every", 60],
        *["--seed", 0, "--log-every", 20, "--num-workers", 0],
        folder=tmp_path,
    )
    assert code == 0, text
    with (tmp_path / "half_metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0]
    state = runs.read(tmp_path / "half_00000060.pth")
    assert all(x.isfinite().all() for x in state["model_ema"].values())
