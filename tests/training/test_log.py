import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from k_diffusion.training import log, page
from k_diffusion.training.noise_levels import LossByLevel
from k_diffusion.training.state import TrainState


class Accelerator:
    """One process, or the first of two, whose other one has twice the loss."""

    scaler = None
    is_main_process = True
    num_processes = 1
    trackers = ()

    def __init__(self, other=1.0):
        self.other = other

    def reduce(self, x, reduction):
        assert reduction == "mean"
        return (x + self.other * x) / 2

    def end_training(self):
        pass


class Tracker:
    """Keeps what it is told, or fails."""

    name = "tracker"

    def __init__(self):
        self.logged, self.fails, self.finished = [], False, False

    def log(self, values, step):
        if self.fails:
            raise RuntimeError("no network")
        self.logged.append((step, values))

    def finish(self):
        self.finished = True
        self.log({}, None)


def make_state():
    state = SimpleNamespace(
        step=0,
        epoch=0,
        samples=0,
        elapsed=0.0,
        losses=[],
        ema_stats={},
        scaler=None,
        noise_scale=None,
        levels=LossByLevel(),
        bad_steps=0,
        bad_at=0,
        trouble=0,
        sched=SimpleNamespace(get_last_lr=lambda: [0.1, 0.03]),
        ema_sched=SimpleNamespace(get_value=lambda: 0.9),
    )
    state.skipped = lambda step: TrainState.skipped(state, step)
    return state


def steps(logger, state, losses, norm=1.0):
    for loss in losses:
        state.step += 1
        state.samples += 4
        logger.skip({"skipped": [], "index": torch.tensor([state.step, 100 + state.step])})
        logger.step(state, torch.tensor(float(loss)), torch.tensor(norm))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rows(folder, capsys):
    accelerator, state = Accelerator(), make_state()
    accelerator.trackers = [Tracker()]
    logger = log.Log(accelerator, "runs/a", state, 6, every=3)
    steps(logger, state, [1, 2, 6, 4, 4], norm=0.5)
    logger.write(state)
    rows = log.read_rows(folder / "runs/a_metrics.csv")
    assert list(rows[0]) == log.COLUMNS
    assert [row["step"] for row in rows] == ["3", "5"]
    assert [float(row["loss"]) for row in rows] == [3, 4]
    average = 1.0
    for loss in 2, 6:
        average = 0.98 * average + 0.02 * loss
    assert float(rows[0]["loss_avg"]) == pytest.approx(average)
    assert (rows[1]["lr"], rows[1]["ema_decay"], rows[1]["grad_norm"]) == ("0.1", "0.9", "0.5")
    logged = accelerator.trackers[0].logged
    assert [step for step, _ in logged] == [3, 5]
    assert logged[0][1]["loss"] == 3
    assert [row["samples"] for row in rows] == ["12", "20"]


def test_a_plain_log_has_a_line_a_minute(folder, capsys, monkeypatch):
    """No bar where there's no terminal, but a line of the first step, each minute, and the last."""
    clock = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    logger, state = log.Log(Accelerator(), "a", make_state(), 200, every=10), make_state()
    for _ in range(185):
        clock[0] += 1
        steps(logger, state, [2])
    logger.write(state)
    logger.close()
    text = capsys.readouterr()
    assert text.err == ""
    lines = text.out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"step {step}" for step in (1, 70, 130, 185)]
    assert lines[1] == (
        "step 70, epoch 0, 70 s, 4 images/s (0% waiting for data), 02:10 left: loss 2, on average 2"
    )


def test_what_is_measured_joins_the_row_of_its_step(folder):
    state = make_state()
    logger = log.Log(Accelerator(), "a", state, None, every=2)
    logger.accelerator.trackers = [Tracker()]
    steps(logger, state, [1, 1, 1])
    logger.evaluated(state, {"val_loss": 0.25})
    logger.evaluated(state, {"fid": 3.0, "protocol": "lite0"})
    rows = log.read_rows(folder / "a_metrics.csv")
    assert [(row["step"], row["val_loss"], row["fid"]) for row in rows] == [
        ("2", "", ""),
        ("3", "0.25", "3.0"),
    ]
    assert logger.accelerator.trackers[0].logged[-2:] == [
        (3, {"val_loss": 0.25}),
        (3, {"fid[lite0]": 3.0}),
    ]


def test_what_is_measured_later_joins_the_row_that_the_step_has(folder):
    state = make_state()
    logger = log.Log(Accelerator(), "a", state, None, every=2)
    steps(logger, state, [1, 3])
    logger.evaluated(state, {"val_loss": 0.25})
    logger.evaluated(state, {"fid": 3.0, "kid": 0.5, "protocol": "lite0", "evaluate_n": 9})
    for left in [], [5.0]:  # of steps that have no row, as a checkpoint may hold them
        state.losses = left
        later = log.Log(Accelerator(), "a", state, None, every=2)
        later.accelerator.trackers = [Tracker()]
        later.evaluated(state, {"cmmd": 2.0, "protocol": "clip", "evaluate_n": 8})
        later.write(state)
        (row,) = log.read_rows(folder / "a_metrics.csv")
        assert row["loss"] == "2.0"
        assert (row["val_loss"], row["cmmd"], row["protocol"]) == ("0.25", "2.0", "clip")
        assert (row["fid"], row["kid"], row["evaluate_n"]) == ("", "", "8")
        assert later.accelerator.trackers[0].logged == [(2, {"cmmd[clip]": 2.0})]
    assert state.losses == [5.0]  # of the next row


def test_what_is_measured_of_an_earlier_checkpoint_leaves_later_rows(folder):
    state = make_state()
    steps(log.Log(Accelerator(), "a", state, None, every=2), state, [1, 3, 2, 2, 4, 4])
    for step, loss in (2, "2.0"), (3, ""):
        state.step = step
        later = log.Log(Accelerator(), "a", state, None)
        later.evaluated(state, {"fid": 3.0, "protocol": "lite0"})
        row = next(r for r in log.read_rows(folder / "a_metrics.csv") if r["step"] == str(step))
        assert (row["loss"], row["fid"]) == (loss, "3.0")
    rows = log.read_rows(folder / "a_metrics.csv")
    assert [row["step"] for row in rows] == ["2", "3", "4", "6"]
    steps(log.Log(Accelerator(), "a", state, None, every=1), state, [7])  # a branch does
    rows = log.read_rows(folder / "a_metrics.csv")
    assert [(row["step"], row["loss"]) for row in rows] == [("2", "2.0"), ("3", ""), ("4", "7.0")]


def test_what_is_measured_without_a_loss_has_a_row(folder):
    state = make_state()
    state.step = 7
    logger = log.Log(Accelerator(), "a", state, None)
    logger.evaluated(state, {"fid": 3.0, "protocol": "lite0"})
    (row,) = log.read_rows(folder / "a_metrics.csv")
    assert (row["step"], row["loss"], row["loss_avg"], row["fid"]) == ("7", "", "", "3.0")
    steps(logger, state, [2])
    logger.write(state)
    assert page.summary(log.read_rows(folder / "a_metrics.csv"))["FD [lite0], best"] == "3 at 7"
    logger.plot()
    assert not logger.failed
    assert (folder / "a_loss.png").exists()


class BrokenPage:
    path = "x/index.html"

    def update(self, status):
        raise ZeroDivisionError(status)


def test_a_page_that_fails_ends_no_run(folder, capsys):
    state = make_state()
    logger = log.Log(Accelerator(), "a", state, None, every=1, page=BrokenPage())
    steps(logger, state, [1, 1, 1])
    logger.close()
    text = capsys.readouterr().out
    assert text.count("can't write x/index.html (ZeroDivisionError: running); going on") == 1
    assert len(log.read_rows(folder / "a_metrics.csv")) == 3


def test_the_rate_and_the_time_that_is_left():
    before, now = log.Progress(100.0, 10, 640, 1.0), log.Progress(120.0, 20, 1280, 3.0)
    rate = "32 images/s (10% waiting for data)"
    assert now.since(before, 50) == f"{rate}, 01:00 left"
    assert now.since(before, None) == rate
    assert now.since(before, 20 + 1800) == f"{rate}, 1:00:00 left"


def test_a_resumed_run_says_at_once_that_it_runs(folder, capsys):
    state = make_state()
    state.step, state.samples = 40, 160
    logger = log.Log(Accelerator(), "a", state, 100, every=25)
    steps(logger, state, [2, 4])
    assert capsys.readouterr().out.startswith("step 41, epoch 0, 0 s, ")
    assert not (folder / "a_metrics.csv").exists()
    assert state.losses == [2]  # which the row of step 50 counts


def test_losses_are_means_over_processes(folder):
    state = make_state()
    steps(log.Log(Accelerator(other=2.0), "a", state, None, every=2), state, [1, 3])
    assert float(log.read_rows(folder / "a_metrics.csv")[0]["loss"]) == 3


def test_the_noise_scale(folder, capsys):
    state, reads = make_state(), []
    estimate = SimpleNamespace(get_gns=lambda: 1234.5)
    state.noise_scale = SimpleNamespace(
        estimate=estimate, read=lambda accelerator, together: reads.append(together)
    )
    accelerator = Accelerator()
    accelerator.trackers = [Tracker()]
    logger = log.Log(accelerator, "a", state, None, every=2)
    steps(logger, state, [1, 2])
    assert log.read_rows(folder / "a_metrics.csv")[0]["gns"] == "1234.5"
    assert accelerator.trackers[0].logged[0][1]["gns"] == 1234.5
    logger.close()
    assert capsys.readouterr().out.endswith(", noise scale 1234\n")
    logger.read(state, together=False)
    assert reads == [True, True]  # of the first step and the row, none of nothing


def test_reading_in_between_changes_no_number(folder):
    """What a save does, at any step."""
    read, plain = make_state(), make_state()
    losses = [0.3, 0.7, 0.1, 0.9, 0.4]
    logger = log.Log(Accelerator(), "read", read, None, every=5)
    for loss in losses:
        steps(logger, read, [loss])
        logger.read(read)
    steps(log.Log(Accelerator(), "plain", plain, None, every=5), plain, losses)
    rows = [log.read_rows(folder / f"{name}_metrics.csv")[0] for name in ("read", "plain")]
    assert {**rows[0], "time": ""} == {**rows[1], "time": ""}
    assert read.ema_stats == plain.ema_stats


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_is_named_with_its_items_and_not_counted(folder, capsys, bad, what):
    state = make_state()
    logger = log.Log(Accelerator(), "a", state, None, every=100)
    steps(logger, state, [1.0])
    # a lost loss takes its gradient along
    steps(logger, state, [bad if what == "loss" else 2.0], norm=bad)
    steps(logger, state, [3.0])
    logger.read(state)
    assert state.losses == [1, 3]
    assert (state.bad_steps, state.bad_at, state.trouble) == (0, 2, 2)
    assert (
        f"skipped step 2 (1 so far), whose {what} is NaN or infinite; its items: 2, 102\n"
    ) in capsys.readouterr().out


def test_another_process_names_the_items_of_its_lost_loss(folder, capsys):
    state = make_state()
    logger = log.Log(Accelerator(other=math.inf), "a", state, None, every=2)
    steps(logger, state, [1.0, 1.0], norm=math.nan)
    assert state.bad_steps == 2
    assert "skipped" not in capsys.readouterr().out


def test_too_many_bad_steps_in_a_row_end_a_run_and_say_how_to_go_on(folder):
    state = make_state()
    logger = log.Log(Accelerator(), "a", state, None, every=1, max_bad_steps=3)
    for step in 2, 4, 6:
        (folder / f"a_{step:08}.pth").write_bytes(b"")
    steps(logger, state, [1, 1, 1, 1, math.nan, 1, math.nan, math.nan])
    message = (
        "3 steps in a row, up to step 9, were skipped, as their loss or gradient is NaN or "
        "infinite; resume with --resume a_00000004.pth, from before the trouble began, and a lower"
    )
    with pytest.raises(log.NonFiniteLoss, match=message):
        steps(logger, state, [math.nan])


def test_gradients_may_overflow_in_fp16_until_the_scale_is_found(folder):
    state = make_state()
    scale = [65536.0]
    state.scaler = SimpleNamespace(get_scale=lambda: scale[0])
    logger = log.Log(Accelerator(), "a", state, None, every=1, max_bad_steps=2)
    for _ in range(5):
        steps(logger, state, [1.0], norm=math.inf)
    assert log.read_rows(folder / "a_metrics.csv")[0]["grad_norm"] == "inf"
    assert state.bad_steps == 0
    scale[0] = 0.5
    steps(logger, state, [1.0], norm=math.inf)
    message = "fp16 overflows in every step, even at a loss scale of 0.5; start with --mixed-prec"
    with pytest.raises(log.NonFiniteLoss, match=message):
        steps(logger, state, [1.0], norm=math.inf)


@pytest.mark.parametrize(
    ("norms", "scale", "bad"),
    [
        ([math.inf] * 6 + [1.0], 0.25, 0),  # found, below 1
        ([math.inf] * 6 + [1.0] + [math.inf], 1.0, 0),
        ([math.inf] * 6, 0.5, 1),  # the last one at 1, the others above
        ([math.inf] * 4, 0.125, 3),
        ([1.0] + [math.nan] * 2, 0.25, 2),
    ],
)
def test_the_search_for_the_scale_of_fp16_may_be_read_late(folder, norms, scale, bad):
    state = make_state()
    logger = log.Log(Accelerator(), "a", state, None, every=100, max_bad_steps=4)
    steps(logger, state, [1.0])
    state.scaler = SimpleNamespace(get_scale=lambda: scale)
    for norm in norms:
        steps(logger, state, [1.0], norm=norm)
    logger.read(state)
    assert state.bad_steps == bad


def test_corrupt_images_are_named_once_and_counted(folder, capsys):
    logger = log.Log(Accelerator(), "a", make_state(), None)
    for skipped in ["", "x.png"], ["x.png", "y.png\nz.png"], ["z.png"]:
        logger.skip({"skipped": skipped, "index": torch.tensor([0])})
    assert capsys.readouterr().out.splitlines() == [
        "skipped a corrupt image (1 so far): x.png",
        "skipped a corrupt image (2 so far): y.png",
        "skipped a corrupt image (3 so far): z.png",
    ]


def write_rows(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(log.COLUMNS)
        writer.writerows(rows)


def row(step, loss):
    return [step, 1.0, loss, "", "", 0, loss, *[""] * (len(log.COLUMNS) - 7)]


def test_the_last_row_of_a_step_counts(tmp_path):
    path = tmp_path / "a.csv"
    write_rows(path, row(1, 5.0), row(2, 4.0), row(3, 9.0), row(2, 3.0), row(3, 2.0), [4, 0])
    rows = log.read_rows(path)
    assert [(int(r["step"]), float(r["loss"])) for r in rows] == [(1, 5.0), (2, 3.0), (3, 2.0)]


def test_rows_of_a_branch_that_was_left_are_left_out(tmp_path):
    path = tmp_path / "a.csv"
    write_rows(path, *(row(step, 9.0) for step in (10, 20, 30, 40)), row(25, 3.0), row(28, 2.0))
    rows = log.read_rows(path)
    assert [(int(r["step"]), float(r["loss"])) for r in rows] == [
        (10, 9.0), (20, 9.0), (25, 3.0), (28, 2.0),
    ]  # fmt: skip


def test_rows_between_the_step_that_a_run_goes_back_to_and_its_next_row_are_left_out(folder):
    def train(begin, end, every):
        state = make_state()
        state.step = begin
        steps(log.Log(Accelerator(), "a", state, None, every=every), state, [1.0] * (end - begin))
        return [int(row["step"]) for row in log.read_rows(folder / "a_metrics.csv")]

    assert train(0, 6, every=2) == [2, 4, 6]
    assert train(2, 4, every=5) == [2, 4, 6]  # which has no row yet
    assert train(2, 10, every=5) == [2, 5, 10]
    assert train(2, 8, every=4) == [2, 4, 8]  # where rows are replaced there is no mark
    marks = (folder / "a_metrics.csv").read_text().count(f"\n2{',' * (len(log.COLUMNS) - 1)}\n")
    assert marks == 1


def test_an_evaluation_before_the_first_row_of_a_branch_stays(folder):
    state = make_state()
    steps(log.Log(Accelerator(), "a", state, None, every=2), state, [1.0] * 6)
    state = make_state()
    state.step = 2
    written = log.Log(Accelerator(), "a", state, None, every=4)
    written.write_row({"step": 5, "time": 5.0, "fid": 3.0})
    written.write_row({"step": 6, "time": 6.0, "loss": 1.0})
    rows = log.read_rows(folder / "a_metrics.csv")
    assert [int(row["step"]) for row in rows] == [2, 5, 6]


def test_the_loss_curve(tmp_path):
    path = tmp_path / "a.csv"
    write_rows(path)
    log.plot_loss(path, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
    # an exponential on a logarithmic axis, and below 0 a straight line: over the whole height
    for loss in (lambda i: math.exp(-i / 10)), (lambda i: -i / 10):
        write_rows(path, *(row(i, loss(i)) for i in range(1, 30)))
        log.plot_loss(path, tmp_path / "a.png")
        pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
        blue = (pixels[..., 2] > pixels[..., 0] + 60).any(1).nonzero()[0]
        assert len(blue) > 100


def test_a_run_without_matplotlib(folder, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    state = make_state()
    logger = log.Log(Accelerator(), "a", state, None, every=1)
    steps(logger, state, [1.0])
    logger.plot()
    logger.plot()
    text = capsys.readouterr().out
    assert text.count('loss curve needs matplotlib; install it with: pip install "k-diff') == 1


def test_a_tracker_that_fails_ends_no_run(folder, capsys):
    accelerator, state = Accelerator(), make_state()
    bad, good = accelerator.trackers = [Tracker(), Tracker()]
    bad.name = "bad"
    logger = log.Log(accelerator, "a", state, None, every=1)
    bad.fails = True
    steps(logger, state, [1.0, 2.0])
    bad.fails = False
    steps(logger, state, [3.0])
    bad.fails = True
    logger.close()
    text = capsys.readouterr().out
    assert text.count("can't write bad (RuntimeError: no network); going on") == 2
    assert text.count("bad is written again") == 1
    assert [step for step, _ in good.logged] == [1, 2, 3, None]
    assert bad.finished
    assert len(log.read_rows(folder / "a_metrics.csv")) == 3


def test_a_demo_grid_that_cannot_be_written_ends_no_run(folder, capsys):
    accelerator, state = Accelerator(), make_state()
    logger = log.Log(accelerator, "runs/a", state, None)
    grid = Image.new("L", (8, 8), 7)
    for step in 1, 2, 3:
        (folder / f"runs/a_demo_{step:08}.png").mkdir(parents=True)
        if step == 3:
            (folder / f"runs/a_demo_{step:08}.png").rmdir()
        logger.image(grid, step)
    logger.image(None, 4)
    assert Image.open(folder / "runs/a_demo_00000003.png").getpixel((3, 3)) == 7
    text = capsys.readouterr().out
    assert text.count("can't write the demo grid (IsADirectoryError: ") == 1
    assert text.endswith("the demo grid is written again\nwrote runs/a_demo_00000003.png\n")


class FullDisk:
    """A file, of whose next write half arrives."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        raise OSError(28, "No space left on device")

    def close(self):
        self.file.close()
        raise OSError(28, "No space left on device")


def test_rows_outlast_a_full_disk(folder, capsys, monkeypatch):
    state = make_state()
    logger = log.Log(Accelerator(), "a", state, None, every=1)
    steps(logger, state, [1.0])
    logger.csv.file = FullDisk(logger.csv.file)
    logger.csv.writer = csv.writer(logger.csv.file)
    steps(logger, state, [2.0])

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log, "CSVLogger", full)
        steps(logger, state, [3.0])
    steps(logger, state, [4.0])
    rows = log.read_rows(folder / "a_metrics.csv")
    assert [(row["step"], float(row["loss"])) for row in rows] == [(str(i), i) for i in range(1, 5)]
    text = capsys.readouterr().out
    assert (
        text.count("can't write a_metrics.csv (OSError: [Errno 28] No space left on device)") == 1
    )
    assert text.count("a_metrics.csv is written again") == 1

    monkeypatch.setattr(log, "CSVLogger", full)
    logger.csv = None
    steps(logger, state, [5.0, 6.0])
    logger.close()
    assert "a_metrics.csv lacks its last 2 rows, which were not written" in capsys.readouterr().out


def test_only_the_main_process_writes(folder, capsys):
    accelerator, state = Accelerator(), make_state()
    accelerator.is_main_process = False
    logger = log.Log(accelerator, "a", state, None, every=1)
    steps(logger, state, [1.0])
    logger.say("hello")
    logger.plot()
    logger.close()
    assert list(folder.iterdir()) == []
    assert capsys.readouterr().out == ""
