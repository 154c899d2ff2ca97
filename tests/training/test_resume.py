import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch

import k_diffusion as K
from k_diffusion import checkpoints
from k_diffusion.data import training_data
from k_diffusion.training import log, optim, resume, run_lock, step
from k_diffusion.training.state import TrainState

FAST = "--seed", 1, "--batch-size", 6, "--sample-n", 1, "--log-every", 4, "--num-workers", 0


@pytest.fixture(autouse=True)
def short_demos(monkeypatch):
    monkeypatch.setattr("k_diffusion.generation.STEPS", 2)


@pytest.fixture
def train(tmp_path, monkeypatch):
    (tmp_path / "tiny.json").write_text(json.dumps(runs.TINY))

    def call(*args):
        runs.call(
            "train", "--config", "tiny.json", *FAST, *args, folder=tmp_path, monkeypatch=monkeypatch
        )

    call.folder = tmp_path
    return call


def same_run(folder, a, b, step):
    """Compares all that two runs know at a step, and the rows of their logs, but for the time."""
    first, second = (runs.read(folder / f"{name}_{step:08}.pth") for name in (a, b))
    assert first.pop("elapsed") != second.pop("elapsed")
    assert runs.differences(first, second) == []
    rows = [log.read_rows(folder / f"{name}_metrics.csv") for name in (a, b)]
    a_rows, b_rows = ({r["step"]: {**r, "time": ""} for r in row} for row in rows)
    assert {k: b_rows[k] for k in a_rows} == a_rows
    a_grid, b_grid = ((folder / f"{name}_demo_{step:08}.png").read_bytes() for name in (a, b))
    assert a_grid == b_grid


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--grad-accum-steps", 2, "--gns", "--set", "model.augment_prob=0.5"),
        ("--mixed-precision", "bf16", "--set", "model.dropout_rate=0.1"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(train, args):
    train("--name", "whole", "--end-step", 13, *args)
    # stopped twice, at steps where nothing is logged, drawn or saved otherwise
    for end in 5, 7, 13:
        train("--name", "parts", "--end-step", end, *args)
    same_run(train.folder, "whole", "parts", 13)


def test_a_run_that_a_signal_ended_goes_on_bitwise(train, monkeypatch):
    train("--name", "whole", "--end-step", 9)
    take_step = step.train_step

    def interrupted(accelerator, denoiser, opt, state, *args, **kwargs):
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(accelerator, denoiser, opt, state, *args, **kwargs)

    monkeypatch.setattr(step, "train_step", interrupted)
    with pytest.raises(SystemExit) as left:
        train("--name", "parts", "--end-step", 9)
    monkeypatch.setattr(step, "train_step", take_step)
    assert left.value.code == 128 + signal.SIGINT
    assert json.loads((train.folder / "parts_state.json").read_text()) == {
        "latest_checkpoint": "parts_00000006.pth"
    }
    train("--name", "parts", "--end-step", 9)
    same_run(train.folder, "whole", "parts", 9)


def test_an_error_in_the_data_loses_nothing(train, monkeypatch):
    train("--name", "whole", "--end-step", 7)
    draw = training_data.TrainingData._draw
    left = [6 * 4 + 1]  # one is drawn before the run, to see what the data set gives

    def broken(self, index, seed):
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("a bad item")
        return draw(self, index, seed)

    monkeypatch.setattr(training_data.TrainingData, "_draw", broken)
    with pytest.raises(SystemExit, match="a bad item"):
        train("--name", "parts", "--end-step", 7)
    monkeypatch.setattr(training_data.TrainingData, "_draw", draw)
    assert (train.folder / "parts_00000004.pth").is_file()
    train("--name", "parts", "--end-step", 7)
    same_run(train.folder, "whole", "parts", 7)


def losing(monkeypatch, *steps):
    """Makes the losses of these steps NaN."""
    take_step, loss_of, now = step.train_step, step.batch_loss, [None]

    def take(accelerator, denoiser, opt, state, *args, **kwargs):
        now[0] = state.step + 1
        return take_step(accelerator, denoiser, opt, state, *args, **kwargs)

    def lost(*args):
        return loss_of(*args) * (float("nan") if now[0] in steps else 1)

    monkeypatch.setattr(step, "train_step", take)
    monkeypatch.setattr(step, "batch_loss", lost)


def test_a_lost_step_is_skipped_and_named_and_the_run_goes_on_bitwise(train, monkeypatch, capsys):
    """The loss is read seldom, and wherever a run is interrupted."""
    losing(monkeypatch, 2, 5, 6)
    train("--name", "whole", "--end-step", 9)
    text = capsys.readouterr().out
    assert text.count("whose loss is NaN or infinite; its items: ") == 3
    assert "skipped step 6 (3 so far)" in text
    for end in 5, 9:
        train("--name", "parts", "--end-step", end)
    same_run(train.folder, "whole", "parts", 9)
    rows = log.read_rows(train.folder / "whole_metrics.csv")
    assert [row["step"] for row in rows] == ["4", "8", "9"]
    assert all(float(row["loss"]) < 10 for row in rows)


def test_a_lost_run_ends_and_its_last_good_checkpoint_is_kept_and_named(train, monkeypatch):
    losing(monkeypatch, 4, *range(6, 99))  # with a good checkpoint in between
    save = "--save-every", 1, "--keep", 1, "--log-every", 1, "--max-bad-steps", 4
    message = "4 steps in a row, up to step 9, .*--resume run_00000005.pth, from before the trouble"
    with pytest.raises(SystemExit, match=message):
        train("--name", "run", "--end-step", 99, *save)
    names = sorted(p.name for p in train.folder.glob("*.pth"))
    assert names == ["run_00000005.pth", "run_00000008.pth"]


def test_an_error_in_the_first_step_leaves_nothing(train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(step, "batch_loss", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("--name", "run", "--end-step", 3)
    assert [p.name for p in train.folder.iterdir()] == ["tiny.json"]
    train("--name", "run", "--end-step", 1, "--set", "model.mapping_width=24")
    with monkeypatch.context() as patch:
        patch.setattr(step, "batch_loss", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("--name", "run", "--end-step", 3, "--set", "model.mapping_width=24")
    assert len(list(train.folder.glob("*.pth"))) == 1


def test_a_disk_that_fills_up_ends_a_run_in_a_sentence(train, monkeypatch):
    usage = shutil.disk_usage(train.folder)
    free = iter([10**9, 10**9, 1000, 1000])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    message = r"run_00000006.pth: it takes .* 1,000 free; make space for [\d,]+ more"
    with pytest.raises(SystemExit, match=message):
        train("--name", "run", "--end-step", 99, "--save-every", 2)
    said = json.loads((train.folder / "run_state.json").read_text())
    assert said == {"latest_checkpoint": "run_00000004.pth"}
    monkeypatch.undo()
    train("--name", "run", "--end-step", 5)


def test_a_run_of_the_same_name_is_refused(train):
    with (
        run_lock.hold(
            str(train.folder / "run"),
            SimpleNamespace(is_main_process=True, num_processes=1, print=print),
        ),
        pytest.raises(SystemExit, match=f"another run is called 'run', process {os.getpid()} on "),
    ):
        train("--name", "run", "--end-step", 1)


def test_a_crash_between_the_changes_of_a_step_saves_no_half(train, monkeypatch):
    train("--name", "run", "--end-step", 3)
    monkeypatch.setattr(step, "ema_update", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("--name", "run", "--end-step", 6)
    assert sorted(p.name for p in train.folder.glob("*.pth")) == ["run_00000003.pth"]


# ------------------------------------------------------------------------- which checkpoint


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(train, capsys):
    train("--name", "runs/a", "--end-step", 4, "--save-every", 2)
    latest = train.folder / "runs/a_00000004.pth"
    latest.write_bytes(latest.read_bytes()[:-1000])
    # a path from the working directory, where the published train.py looks for it
    said = json.loads((train.folder / "runs/a_state.json").read_text())
    assert said == {"latest_checkpoint": "runs/a_00000004.pth"}
    train("--name", "runs/a", "--end-step", 5)
    out = capsys.readouterr().out
    assert "runs/a_00000004.pth is damaged or truncated" in out
    assert "resumed from runs/a_00000002.pth at step 2" in out
    assert "(as runs/a_state.json says; pass another --name to start anew)" in out


def test_without_its_state_file_a_run_goes_on_from_the_newest(train, capsys):
    train("--name", "a", "--end-step", 4, "--save-every", 2)
    (train.folder / "a_state.json").unlink()
    newest = train.folder / "a_00000004.pth"
    newest.write_bytes(
        newest.read_bytes().replace(b"image_transformer_v2", b"image_transformer_v3")
    )
    train("--name", "a", "--end-step", 5)
    out = capsys.readouterr().out
    assert "a_00000004.pth is damaged or truncated: its " in out
    assert (
        "resumed from a_00000002.pth at step 2 (the newest that can be read, as a_state.json is "
        "gone; pass another --name to start anew)"
    ) in out


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(train):
    train("--name", "a", "--end-step", 4, "--save-every", 2)
    (train.folder / "a_00000004.pth").write_bytes(b"no")
    with pytest.raises(SystemExit, match=r"a_00000004.pth is damaged .*a_00000002.pth"):
        train("--name", "a", "--resume", "a_00000004.pth", "--end-step", 5)


def test_resume_from_a_file_and_an_end_step_that_is_done(train, capsys):
    train("--name", "a", "--end-step", 4, "--save-every", 2)
    train("--name", "b", "--resume", "a_00000002.pth", "--end-step", 4)
    same_run(train.folder, "a", "b", 4)
    train("--name", "b", "--end-step", 4)
    assert "step 4 is done; pass a larger --end-step to continue" in capsys.readouterr().out


def test_another_architecture_says_what_differs(train):
    train("--name", "a", "--end-step", 1)
    with pytest.raises(SystemExit, match=r"another architecture .* of another shape: "):
        train("--name", "a", "--end-step", 2, "--set", "model.mapping_width=24")


# ------------------------------------------------------------------------- what may change


def test_other_batch_sizes_and_workers_go_on_where_the_data_was(train, capsys):
    train("--name", "a", "--end-step", 3)
    changed = "--batch-size", 10, "--mixed-precision", "bf16", "--seed", 7
    train("--name", "a", "--end-step", 5, *changed)
    said = re.findall("the run differs from the checkpoint's: (.*)", capsys.readouterr().out)
    assert said == ["batch_size: 6 -> 10", "precision: 'no' -> 'bf16'", "seed: 1 -> 7"]
    assert runs.read(train.folder / "a_00000005.pth")["samples"] == 3 * 6 + 2 * 10


def test_the_command_line_and_the_config_hold_for_hyperparameters(train, capsys):
    schedule = "--set", "lr_sched.inv_gamma=1e30", "--set", "lr_sched.warmup=0.5"
    train("--name", "a", "--end-step", 2, *schedule)
    train("--name", "a", "--end-step", 4, *schedule, "--lr", 1e-4, "--set", "optimizer.eps=1e-6")
    assert "the config differs from the checkpoint's: optimizer.lr: 0.002 -> 0.0001" in (
        capsys.readouterr().out
    )
    state = runs.read(train.folder / "a_00000004.pth")
    # the warm-up goes on: (1 - w^(k + 1)) lr; the mapping network learns at a third
    rates = sorted(group["lr"] for group in state["opt"]["param_groups"])
    assert rates[-1] == pytest.approx(1e-4 * (1 - 0.5**5))
    assert rates[0] == pytest.approx(rates[-1] / 3)
    assert {group["eps"] for group in state["opt"]["param_groups"]} == {1e-6}
    assert state["opt"]["state"][0]["step"] == 4


def test_seed_on_resume(train):
    train("--name", "a", "--end-step", 2)
    train("--name", "b", "--resume", "a_00000002.pth", "--end-step", 3, "--seed", 5)
    assert runs.read(train.folder / "a_00000002.pth")["seed"] == 1
    assert runs.read(train.folder / "b_00000003.pth")["seed"] == 5


def test_resume_inference_starts_from_weights_alone(train, monkeypatch, capsys):
    train("--name", "a", "--end-step", 3)
    convert = "a_00000003.pth", "--dtype", "fp32"
    runs.call("convert_for_inference", *convert, folder=train.folder, monkeypatch=monkeypatch)
    still = "--set", "optimizer.lr=1e-300", "--set", "optimizer.weight_decay=0"
    weights = "--resume-inference", "a_00000003.safetensors"
    train("--name", "b", "--end-step", 1, *weights, *still)
    averaged = runs.read(train.folder / "a_00000003.pth")["model_ema"]
    state = runs.read(train.folder / "b_00000001.pth")
    assert runs.differences(state["model"], averaged) == []
    assert state["step"] == 1
    # once it has checkpoints of its own, the same command goes on with them
    train("--name", "b", "--end-step", 2, *weights, *still)
    assert "resumed from b_00000001.pth" in capsys.readouterr().out
    assert runs.read(train.folder / "b_00000002.pth")["samples"] == 2 * 6


def test_reset_ema(train):
    train("--name", "a", "--end-step", 4)
    still = "--set", "optimizer.lr=1e-300", "--set", "optimizer.weight_decay=0"
    train("--name", "a", "--end-step", 5, "--reset-ema", *still)
    state = runs.read(train.folder / "a_00000005.pth")
    averaged = runs.read(train.folder / "a_00000004.pth")["model_ema"]
    assert runs.differences(state["model"], averaged) == []
    assert runs.differences(state["model_ema"], averaged) == []
    assert state["ema_sched"]["last_epoch"] == 1


# ------------------------------------------------------------------------- the state itself


def make_state(**sections):
    config = runs.tiny_config(**sections)
    torch.manual_seed(0)
    model = K.config.make_model(config)
    opt = optim.make_optimizer(config, model)
    return TrainState(
        config=config,
        model=model,
        model_ema=K.config.make_model(config),
        opt=opt,
        sched=optim.make_lr_sched(config, opt),
        ema_sched=optim.make_ema_sched(config),
        seed=3,
        dataset_length=100,
    )


PUBLISHED = {
    "config", "model", "model_ema", "opt", "sched", "ema_sched", "epoch", "step", "gns_stats",
    "ema_stats", "demo_gen", "elapsed",
}  # fmt: skip


def test_the_published_keys_are_written_and_enough(tmp_path):
    """A checkpoint of older versions: fewer keys, other attributes of the schedule."""
    schedule = {"type": "exponential", "num_steps": 100.0}
    state = make_state(lr_sched=schedule)
    state.step, state.samples = 7, 250
    saved = state.state_dict()
    assert saved.keys() >= PUBLISHED
    assert saved["epoch"] == 2
    old = {k: v for k, v in saved.items() if k in PUBLISHED}
    old["sched"] = {"last_epoch": 7, "_step_count": 8, "verbose": False, "decay": 0.5, "x": 1}
    old["ema_sched"] = {"last_epoch": 7, "inv_gamma": 1.0, "power": 1.0}
    old["opt"]["param_groups"][0]["betas"] = (0.1, 0.1)
    torch.save(old, tmp_path / "old.pth")

    new = make_state(lr_sched=schedule)
    resume.resume(new, "run", tmp_path / "old.pth", print)
    assert (new.step, new.samples, new.seed) == (7, 200, 3)
    assert new.sched.get_last_lr()[0] == pytest.approx(2e-3 * 0.5**0.07)
    assert new.ema_sched.last_epoch == 7
    new.opt.step()
    new.sched.step()
    assert new.sched.get_last_lr()[0] == pytest.approx(2e-3 * 0.5**0.08)


def test_an_optimizer_of_another_kind_is_refused_before_anything_changes():
    state, other = make_state(), make_state()
    saved = state.state_dict()
    saved["opt"]["state"] = {0: {"exp_avg": torch.zeros(999)}}
    saved["model"] = {k: v + 1 for k, v in saved["model"].items()}
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(checkpoints.CheckpointError, match="not of this optimizer and model"):
        other.load_state_dict(saved, "x.pth")
    assert runs.differences(dict(other.model.state_dict()), before) == []


def test_the_scale_of_fp16_gradients_is_kept():
    state = make_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    state.scaler.scale(torch.ones(()))
    state.scaler.update(32.0)
    new = make_state()
    new.scaler = torch.amp.GradScaler("cpu")
    new.load_state_dict(state.state_dict(), "x.pth")
    assert new.scaler.get_scale() == 32.0


def test_changes_that_belong_together():
    state = make_state()
    with state.changing():
        assert not state.whole
    assert state.whole
    with pytest.raises(RuntimeError), state.changing():
        raise RuntimeError
    assert not state.whole


def test_config_differences():
    old = {"model": {"a": 1, "b": [1, 2]}, "gone": 1}
    new = {"model": {"a": 1, "b": [1, 3], "new": 0}}
    assert resume.config_differences(old, new) == ["model.b: [1, 2] -> [1, 3]"]


def test_a_resumed_log_is_appended_to(train):
    train("--name", "a", "--end-step", 6)
    train("--name", "a", "--end-step", 8)
    with (train.folder / "a_metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["4", "6", "8"]


@pytest.mark.parametrize("main", ["resumed from a_00000010.pth at step 10", "started at step 0"])
def test_a_folder_that_one_machine_lacks_is_noticed(monkeypatch, main):
    """Its process would start anew, and average its weights with those that go on."""
    ended = []
    monkeypatch.setattr(resume, "broadcast", lambda mine: main)
    monkeypatch.setattr(resume, "end_together", lambda accelerator, error: ended.append(error))
    accelerator = SimpleNamespace(process_index=3)
    resume.check_shared(accelerator, "a", Path("a_00000010.pth"), 10)
    resume.check_shared(accelerator, "a", None, 0)
    (error,) = [error for error in ended if error is not None]
    assert re.match(
        r"process 3 (resumed|started).* process 0 .* the folder of 'a' where all", str(error)
    )
