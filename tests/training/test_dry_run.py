"""`train.py --dry-run`: its numbers against counts and measurements made in other ways."""

import copy
import json
import socket

import pytest
import runs
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import k_diffusion as K
from k_diffusion import conditions
from k_diffusion.models import attention, flops
from k_diffusion.training import dry_run as dry, optim
from k_diffusion.training.dry_run import footprint, levels
from k_diffusion.training.step import batch_loss

CONFIGS = sorted(
    path
    for path in (runs.ROOT / "configs").glob("*.json")
    if "autoencoder" not in path.name  # which train_autoencoder.py trains
)

UNET = {
    "type": "image_v1",
    "input_channels": 3,
    "input_size": [16, 24],
    "patch_size": 2,
    "mapping_out": 32,
    "depths": [1, 2],
    "channels": [32, 64],
    "self_attn_depths": [False, True],
    "sigma_sample_density": {"type": "loguniform"},
}
V1 = {
    "type": "image_transformer_v1",
    "input_channels": 3,
    "input_size": [16, 24],
    "patch_size": [2, 4],
    "width": 64,
    "depth": 2,
    "sigma_sample_density": {"type": "v-diffusion"},
}
WINDOWS = {
    "self_attns": [
        {"type": "shifted-window", "d_head": 8, "window_size": 4},
        {"type": "none"},
    ],
    "input_size": [16, 24],
    "depths": [2, 1],
    "dropout_rate": 0.1,
}
CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Estimates one way of checkpointing alone."""
    for mode in "full", "selective":
        monkeypatch.delitem(footprint.CHECKPOINTING, mode)


def forward(config, inner, n=1, device="cpu"):
    """The mean loss of a real batch, or of one on the meta device."""
    model = config["model"]
    denoiser = K.config.make_denoiser_wrapper(config)(inner)
    density = K.config.make_sample_density(model)
    batch = {
        "image": torch.zeros(n, model["input_channels"], *model["input_size"]),
        "aug_cond": torch.zeros(n, 9),
        "class": torch.zeros(n, dtype=torch.long),
        **conditions.blank(config, n),
    }
    return batch_loss(denoiser, batch, density, config, torch.device(device)).mean()


# ------------------------------------------------------------------------- counts


def finest_levels(inner):
    inner = getattr(inner, "inner_model", inner)
    if hasattr(inner, "u_net"):
        return inner.u_net.d_blocks
    return [*inner.down_levels, inner.mid_level] if hasattr(inner, "mid_level") else inner.blocks


def seen_by(modules):
    """Fills the list that it returns with the shapes of what comes out of modules."""
    shapes = []
    for module in modules:
        module.register_forward_hook(lambda _, args, out: shapes.append(out.shape[1:]))
    return shapes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config(path, quick, monkeypatch, tmp_path, capsys):
    made = []
    monkeypatch.setattr(dry, "print", lambda run, **to: (made.append(run), print(run, **to)), False)
    args = "--config", path, "--dry-run", "--batch-size", 2, "--set", "optimizer.lr=0.25"
    args += "--power-ema", 0.05, 0.1
    runs.call("train", *args, folder=tmp_path, monkeypatch=monkeypatch)
    said = capsys.readouterr()
    config = K.config.load_config(json.loads(said.out))
    assert config == json.loads(said.out) == K.config.load_config(path, ["optimizer.lr=0.25"])
    assert not list(tmp_path.iterdir())

    run = made[0]
    with torch.device("meta"):
        inner = K.config.make_model(config)
    shapes = seen_by(finest_levels(inner))
    with flops.flop_counter() as counter:
        forward(config, inner, device="meta")
    weights = 4 * sum(x.numel() for x in [*inner.parameters(), *inner.buffers()])
    assert run.parameters == sum(p.numel() for p in inner.parameters())
    assert run.states["weights"] == run.states["averaged weights"] / 3 == weights
    moments = run.states[f"{config['optimizer']['type']} state"]
    assert run.states["gradients"] == moments / 2 == 4 * run.parameters
    assert run.macs == counter.flops
    unet = config["model"]["type"] == "image_v1"
    want = [(s[1:], s[0]) if unet else (s[:2], s[2]) for s in shapes]
    assert [((x.h, x.w), x.width) for x in run.levels] == want
    assert f"{run.parameters:,}" in said.err
    assert f"{run.levels[0].h} x {run.levels[0].w}" in said.err


@pytest.mark.parametrize(
    ("depths", "widths", "neighborhood", "size", "params", "macs"),
    [
        ([2, 2, 16], [384, 768, 1536], 2, 256, 557.4e6, 197.6e9),
        ([2, 2, 2, 2, 2], [128, 256, 384, 768, 1024], 3, 1024, 85.1e6, 206.1e9),
    ],
)
def test_published_architectures(quick, depths, widths, neighborhood, size, params, macs):
    kinds = ["neighborhood"] * neighborhood + ["global"] * (len(depths) - neighborhood)
    model = {
        "input_channels": 3,
        "input_size": size,
        "patch_size": 4,
        "depths": depths,
        "widths": widths,
        "self_attns": [{"type": kind, "d_head": 64} for kind in kinds],
        "mapping_depth": 2,
        "mapping_width": 256,
    }
    classes = 1000 if size == 256 else 0
    config = runs.tiny_config(model=model, dataset={"num_classes": classes})
    run = dry.dry_run(config, batch_size=1)
    assert run.parameters == pytest.approx(params, rel=1e-3)
    assert run.macs == pytest.approx(macs, rel=1e-3)
    assert [level.backend for level in run.levels] == [
        "tiled" if kind == "neighborhood" else "sdpa" for kind in kinds
    ]
    assert run.activations["off"].kept > 2**30  # what this test must not take


def test_multiply_accumulates_are_half_of_torchs_count(quick, monkeypatch):
    monkeypatch.setenv(attention.ENV_VAR, "global=reference")  # whose products torch can see
    both = [{"type": "global", "d_head": 8}] * 2
    config = runs.tiny_config(model={"self_attns": both})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(config, K.config.make_model(config))
    assert dry.dry_run(config, batch_size=3).macs == counter.get_total_flops() / 2


# ------------------------------------------------------------------------- memory


def saved_bytes(inner, loss):
    """What autograd saves of the storages that aren't the model's."""
    own = {x.untyped_storage().data_ptr() for x in [*inner.parameters(), *inner.buffers()]}
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss()
    return sum(x.untyped_storage().nbytes() for key, x in saved.items() if key not in own)


def most_bytes(step):
    """The most memory that torch's allocator held beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    events = prof.profiler.kineto_results.events()
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("model", "tolerance"),
    [({}, 0.05), (WINDOWS, 0.05), (V1, 0.05), (UNET, 0.15)],
    ids=["neighborhood", "windows", "v1", "unet"],
)
@pytest.mark.parametrize("mode", ["off", "full", "selective"])
def test_memory_is_what_a_real_step_takes(model, mode, tolerance, monkeypatch):
    """In the U-Net, convolutions on the CPU take memory of their own."""
    how = footprint.CHECKPOINTING[mode]
    monkeypatch.setattr(footprint, "CHECKPOINTING", {mode: how})  # the others take time
    config = runs.tiny_config(model=model)
    estimate = dry.dry_run(config, batch_size=32).activations[mode]
    inner = K.config.make_model(config)

    def loss():
        with K.models.checkpointing(**how):
            return forward(config, inner, 32)

    loss().backward()  # from now on there are gradients, as in every step but the first batch
    assert estimate.most == pytest.approx(most_bytes(lambda: loss().backward()), rel=tolerance)
    if mode != "selective":  # which keeps tensors beside autograd's
        h, w = config["model"]["input_size"]
        images = 32 * config["model"]["input_channels"] * h * w * 4
        assert estimate.kept == pytest.approx(saved_bytes(inner, loss) + images, rel=0.01)


def test_memory_in_mixed_precision(quick):
    config = runs.tiny_config()
    estimate = dry.dry_run(config, mixed_precision="bf16", batch_size=32).activations["off"]
    inner = footprint._Autocast(K.config.make_model(config), CPU, torch.bfloat16)
    assert estimate.kept == pytest.approx(
        saved_bytes(inner, lambda: forward(config, inner, 32)), 0.02
    )


def test_what_checkpointing_buys():
    modes = dry.dry_run(runs.tiny_config()).activations
    assert modes["full"].kept < modes["selective"].kept < modes["off"].kept / 2
    assert modes["full"].kept < modes["full"].most < modes["off"].most


@pytest.mark.slow
def test_a_large_batch_on_the_cpu_is_scaled_up(monkeypatch):
    config = runs.tiny_config()
    exact = dry.dry_run(config, batch_size=64)
    monkeypatch.setattr(footprint, "_MOST_TOKENS", 16 * 8)  # half of these 64 images
    scaled = dry.dry_run(config, batch_size=64)
    assert scaled.macs == exact.macs
    a, b = scaled.activations["full"], exact.activations["full"]
    assert a != b
    assert a.kept == pytest.approx(b.kept, rel=0.05)
    assert a.most == pytest.approx(b.most, rel=0.1)


@pytest.mark.parametrize(
    "optimizer",
    [{"type": "adamw"}, {"type": "sgd"}, {"type": "sgd", "momentum": 0.9}],
    ids=["adamw", "sgd", "momentum"],
)
def test_bytes_of_an_optimizers_state(optimizer):
    config = runs.tiny_config(optimizer=optimizer)
    inner = K.config.make_model(config)
    opt = optim.make_optimizer(config, inner)
    forward(config, inner).backward()
    opt.step()
    values = [x for state in opt.state.values() for x in state.values()]
    taken = sum(x.numel() * 4 for x in values if isinstance(x, torch.Tensor) and x.ndim)
    per_parameter = dry.OPTIMIZER_STATE[optimizer["type"]](config["optimizer"])
    assert per_parameter * sum(p.numel() for p in inner.parameters()) == taken


def test_every_optimizer_has_a_size():
    assert dry.OPTIMIZER_STATE.keys() == optim.OPTIMIZERS.keys()


# ------------------------------------------------------------------------- backends


def test_a_kernel_keeps_what_fused_attention_keeps(quick, monkeypatch):
    """Whatever its geometry: so both levels take what global attention takes."""

    def fails(q, k, v, geometry):
        raise AssertionError("ran")

    monkeypatch.setitem(attention.BACKENDS["neighborhood"], "new", attention.Backend(fails))
    monkeypatch.setenv(attention.ENV_VAR, "neighborhood=new")
    run = dry.dry_run(runs.tiny_config())
    assert [level.backend for level in run.levels] == ["new", "sdpa"]
    assert "new is taken to keep what torch's fused attention does" in str(run)
    assert attention.BACKENDS["neighborhood"]["new"].run is fails
    both = [{"type": "global", "d_head": 8}, {"type": "global", "d_head": 16}]
    other = dry.dry_run(runs.tiny_config(model={"self_attns": both}))
    for a, b in zip(run.activations.values(), other.activations.values()):
        assert (a.kept, a.most) == (b.kept, b.most)
    assert not other.notes


@pytest.mark.slow
def test_levels_of_the_other_models(quick):
    run = dry.dry_run(runs.tiny_config(model=V1), batch_size=2)
    assert run.levels == [
        levels.Level(8, 6, 64, "2", 1, (attention.GlobalAttentionSpec(64),), "global", "sdpa")
    ]
    run = dry.dry_run(runs.tiny_config(model={**UNET, "skip_stages": 1}), batch_size=2)
    assert [(x.h, x.w, x.attention, x.backend) for x in run.levels] == [(8, 12, "global", "sdpa")]
    run = dry.dry_run(runs.tiny_config(model=WINDOWS), batch_size=2)
    assert [x.attention for x in run.levels] == ["windows 4 x 4", "none"]
    assert [g.shift for g in run.levels[0].geometries] == [0, 2]


def test_of_several_sizes_the_largest_counts(quick):
    data = {"type": "imagefolder", "location": "x"}
    buckets = {"buckets": [[8, 8], [8, 16], [16, 4]]}
    run = dry.dry_run(runs.tiny_config(dataset=data | buckets), batch_size=2)
    assert run.notes == ["all of it with images of the largest bucket, 8 x 16"]
    want = dry.dry_run(runs.tiny_config(dataset=data, model={"input_size": [8, 16]}), batch_size=2)
    assert (run.macs, run.activations, run.levels) == (want.macs, want.activations, want.levels)


def test_a_device_without_fake_tensors_is_estimated_as_the_cpu(quick, monkeypatch):
    estimate = dry.estimate_steps

    def on_cpu_alone(config, device, *args):
        if device.type != "cpu":
            raise NotImplementedError("no such operator\nand so on")
        return estimate(config, device, *args)

    monkeypatch.setattr(dry, "estimate_steps", on_cpu_alone)
    config = runs.tiny_config()
    run = dry.dry_run(config, device="mps")
    assert run.activations == dry.dry_run(config).activations
    assert run.notes == ["as on the CPU: mps can't be estimated (no such operator)"]


def test_shards(quick):
    """A part of each state, and the blocks that are whole at once."""
    config = runs.tiny_config()
    whole = dry.dry_run(config, batch_size=2, averages=2)
    inner = K.config.make_model(config)
    sizes = [4 * sum(p.numel() for p in b.parameters()) for b in inner.modules() if is_block(b)]
    rest = 4 * whole.parameters - sum(sizes)
    for way, weights in ("again", 2 * max(sizes)), ("keep", sum(sizes)):
        run = dry.dry_run(config, batch_size=2, processes=3, averages=2, fsdp=way)
        *parts, gathered = run.states.values()
        assert parts == [-(-n // 3) for n in whole.states.values()]
        assert gathered == 2 * rest + weights + 2 * max(sizes)
        assert run.activations == whole.activations
        assert "1/3 of averaged weights" in str(run)


def is_block(module):
    return type(module).__name__ == "TransformerBlock"


# ------------------------------------------------------------------------- no traces


def test_training_in_the_same_process_is_the_same_afterwards(quick, monkeypatch):
    config = runs.tiny_config(model={"input_size": [56, 40]})  # plans that no other test made
    config["model"]["self_attns"][0]["kernel_size"] = 5
    state = torch.get_rng_state()
    dry.dry_run(config, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    inner = K.config.make_model(config)
    for p in inner.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1)
    found = []
    for setting in "", "neighborhood=reference":
        monkeypatch.setenv(attention.ENV_VAR, setting)
        torch.manual_seed(1)
        loss = forward(config, inner, 2)
        found.append(torch.autograd.grad(loss, list(inner.parameters()), allow_unused=True))
    for a, b in zip(*found):
        assert type(a) is type(b)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    config = copy.deepcopy(runs.TINY)
    config["dataset"] = {"type": "imagefolder", "location": "not/yet/there"}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    (tmp_path / "model_state.json").write_text("no checkpoint")
    return tmp_path


@pytest.fixture
def call(folder, monkeypatch, quick):
    def refuse(*args):
        raise AssertionError("opened a port")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)

    def call(*args):
        args = "--config", "tiny.json", "--dry-run", *args
        runs.call("train", *args, folder=folder, monkeypatch=monkeypatch)

    return call


def test_it_needs_no_data_and_leaves_nothing(call, folder, capsys):
    before = {p: p.read_bytes() for p in folder.iterdir()}
    call("--lr", 0.5, "--name", "new/run", "--batch-size", 4, "--grad-accum-steps", 3)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    said = capsys.readouterr()
    assert json.loads(said.out)["optimizer"]["lr"] == 0.5
    assert "4 images x 3 batches x 1 processes" in said.err
    assert "of 12 images" in said.err
    from accelerate.state import PartialState

    assert not PartialState._shared_state


def test_of_several_processes_one_prints(call, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    call()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    call("--batch-size", 4)
    assert "4 images x 1 batches x 2 processes" in capsys.readouterr().err
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--set", "model.input_size=10"), "input_size"),
        (("--set", "model.input_size=4"), "kernel_size 3 is larger than the 2 x 2 tokens"),
        (("--set", "model.widhts=1"), "did you mean 'widths'"),
    ],
)
def test_bad_configs_end_in_a_sentence(call, args, message):
    with pytest.raises(SystemExit, match=message):
        call(*args)


def test_bad_combinations_end_in_a_sentence(call, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(SystemExit, match="fp16 needs a GPU"):
        call("--mixed-precision", "fp16")
    with pytest.raises(SystemExit) as leaving:
        call("--fsdp")
    assert leaving.value.code == 2
    assert "say how many there will be, as in `WORLD_SIZE=8" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf15")
    with pytest.raises(
        SystemExit, match="unknown --mixed-precision 'bf15' .*; there are no, fp16, bf16, fp8"
    ):
        call()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv(attention.ENV_VAR, "global=flash2")
    with pytest.raises(SystemExit, match="global=flash2, which can't run here"):
        call()
    with pytest.raises(ValueError, match="unknown --checkpointing 'some'; there are off"):
        dry.dry_run(runs.tiny_config(), checkpointing="some")


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.5 KiB"), (557.4e6 * 4, "2.08 GiB")],
)
def test_sizes(n, text):
    assert dry.size(n) == text


def test_counts():
    assert dry.count(197.6e9) == "198 GMAC"
    assert dry.count(1.5e12) == "1.5 TMAC"
