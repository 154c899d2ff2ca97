"""Training split over two processes, against the same training in one."""

import copy
import errno
import json
import os
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import runs
import torch
from test_step import fix_noise, images, one_accelerator  # noqa: F401
from torch.distributed.checkpoint import FileSystemWriter

import k_diffusion as K
from k_diffusion import checkpoints, distributed, generation, models
from k_diffusion.checkpoints import sharded
from k_diffusion.common.files import DiskFullError
from k_diffusion.common.options import UsageError
from k_diffusion.common.shards import gather_to_host, join_like, local, whole
from k_diffusion.common.tensors import map_tensors, nbytes
from k_diffusion.training import optim, power_ema, sharding, step
from k_diffusion.training.state import TrainState

SECTIONS = {
    "model": {"depths": [1, 2]},
    "dataset": {"cond_dropout_rate": 0.0},
    "optimizer": {"max_grad_norm": 0.3},
}
FLAGS = {"fsdp": "again", "gns": False, "compile": None}
TRAIN = (
    *("--config", "tiny.json", "--seed", 1, "--name", "a", "--num-workers", 0),
    *("--power-ema", 0.1, "--set", "dataset.cond_dropout_rate=0.0", "--sample-n", 3),
)


class Run:
    """A tiny run; its steps are of 8 images, however many processes share them."""

    def __init__(self, split=False, compiled=False, **options):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()
        config = runs.tiny_config(**SECTIONS)
        plugin = sharding.make_plugin(SimpleNamespace(**FLAGS), config) if split else None
        self.accelerator = distributed.make_accelerator(cpu=True, fsdp_plugin=plugin, **options)
        torch.manual_seed(0)
        model = K.config.make_model(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        opt = optim.make_optimizer(config, model)
        place = partial(sharding.place, self.accelerator)
        self.inner = model
        self.state = TrainState(
            config=config,
            model=model,
            model_ema=place(copy.deepcopy(model).eval().requires_grad_(False)),
            opt=opt,
            sched=optim.make_lr_sched(config, opt),
            ema_sched=optim.make_ema_sched(config),
            seed=4,
            dataset_length=100,
            power_ema=power_ema.PowerEMA(model, [0.1], place=place),
        )
        if compiled:
            models.compile_model(model, "block", backend="aot_eager")
        prepared, self.opt = sharding.prepare(self.accelerator, model, opt)
        wrap = K.config.make_denoiser_wrapper(config)
        self.denoiser, self.denoiser_ema = wrap(prepared), wrap(self.state.model_ema)

    def train(self, accumulate=1, **options):
        """The loss, the norm and the clipped gradient of a step."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        n = 8 // processes // accumulate
        starts = [(8 // processes) * process + n * i for i in range(accumulate)]
        batches = iter([images(n, start) for start in starts])
        density = K.config.make_sample_density(self.state.config["model"])
        rest = self.opt, self.state, batches, density
        loss, norm = step.train_step(
            self.accelerator, self.denoiser, *rest, accumulate=accumulate, **options
        )
        params = [p for group in self.opt.param_groups for p in group["params"]]
        gradient = [whole(join_like(p.grad, p)) for p in params]
        return self.accelerator.reduce(loss, reduction="mean"), norm, gradient

    def saved(self):
        state = gather_to_host(self.state.state_dict(), self.accelerator.is_main_process)
        return {k: state[k] for k in ("model", "model_ema", "opt", "power_ema")}

    def sample(self, n, stop=lambda: False):
        return generation.sample_share(
            self.accelerator, self.denoiser_ema, self.state.config, range(n), batch_size=2,
            stop=stop,
        )  # fmt: skip


def steps(run):
    return [run.train(), run.train(accumulate=2, checkpointing="full")]


def full_disk(rank, state, path):
    """What comes of writing shards where the disk of process 1 is full."""

    def write_data(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(FileSystemWriter, "write_data", write_data)
        try:
            return sharded.write_shards(path, state, sharding.make_host_mesh().get_group())
        except DiskFullError as error:
            return str(error)


def in_each_process(rank, folder):
    generation.STEPS = 2
    fix_noise(setattr)
    found = {}
    run = Run(split=True)
    found["steps"], found["saved"] = steps(run), run.saved()
    average, power = run.state.model_ema, run.state.power_ema.profiles[0.1].model
    moments = [x for state in run.state.opt.state.values() for x in (state["exp_avg"],)]
    weights = [list(m.parameters()) for m in (run.inner, average, power)]
    found["numbers"] = [sum(local(x).numel() for x in part) for part in (*weights, moments)]
    found["images"] = [run.sample(n) for n in (5, 1)]
    try:
        run.sample(3, stop=lambda: rank == 1)
    except generation.SamplingStopped:
        found["stopped"] = True
    run.state.reset_ema()
    weights = [map(local, m.parameters()) for m in (run.inner, average, power)]
    found["reset"] = [torch.equal(a, b) for a, b, _ in zip(*weights)]
    found["bf16"] = Run(split=True, mixed_precision="bf16").train()
    found["full"] = full_disk(rank, run.state.state_dict(), folder / "is_full_00000002.pth")
    torch.save(found, folder / f"{rank}.pt")
    with pytest.MonkeyPatch.context() as patch:
        # the end of a run, after which processes can't meet again at this port
        patch.setattr(torch.distributed, "destroy_process_group", lambda *group: None)

        def train(name, end, *options):
            options = "--batch-size", 4, "--fsdp", "--save-every", 1, "--end-step", end, *options
            runs.call("train", *TRAIN, *options, folder=folder / name, monkeypatch=patch)

        train("two", 4, "--demo-every", 3)
        for end in 3, 4, 4:
            train("shards", end, "--save-sharded", "--demo-every", 100)
            if rank == 0 and end == 4:  # of what process 1 alone reads: both go back to step 3
                file = folder / "shards" / "a_00000004.dcp" / "__1_0.distcp"
                file.exists() and os.truncate(file, 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where train.py ran for three steps in one process, then from the second one on in two.

    These took two steps, and saved whole checkpoints, and in "shards" each its shards, where they
    resumed from such a checkpoint.
    """
    folder = tmp_path_factory.mktemp("sharding")
    section = {"optimizer": {"type": "muon", "lr": 2e-3}}
    for name in "one", "two", "shards":
        (folder / name).mkdir()
        (folder / name / "tiny.json").write_text(json.dumps(runs.TINY | section))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "STEPS", 2)
        fix_noise(patch.setattr)
        options = "--batch-size", 8, "--end-step", 3, "--save-every", 2, "--demo-every", 10
        runs.call("train", *TRAIN, *options, folder=folder / "one", monkeypatch=patch)
    for name in "two", "shards":
        shutil.copy(folder / "one" / "a_00000002.pth", folder / name)
        (folder / name / "a_state.json").write_text('{"latest_checkpoint": "a_00000002.pth"}')
    runs.in_two_processes(in_each_process, folder)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture
def one(monkeypatch):
    monkeypatch.setattr(generation, "STEPS", 2)
    fix_noise(monkeypatch.setattr)
    return Run()


def close(found, want, rtol=1e-4, atol=1e-6):
    """Nests of the same kind, whose tensors are nearly the same."""
    parts = [], []
    plain = [
        map_tensors(lambda x, part=part: part.append(x) or tuple(x.shape), nest)
        for part, nest in zip(parts, (found, want))
    ]
    assert runs.differences(*plain) == []
    torch.testing.assert_close(*parts, rtol=rtol, atol=atol)


def test_two_processes_take_the_steps_of_one(one, two):
    """Their losses, norms, gradients, weights, averages and the optimizer's state."""
    want = steps(one)
    for found in two:
        close(found["steps"], want)
    close(two[0]["saved"], one.saved())


def compiled_in_each_process(rank, folder):
    fix_noise(setattr)
    found = Run(split=True, compiled=True).train(accumulate=2, checkpointing="full")
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
def test_compiled_blocks_take_the_step_of_one_process(one, tmp_path):
    """They are recomputed in the backward pass: compiled within checkpoints, split around both."""
    runs.in_two_processes(compiled_in_each_process, tmp_path)
    want = one.train(accumulate=2, checkpointing="full")
    for rank in range(2):
        close(torch.load(tmp_path / f"{rank}.pt"), want)


def test_each_process_has_its_part_alone(two):
    total = sum(p.numel() for p in K.config.make_model(runs.tiny_config(**SECTIONS)).parameters())
    for numbers in zip(*(found["numbers"] for found in two)):
        assert sum(numbers) == total
        assert max(numbers) < 0.51 * total
    assert runs.differences(two[1]["saved"], map_tensors(lambda x: None, two[0]["saved"])) == []


def test_averages_become_the_weights(two):
    for found in two:
        assert found["reset"]
        assert all(found["reset"])


def test_processes_sample_together_whatever_their_shares(one, two):
    """Of 5 images in batches of 2, and of a single one; and stop together."""
    one.train(), one.train(accumulate=2)
    close(two[0]["images"], [one.sample(n) for n in (5, 1)], atol=1e-4)
    assert two[1]["images"] == [None, None]
    assert [found["stopped"] for found in two] == [True, True]


def test_in_bfloat16_the_numbers_are_those_of_a_whole_model(one, two):
    want = Run(mixed_precision="bf16").train()
    for found in two:
        close(found["bf16"], want, rtol=2e-2, atol=1e-3)
    assert two[0]["bf16"][0].item() == pytest.approx(want[0].item(), rel=1e-4)
    assert two[0]["bf16"][0].item() != pytest.approx(one.train()[0].item(), rel=1e-6)


def test_a_run_goes_on_on_another_number_of_processes(folder):
    """Whose checkpoint is the one that the run in one process wrote, with Muon."""
    one, two = (runs.read(folder / name / "a_00000003.pth") for name in ("one", "two"))
    for state in one, two:
        del state["elapsed"], state["run"]
    losses = [state.pop("losses") for state in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    close(two, one, rtol=1e-3, atol=1e-5)
    assert (folder / "two" / "a_demo_00000003.png").is_file()


def test_shards_hold_the_state_that_a_whole_checkpoint_has(folder):
    """Bit by bit, also a step after it was resumed from."""
    for at in 3, 4:
        paths = [folder / name / f"a_{at:08}.pth" for name in ("two", "shards")]
        whole, shards = map(checkpoints.read_checkpoint, paths)
        assert whole.pop("elapsed") != shards.pop("elapsed")
        # the latter left the averages of a damaged checkpoint behind
        assert [since for _, since in shards.pop("branch")] == ([0] if at == 3 else [0, 3])
        assert whole.pop("branch") == [("", 0)]
        assert runs.differences(whole, shards) == []
        averages = [path.with_name(f"a_{at:08}_ema0.1.safetensors") for path in paths]
        assert runs.differences(*map(checkpoints.read_weights, averages)) == []


def test_shards_are_exported_for_inference(folder, monkeypatch):
    whole = runs.read(folder / "two" / "a_00000004.pth")["model_ema"]
    loaded = K.load(folder / "shards" / "a")  # the run's latest
    assert runs.differences(dict(loaded.inner_model.state_dict()), dict(whole)) == []
    options = "a_00000003.pth", "--dtype", "fp32", "-o", "exported.safetensors"
    runs.call("convert_for_inference", *options, folder=folder / "shards", monkeypatch=monkeypatch)
    whole = runs.read(folder / "two" / "a_00000003.pth")["model_ema"]
    exported = checkpoints.read_weights(folder / "shards" / "exported.safetensors")
    assert runs.differences(exported, dict(whole)) == []


def test_each_process_writes_its_part(folder):
    path = folder / "shards" / "a_00000004.pth"
    total = nbytes(checkpoints.read_checkpoint(path))
    names = sorted(p.name for p in path.parent.glob("*.dcp"))
    assert names == ["a_00000003.dcp", "a_00000004.2.dcp"]  # saved again, once it was damaged
    sizes = [p.stat().st_size for p in (path.parent / names[1]).glob("__?_0.distcp")]
    assert len(sizes) == 2
    assert nbytes(runs.read(path)["shards"]) == 0
    weights = [x for x in runs.read(path)["model"].values() if not x.is_meta]
    assert nbytes(weights) < 0.01 * total  # buffers alone
    # a tensor's frame takes about a thousand bytes, which counts in a model as tiny as this
    assert max(sizes) < 0.55 * sum(sizes)


def test_where_one_disk_is_full_the_first_process_says_so(folder, two):
    assert "is_full_00000002.dcp: No space left on device; make space" in two[0]["full"]
    assert two[1]["full"] is None
    assert not list(folder.glob("*is_full*"))


def test_one_process_goes_on_from_shards(folder, tmp_path, monkeypatch):
    for name in "a_00000003.pth", "tiny.json":
        shutil.copy(folder / "shards" / name, tmp_path)
    shutil.copytree(folder / "shards" / "a_00000003.dcp", tmp_path / "a_00000003.dcp")
    monkeypatch.setattr(generation, "STEPS", 2)
    fix_noise(monkeypatch.setattr)
    options = "--batch-size", 8, "--end-step", 4, "--demo-every", 100, "--keep", 1
    runs.call("train", *TRAIN, *options, folder=tmp_path, monkeypatch=monkeypatch)
    one, two = (runs.read(f / "a_00000004.pth") for f in (tmp_path, folder / "two"))
    for state in one, two:
        del state["elapsed"], state["run"]
    losses = [state.pop("losses") for state in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    close(one["model_ema"], two["model_ema"], rtol=1e-3, atol=1e-4)
    assert not list(tmp_path.glob("a_00000003*"))  # as --keep 1 says


def config(**sections):
    return runs.tiny_config(**sections)


@pytest.mark.parametrize(
    ("flags", "sections", "message"),
    [
        ({"gns": True}, {}, "--gns compares .*; leave one of them out"),
        ({"compile": "model"}, {}, "pass --compile block"),
        ({}, {"optimizer": {"type": "adam8bit"}}, "choose adamw, sgd or muon"),
    ],
)
def test_what_does_not_go_together(flags, sections, message):
    with pytest.raises(UsageError, match=message):
        sharding.make_plugin(SimpleNamespace(**FLAGS | flags), config(**sections))


def test_what_accelerate_was_told(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="pass --fsdp, and choose no FSDP"):
        sharding.make_plugin(SimpleNamespace(**FLAGS | {"fsdp": None}), config())
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert sharding.make_plugin(SimpleNamespace(**FLAGS | {"fsdp": None}), config()) is None
    for keep in "again", "keep":
        plugin = sharding.make_plugin(SimpleNamespace(**FLAGS | {"fsdp": keep}), config())
        assert plugin.reshard_after_forward == (keep == "again")


def test_what_an_accelerator_can_not_split():
    process = SimpleNamespace(num_processes=1, device="cpu", is_fsdp2=False)
    with pytest.raises(UsageError, match="over processes, and there is 1 on cpu; start several"):
        sharding.check(process)
    for precision in "fp16", "fp8":
        process = SimpleNamespace(is_fsdp2=True, mixed_precision=precision)
        with pytest.raises(UsageError, match="pass --mixed-precision bf16"):
            sharding.check(process)
