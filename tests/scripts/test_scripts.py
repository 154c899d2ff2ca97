"""The root scripts, as a person runs them; for what needs no process of its own, in this one."""

import json
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import psutil
import pytest
import runs
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion import checkpoints
from k_diffusion.training import log, run_files

FAST = "--seed", 1, "--batch-size", 6, "--sample-n", 11, "--num-workers", 0, "--log-every", 2

CUSTOM = """
import torch
from PIL import Image

class Greys(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return self.transform(Image.linear_gradient("L").resize((8, 8)).rotate(9 * i)), i % 10

def get_dataset(config, transform):
    return Greys(transform)
"""


TWO_RUNS = f"""
import sys
sys.path[:0] = [{str(runs.ROOT)!r}, {str(runs.ROOT / "tests")!r}]
import pytest, runs
with pytest.MonkeyPatch.context() as patch:
    patch.setattr("k_diffusion.generation.STEPS", 2)
    for name in "a", "whole":
        runs.call("train", *sys.argv[1:], "--name", name, folder=".", monkeypatch=patch)
"""


def write_config(folder, name="tiny.json", **dataset):
    config = {**runs.TINY, "dataset": {**runs.TINY["dataset"], **dataset}}
    (folder / name).write_text(json.dumps(config))
    return folder / name


@pytest.fixture
def folder(tmp_path):
    write_config(tmp_path)
    return tmp_path


@pytest.fixture
def call(folder, monkeypatch):
    """Runs a script in this process."""
    monkeypatch.setattr("k_diffusion.generation.STEPS", 2)

    def call(script, *args):
        runs.call(script, *args, folder=folder, monkeypatch=monkeypatch)

    return call


def tiny(*args):
    return "--config", "tiny.json", *FAST, *args


# ------------------------------------------------------------------------- one run, from end to end


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder)
    args = "--name", "runs/a", "--end-step", 7, "--demo-every", 4, "--save-every", 3
    trackers = ("--tensorboard", "tb") if module_there("tensorboard") else ()
    code, text = runs.run(*runs.python("train", *tiny(*args, *trackers)), folder=folder)
    assert code == 0, text
    (folder / "output.txt").write_text(text)
    return folder


def module_there(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_what_a_run_writes(trained):
    names = {p.name for p in (trained / "runs").iterdir()}
    steps = {f"a_{step:08}.pth" for step in (3, 6, 7)}
    grids = {f"a_demo_{step:08}.png" for step in (4, 7)}
    assert names == steps | grids | {"a_state.json", "a_metrics.csv", "a_loss.png"}
    state = json.loads((trained / "runs/a_state.json").read_text())
    assert state == {"latest_checkpoint": "runs/a_00000007.pth"}
    rows = log.read_rows(trained / "runs/a_metrics.csv")
    assert [row["step"] for row in rows] == ["2", "4", "6", "7"]
    assert all(0 < float(row["loss"]) < 10 for row in rows)
    # eleven images of 8 x 8 enlarged to 48 x 48
    assert Image.open(trained / "runs/a_demo_00000007.png").size == (3 * 50 + 2, 4 * 50 + 2)
    last = runs.read(trained / "runs/a_00000007.pth")
    assert (last["step"], last["samples"], last["epoch"], last["seed"]) == (7, 42, 0, 1)
    assert last["config"] == runs.tiny_config()


def test_what_a_run_says_without_a_terminal(trained):
    text = (trained / "output.txt").read_text()
    assert "1,797 images, 10 classes" in text
    assert "1 process(es) on cpu, 6 images per step, precision no, seed 1" in text
    for line in (
        "step 1, epoch 0",
        "saved runs/a_00000003.pth",
        "wrote runs/a_demo_00000004.png",
    ):
        assert line in text
    line = (
        r"^step 7, epoch 0, \d+ s, [\d.]+ images/s \(\d+% waiting for data\), 00:\d\d left: loss "
    )
    assert re.search(line, text, re.M)
    assert len(re.findall(r"^step \d", text, re.M)) == 2  # the first, and the last
    assert "\r" not in text
    assert "Traceback" not in text


@pytest.mark.skipif(not module_there("tensorboard"), reason="TensorBoard is not installed")
def test_tensorboard_gets_numbers_and_pictures(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = (trained / "tb").rglob("*")  # one file, in the folder itself
    events = EventAccumulator(str(path.parent)).Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    found |= {tag: events.Images(tag) for tag in events.Tags()["images"]}
    rows = log.read_rows(trained / "runs/a_metrics.csv")
    assert [event.step for event in found["loss"]] == [2, 4, 6, 7]
    assert [event.value for event in found["loss"]] == pytest.approx(
        [float(row["loss"]) for row in rows]
    )
    assert [event.step for event in found["demo_grid"]] == [4, 7]
    (text,) = events.Tensors("config/text_summary")[0].tensor_proto.string_val
    told = json.loads(text.decode().removeprefix("```json\n").removesuffix("\n```"))
    assert told["config"] == runs.tiny_config()
    assert (told["seed"], told["batch_size"], told["config_file"]) == (1, 6, "tiny.json")


def test_conversion_and_sampling(trained, tmp_path):
    source = trained / "runs/a_00000007.pth"
    path = tmp_path / "new/a.safetensors"
    code, text = runs.run(
        *runs.python("convert_for_inference", source, "-o", path, "--dtype", "fp32"),
        folder=tmp_path,
    )
    assert code == 0, text
    averaged = runs.read(source)["model_ema"]
    assert runs.differences(checkpoints.read_weights(path), dict(averaged)) == []
    assert K.config.load_config(path) == runs.tiny_config()
    args = "--checkpoint", path, "-n", 60, "--seed", 0, "--steps", 3, "--grid", "grids/g.png"
    code, text = runs.run(*runs.python("sample", *args), folder=tmp_path)
    assert code == 0, text
    assert "3/3" in text  # the progress bar
    assert "wrote grids/g.png" in text
    # a column for each of ten classes
    assert Image.open(tmp_path / "grids/g.png").size == (10 * 50 + 2, 6 * 50 + 2)


def test_the_config_of_a_checkpoint_is_printed(trained, tmp_path):
    for name in "a_00000007.pth", "gone.pth":
        command = sys.executable, "-m", "k_diffusion.config", trained / "runs" / name
        code, text = runs.run(*command, folder=tmp_path)
        if name == "gone.pth":
            assert code == 1
            assert "error: no checkpoint" in text
            assert "Traceback" not in text
        else:
            assert code == 0, text
            assert json.loads(text) == runs.tiny_config()


def test_conversion_to_half_precision_beside_the_checkpoint(trained, call, folder, capsys):
    shutil.copy(trained / "runs/a_00000007.pth", folder / "a.pth")
    call("convert_for_inference", "a.pth")
    weights = checkpoints.read_weights(folder / "a.safetensors")
    assert torch.float16 in {w.dtype for w in weights.values()}
    call("sample", "--checkpoint", "a.safetensors", "-n", 2, "--steps", 2, "--dtype", "bf16")
    assert sorted(p.name for p in folder.glob("out*")) == ["out_00000.png", "out_00001.png"]
    with pytest.raises(SystemExit, match="2"):
        call("convert_for_inference", "a.pth", "-o", "./a.pth")
    assert "is the training checkpoint itself" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="can't make the folder"):
        call("convert_for_inference", "a.pth", "-o", "a.safetensors/x/b.safetensors")


def pixels(folder, prefix, n):
    return np.stack([np.asarray(Image.open(folder / f"{prefix}_{i:05}.png")) for i in range(n)])


@pytest.mark.slow
def test_an_image_is_the_same_in_any_batch_and_on_any_process(trained, call, folder):
    path = trained / "runs/a_00000007.pth"
    args = "--checkpoint", path, "-n", 9, "--seed", 5, "--steps", 4, "--sampler", "dpmpp_sde"
    call("sample", *args, "--prefix", "new/one", "--batch-size", 1)
    one = pixels(folder, "new/one", 9)
    assert len(np.unique(one, axis=0)) == 9
    for size in 3, 8:
        call("sample", *args, "--prefix", f"new/{size}", "--batch-size", size)
        assert np.abs(pixels(folder, f"new/{size}", 9).astype(int) - one).max() <= 1
    more = "--prefix", "new/two", "--device", "cpu"
    code, text = runs.run_two("sample", *args, *more, folder=folder)
    assert code == 0, text
    assert text.count("wrote new/two_00000.png") == 1
    assert np.abs(pixels(folder, "new/two", 9).astype(int) - one).max() <= 1


def test_classes_guidance_and_sizes(trained, call, folder, capsys):
    state = runs.read(trained / "runs/a_00000007.pth")
    torch.manual_seed(0)  # so short a training has taught it little of classes
    for weight in state["model_ema"].values():
        weight.add_(0.2 * torch.randn_like(weight))
    torch.save(state, folder / "a.pth")
    args = "--checkpoint", "a.pth", "--seed", 5, "--steps", 2, "-n", 3
    call("sample", *args, "--class", 3, 4, 5, "--prefix", "some")
    call("sample", *args, "--prefix", "all")
    call("sample", *args, "--class", 3, 4, 5, "--cfg-scale", 5, "--prefix", "guided")
    some, of_all, guided = (pixels(folder, p, 3) for p in ("some", "all", "guided"))
    assert not np.array_equal(some, of_all)
    assert not np.array_equal(some, guided)
    call("sample", *args, "--size", "12x16", "--prefix", "size")
    assert pixels(folder, "size", 3).shape == (3, 12, 16)
    assert "was trained on 8 x 8; other sizes can look worse" in capsys.readouterr().out
    call("sample", *args, "--size", 8, "--grid", "g.png")
    assert "was trained on" not in capsys.readouterr().out
    call("sample", *args, "--grid", "labels.png", "--grid-labels")
    heights = [Image.open(folder / name).height for name in ("g.png", "labels.png")]
    assert heights[1] - heights[0] >= 2 * 12  # two rows, each with a line of text
    for wrong, message in (
        (("--class", 10), "class 10 is out of range; classes are 0 to 9"),
        (("--class", "cat"), "a class is a number or 'all'"),
        (("--size", "10x16"), r"\[10, 16\] does not divide by \[4, 4\]"),
        (("--grid-labels",), "pass --grid FILE, too"),
        (("--device", "cuda:99"), "--device cuda:99: .* no such device; there are cpu"),
        (("--device", "gpu"), "--device gpu: .* no such device"),
        (("--sampler", "eular"), "did you mean 'euler'"),
        (("--schedule", "carras"), "did you mean 'karras'"),
        (("--prefix", "tiny.json/x"), "can't make the folder"),
    ):
        with pytest.raises(SystemExit) as leaving:
            call("sample", *args, *wrong)
        assert re.search(message, f"{leaving.value.code} {capsys.readouterr().err}")


# ------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_train_and_one_goes_on(call, folder, capsys):
    args = tiny("--name", "two", "--batch-size", 3)
    code, text = runs.run_two("train", *args, "--end-step", 4, folder=folder)
    assert code == 0, text
    assert "2 process(es) on cpu" in text
    assert text.count("saved two_00000004.pth") == 1
    lines = [line for line in text.splitlines() if line]
    assert len(set(lines)) == len(lines)  # the first process speaks for both
    state = runs.read(folder / "two_00000004.pth")
    assert (state["step"], state["samples"]) == (4, 24)
    call("train", *args, "--end-step", 5)
    assert "resumed from two_00000004.pth at step 4" in capsys.readouterr().out
    assert runs.read(folder / "two_00000005.pth")["samples"] == 27


# ------------------------------------------------------------------------- ends before the end


def wait_for(process, sign, timeout=90):
    """Reads a program's output until a line has `sign`."""
    lines, end = [], time.monotonic() + timeout
    while time.monotonic() < end and (line := process.stdout.readline()):
        lines.append(line)
        if sign in line:
            return
    raise AssertionError("".join(lines))


@pytest.mark.slow
def test_sigterm_to_all_with_workers_saves_and_leaves_nobody(folder):
    (folder / "mine.py").write_text(CUSTOM)
    write_config(folder, "mine.json", type="custom", location="mine.py")
    args = "--config", "mine.json", *FAST, "--set", "model.augment_prob=0.5", "--log-every", 1
    workers = "--num-workers", 2, "--start-method", "spawn"
    command = runs.python("train", *args, "--name", "a", "--end-step", 10**6, *workers)
    process = runs.start(*command, folder=folder)
    wait_for(process, "step 1,")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.killpg(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "SIGTERM: saving after this step" in text
    assert "Traceback" not in text
    assert psutil.wait_procs(children, timeout=15)[1] == []
    # and the run goes on as if nothing had been, without workers; the two runs that are compared
    # share a new process, since bits can depend on what a process has done
    (saved,) = folder.glob("a_*.pth")
    end = runs.read(saved)["step"] + 2
    code, text = runs.run(sys.executable, "-c", TWO_RUNS, *args, "--end-step", end, folder=folder)
    assert code == 0, text
    parts, whole = (runs.read(folder / f"{name}_{end:08}.pth") for name in ("a", "whole"))
    del parts["elapsed"], whole["elapsed"]
    assert runs.differences(parts, whole) == []


@pytest.mark.slow
def test_ctrl_c_under_accelerate_saves(folder):
    command = runs.accelerate(2, "train", *tiny("--name", "a", "--end-step", 10**6))
    process = runs.start(*command, folder=folder)
    wait_for(process, "step 1,")
    everyone = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert psutil.wait_procs(everyone, timeout=60)[1] == []
    process.communicate()
    (saved,) = folder.glob("a_*.pth")
    assert run_files.find_checkpoints(str(folder / "a")) == [saved]
    assert runs.read(saved)["step"] >= 1


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_checkpoint(folder):
    """Saving at every step, it is mostly killed while writing."""
    args = tiny("--name", "a", "--end-step", 10**6, "--save-every", 1)
    process = runs.start(*runs.python("train", *args), folder=folder)
    wait_for(process, "saved a_00000003.pth")
    process.kill()
    process.communicate()
    latest, before, *_ = run_files.find_checkpoints(str(folder / "a"))
    for path in latest, before:
        assert f"{checkpoints.read_checkpoint(path)['step']:08}" in path.name


# ------------------------------------------------------------------------- variations


@pytest.mark.parametrize(
    "args",
    [("--mixed-precision", "bf16"), ("--checkpointing",), ("--checkpointing", "selective")],
    ids=" ".join,
)
def test_variations(call, folder, args):
    call("train", *tiny("--name", "a", "--end-step", 3, *args))
    state = runs.read(folder / "a_00000003.pth")
    assert {w.dtype for w in state["model"].values() if w.is_floating_point()} == {torch.float32}
    assert all(w.isfinite().all() for w in state["model_ema"].values())


@pytest.mark.slow
def test_compile_is_asked_for_or_left(call, folder, monkeypatch):
    """The same numbers, under the same names; by a backend that needs no C++ compiler."""
    compiled = []

    def compile_eagerly(self):
        compiled.append(type(self).__name__)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    call("train", *tiny("--name", "a", "--end-step", 2, "--compile"))
    assert compiled == ["ImageTransformerDenoiserModelV2"]
    monkeypatch.setenv("K_DIFFUSION_USE_COMPILE", "0")
    call("train", *tiny("--name", "b", "--end-step", 2, "--compile"))
    assert len(compiled) == 1
    monkeypatch.delenv("K_DIFFUSION_USE_COMPILE")
    call("train", *tiny("--name", "c", "--end-step", 1, "--compile", "block"))
    assert set(compiled[1:]) == {"TransformerBlock"}
    a, b = (runs.read(folder / f"{name}_00000002.pth")["model"] for name in "ab")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], msg=key)


@pytest.mark.slow
@pytest.mark.skipif(not module_there("wandb"), reason="Weights & Biases is not installed")
def test_weights_and_biases_offline(folder):
    args = "--wandb-project", "p", "--wandb-group", "g", "--wandb-save-model", "--end-step", 2
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(folder)}
    code, text = runs.run(*runs.python("train", *tiny(*args)), folder=folder, **env)
    assert code == 0, text
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("args", "module", "extra"),
    [
        (("--tensorboard", "tb"), "tensorboard", "tensorboard"),
        (("--wandb-project", "p"), "wandb", "wandb"),
        ((), "accelerate", "train"),
        ((), "sklearn.datasets", "train"),
        (("--set", 'dataset={"type":"mnist","location":"x"}'), "torchvision.datasets", "datasets"),
        (("--set", 'dataset={"type":"huggingface","location":"x"}'), "datasets", "datasets"),
    ],
)
def test_missing_packages(call, monkeypatch, args, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    name = module.split(".")[0]
    message = rf'needs {name}; install it with: pip install "k-diffusion\[{extra}\]"'
    with pytest.raises((SystemExit, ImportError), match=message):
        call("train", *tiny("--end-step", 2, *args))


def test_a_run_counts_the_classes_of_its_folders(call, folder, capsys):
    for name, count in ("ant", 5), ("bee", 0), ("cat", 7):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(count):
            Image.linear_gradient("L").rotate(30 * i).save(folder / f"images/{name}/{i}.png")
    config = {**runs.TINY, "dataset": {"type": "imagefolder-class", "location": "images"}}
    (folder / "c.json").write_text(json.dumps(config))
    call("train", "--config", "c.json", *FAST, "--end-step", 2, "--name", "c")
    text = capsys.readouterr().out
    assert "12 images, 2 classes\n2 classes, with images: ant 5, cat 7\n" in text
    assert "skipped without images: bee\n" in text
    state = runs.read(folder / "c_00000002.pth")
    assert state["config"]["dataset"]["num_classes"] == 2
    call("sample", "--checkpoint", "c_00000002.pth", "-n", 2, "--steps", 2, "--class", 1)
    with pytest.raises(SystemExit, match="classes are 0 to 1"):
        call("sample", "--checkpoint", "c_00000002.pth", "-n", 2, "--steps", 2, "--class", 2)


def test_the_noise_scale_needs_two_batches(call, capsys):
    with pytest.raises(SystemExit, match="2"):
        call("train", *tiny("--gns"))
    assert re.search("--gns compares .* pass --grad-accum-steps 2", capsys.readouterr().err)


# ------------------------------------------------------------------------- bad input


def test_bad_images_are_skipped_named_and_counted(call, folder, capsys):
    for i in range(12):
        (folder / "images").mkdir(exist_ok=True)
        Image.linear_gradient("L").rotate(30 * i).save(folder / f"images/{i}.png")
    (folder / "images/3.png").write_bytes(b"no image")
    whole = (folder / "images/5.png").read_bytes()
    (folder / "images/5.png").write_bytes(whole[: len(whole) // 2])
    write_config(
        folder, "f.json", type="imagefolder", location=str(folder / "images"), num_classes=0
    )
    args = "--config", "f.json", *FAST, "--end-step", 4
    call("train", *args)
    text = capsys.readouterr().out
    assert "skipped a corrupt image (2 so far)" in text
    assert text.count("images/3.png") == text.count("images/5.png") == 1
    assert (folder / "model_00000004.pth").exists()
    with pytest.raises(SystemExit, match=r"can't read the image .*images/[35].png"):
        call("train", *args, "--strict-data", "--name", "strict")
    with pytest.raises(SystemExit, match=r"has 12 images, fewer .*--batch-size 12 or less"):
        call("train", *args, "--batch-size", 13, "--name", "small")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--set", "model.widhts=[1]"), r"model: unknown key 'widhts' \(did you mean 'widths'\?\)"),
        (("--set", "dataset.num_classes=9"), "num_classes is 9, but there are 10 digits"),
        (("--set", "dataset.type=none"), "dataset"),
        (("--name", "tiny.json/a"), "can't make the folder of tiny.json/a_state.json"),
        (("--resume", "gone.pth"), "no checkpoint gone.pth"),
        (("--resume-inference", "gone.safetensors"), "no checkpoint gone.safetensors"),
        (("--batch-size", 2000), "has 1797 images, fewer than one batch of 2000"),
    ],
)
def test_bad_input_ends_in_a_sentence(call, args, message):
    with pytest.raises(SystemExit, match=message):
        call("train", *tiny("--end-step", 9, *args))


def test_a_missing_config(call):
    with pytest.raises(SystemExit, match=r"no config file gone.json"):
        call("train", "--config", "gone.json")


@pytest.mark.parametrize("script", ["train", "sample", "convert_for_inference"])
def test_help(call, capsys, script):
    with pytest.raises(SystemExit) as left:
        call(script, "--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "(default: None)" not in text
    assert "(default: False)" not in text
