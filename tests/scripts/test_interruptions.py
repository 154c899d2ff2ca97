"""train.py told to save, to leave, or left alone by its terminal, its disk and its launcher."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import runs

from k_diffusion import generation
from k_diffusion.common import launcher
from k_diffusion.training import run_files, run_lock, saving, signals, step

FAST = "--config", "tiny.json", "--seed", 1, "--batch-size", 6, "--num-workers", 0, "--name", "a"
ENDLESS = "--end-step", 10**6, "--log-every", 1

CUSTOM = """
import torch
from PIL import Image

class Black(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return self.transform(Image.new("L", (8, 8))), 0

def get_dataset(config, transform):
    return Black(transform)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(runs.TINY))
    return tmp_path


def wait_for(process, sign, timeout=200):
    """Reads a program's output until a line has `sign`; returns what it read."""
    lines, end = [], time.monotonic() + timeout
    while time.monotonic() < end and (line := process.stdout.readline()):
        lines.append(line)
        if sign in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def saved_steps(folder):
    return [runs.read(path)["step"] for path in run_files.find_checkpoints(str(folder / "a"))]


@pytest.mark.slow
def test_a_run_outlasts_its_reader(folder):
    """As under `| head`, both for standard output and error."""
    command = runs.python("train", *FAST, "--end-step", 30, "--log-every", 1, "--demo-every", 99)
    process = runs.start(*command, folder=folder)
    wait_for(process, "step 1,")
    process.stdout.close()
    assert process.wait(200) == 0
    assert saved_steps(folder) == [30]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is full")
def test_a_run_outlasts_the_disk_of_its_log(folder):
    command = runs.python("train", *FAST, "--end-step", 3, "--sample-n", 1)
    with open("/dev/full", "w") as full:
        process = runs.start(*command, folder=folder, stdout=full.fileno())
    errors, _ = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert errors.count("can't write standard output any more (No space left") == 1
    assert saved_steps(folder) == [3]


@pytest.mark.slow
def test_sigusr1_goes_on_and_sighup_leaves(folder):
    process = runs.start(*runs.python("train", *FAST, *ENDLESS), folder=folder)
    wait_for(process, "step 1,")
    process.send_signal(signal.SIGUSR1)
    wait_for(process, "saved a_")  # which a later step says
    process.send_signal(signal.SIGHUP)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGHUP, text
    assert "Traceback" not in text
    last, first = saved_steps(folder)
    assert last > first > 0


def write_custom(folder):
    """A data set that isn't in memory, so that there are workers."""
    (folder / "mine.py").write_text(CUSTOM)
    dataset = {**runs.TINY["dataset"], "type": "custom", "location": "mine.py"}
    (folder / "tiny.json").write_text(json.dumps({**runs.TINY, "dataset": dataset}))


@pytest.mark.slow
def test_signals_while_workers_start(folder):
    """They import torch for seconds, as members of the group that a terminal signals."""
    write_custom(folder)
    command = runs.python("train", *FAST, *ENDLESS, "--num-workers", 2)
    process = runs.start(*command, folder=folder)
    us, end = psutil.Process(process.pid), time.monotonic() + 200
    while len(workers := [p for p in us.children() if "spawn_main" in str(p.cmdline())]) < 2:
        assert time.monotonic() < end
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGINT, text
    assert "Traceback" not in text
    assert saved_steps(folder) == [1]
    assert psutil.wait_procs(workers, timeout=60)[1] == []


# ------------------------------------------------------------------------- in this process


@pytest.fixture
def train(folder, monkeypatch):
    def train(*args):
        runs.call("train", *FAST, *args, folder=folder, monkeypatch=monkeypatch)

    return train


def test_a_second_signal_lets_the_save_finish(train, folder, monkeypatch):
    save = saving.save_checkpoint

    def told_twice(*args):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # for the main thread to see it
        return save(*args)

    monkeypatch.setattr(saving, "save_checkpoint", told_twice)
    with pytest.raises(SystemExit) as left:
        train("--end-step", 9, "--save-every", 2)
    assert left.value.code == 128 + signal.SIGTERM
    assert sorted(saved_steps(folder)) in ([2], [2, 3])  # the step after it, if it was done by then


def test_a_signal_during_a_demo_ends_it(train, folder, monkeypatch):
    calls = []
    sample = generation.sampling.sample

    def told(model, *args, **kwargs):
        def counted(*args, **kwargs):
            calls.append(len(calls))
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return model(*args, **kwargs)

        return sample(counted, *args, **kwargs)

    monkeypatch.setattr(generation.sampling, "sample", told)
    with pytest.raises(SystemExit) as left:
        train("--end-step", 9, "--demo-every", 2)
    assert left.value.code == 128 + signal.SIGTERM
    assert len(calls) == 3
    assert saved_steps(folder) == [2]
    assert list(folder.glob("*demo*")) == []


def test_nothing_learned_is_nothing_saved(train, folder, monkeypatch):
    enter = signals.StopSignal.__enter__

    def told(self):
        enter(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return self

    monkeypatch.setattr(signals.StopSignal, "__enter__", told)
    with pytest.raises(SystemExit) as left:
        train("--end-step", 9)
    assert left.value.code == 128 + signal.SIGTERM
    assert list(folder.glob("a_*")) == []


@pytest.mark.slow
def test_a_killed_worker_in_the_middle_of_a_step_loses_nothing(train, folder, monkeypatch):
    """As the kernel does for want of memory: said where the next batch is waited for."""
    write_custom(folder)
    average = step.ema_update

    def killing(*args):
        average(*args)
        for worker in multiprocessing.active_children():
            worker.kill()
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(step, "ema_update", killing)
    with pytest.raises(SystemExit, match="a loading process was killed.* smaller --num-workers"):
        train("--end-step", 9, "--num-workers", 1, "--start-method", "fork")
    assert saved_steps(folder) != []


# ------------------------------------------------------------------------- under a launcher


def end_of(processes):
    return psutil.wait_procs(processes, timeout=200)[1] == []


@pytest.mark.slow
def test_sigterm_to_accelerate_launch_saves(folder):
    process = runs.start(*runs.accelerate(2, "train", *FAST, *ENDLESS), folder=folder)
    wait_for(process, "step 1,")
    everyone = psutil.Process(process.pid).children(recursive=True)
    assert len(everyone) == 3  # torchrun, and two of train.py
    process.terminate()
    text, _ = process.communicate(timeout=200)
    assert end_of(everyone)
    assert "Traceback" not in text
    assert len(saved_steps(folder)) == 1


@pytest.mark.slow
def test_sigkill_of_torchrun_saves(folder):
    torchrun = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    script = runs.python("train", *FAST, *ENDLESS)[1:]
    process = runs.start(*torchrun, *script, folder=folder)
    wait_for(process, "step 1,")
    everyone = psutil.Process(process.pid).children()
    for worker in everyone:
        worker.send_signal(signal.SIGUSR1)
    wait_for(process, "saved a_")
    process.kill()
    text, _ = process.communicate(timeout=200)
    assert end_of(everyone)
    assert "Traceback" not in text
    assert len(saved_steps(folder)) >= 2


@pytest.mark.slow
def test_a_busy_name_is_said_once(folder):
    alone = SimpleNamespace(is_main_process=True, num_processes=1, print=print)
    with run_lock.hold(str(folder / "a"), alone):
        code, text = runs.run_two("train", *FAST, folder=folder)
    assert code == 1, text
    assert text.count(f"train.py: error: another run is called 'a', process {os.getpid()} on ") == 1
    assert "Traceback" not in text


BAD_ON_ONE = """
    reads = 0
    def __getitem__(self, i):
        self.reads += 1
        if self.reads > 20:  # in the fourth step
            if os.environ["RANK"] == "0":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(600)
            raise ValueError(f"item {i} is bad")
"""


@pytest.mark.slow
def test_an_error_of_one_process_is_said_and_loses_nothing(folder):
    """The main process never sees it, as on GPUs, where it waits on its device."""
    write_custom(folder)
    source = CUSTOM.replace("    def __getitem__(self, i):\n", BAD_ON_ONE[1:])
    (folder / "mine.py").write_text(f"import os, signal, time\n{source}")
    # by the launcher that has no traceback of its own
    launch = sys.executable, launcher.__file__, "--standalone", "--nproc-per-node=2"
    script = runs.python("train", *FAST, *ENDLESS)[1:]
    code, text = runs.run(*launch, *script, folder=folder)
    assert code == 1, text
    assert re.search(r"train.py: error: line .*: item \d+ is bad\n", text)
    assert "Traceback" not in text
    assert saved_steps(folder) == [3]
