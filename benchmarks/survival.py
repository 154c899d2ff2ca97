"""Kill a training run by SIGKILL, time and again, and see whether anything is lost.

    python benchmarks/survival.py [--kills 50] [--processes 2] [--workers 2]

A small run that saves after every step is killed while it starts, inside a save, or at any other
moment: all of its processes at once, or one, whereupon the others must go. After each kill the next
start must resume at the newest step that was announced, by NAME_state.json and on the console. At
the end, the weights, averages, optimizer state and counters must be bitwise those of a run that
nobody interrupted, and so must the rows of the CSV. Exits with 1 if any of that isn't so.
"""

import k_diffusion.common.cpu  # noqa: F401  before torch, which loads OpenMP

# isort: split
import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils import _pytree as pytree

from k_diffusion.training import log, run_files

TRAIN = Path(__file__).parent.parent / "train.py"
PATIENCE = 120.0  # seconds, until anything that must happen has happened

CONFIG = {
    "model": {
        "type": "image_transformer_v2",
        "input_channels": 1,
        "input_size": [8, 8],
        "patch_size": [2, 2],
        "depths": [1, 1],
        "widths": [16, 32],
        "self_attns": [
            {"type": "neighborhood", "d_head": 8, "kernel_size": 3},
            {"type": "global", "d_head": 16},
        ],
        "mapping_depth": 1,
        "mapping_width": 16,
        "dropout_rate": 0.1,
        "augment_prob": 0.5,
        "loss_config": "karras",
        "sigma_data": 0.75,
        "sigma_min": 0.02,
        "sigma_max": 40,
        "sigma_sample_density": {"type": "cosine-interpolated"},
    },
    "dataset": {"type": "custom", "location": "data.py", "num_classes": 10},
    "optimizer": {"type": "adamw", "lr": 2e-3},
    "lr_sched": {"type": "inverse", "inv_gamma": 100.0, "power": 1.0, "warmup": 0.9},
    "ema_sched": {"type": "inverse", "power": 0.75, "max_value": 0.99},
}

DATA = """
import torch
from PIL import Image

class Greys(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform
    def __len__(self):
        return 100
    def __getitem__(self, i):
        return self.transform(Image.linear_gradient("L").resize((8, 8)).rotate(3.6 * i)), i % 10

def get_dataset(config, transform):
    return Greys(transform)
"""


class Lost(Exception):
    """Something that a killed run has lost; says what."""


class Run:
    """A train.py at work: its processes, and what it has said."""

    def __init__(self, folder: Path, name: str, end: int, processes: int, workers: int):
        flags = {
            "config": "config.json", "name": name, "output-dir": name, "end-step": end, "seed": 1,
            "batch-size": 4, "num-workers": workers, "save-every": 1, "log-every": 3,
            "demo-every": 10**9, "sample-n": 1, "keep": 3,
        }  # fmt: skip
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}"]
        command += [str(TRAIN), *(str(word) for k, v in flags.items() for word in (f"--{k}", v))]
        self.folder, self.name, self.output = folder, name, folder / "output.txt"
        with self.output.open("w") as file:
            self.process = psutil.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        self.started = time.monotonic()

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def everyone(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def trains(self) -> bool:
        """Whether it has done a step; raises Lost if it ended first."""
        if self.process.poll() is not None:
            raise Lost(f"a run ended by itself with code {self.process.returncode}:\n{self.said()}")
        return bool(re.search(r"^step \d+,", self.said(), re.MULTILINE))

    def wait(self) -> None:
        """Let it come to its end."""
        if self.process.wait(600):
            raise Lost(f"a run failed:\n{self.said()}")

    def kill(self, everyone: bool) -> None:
        """SIGKILL all processes, or one of them, at random; returns when none is left."""
        there = self.everyone()
        for process in there if everyone else [random.choice(there)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        # loader processes look for their parent every few seconds
        left = psutil.wait_procs(there, timeout=PATIENCE)[1]
        for process in left:
            process.kill()
        if left:
            raise Lost(f"{len(left)} processes went on after one of theirs was killed")


def files_of(folder: Path, name: str) -> str:
    """How the names of all files of a run begin: it has a folder of its own."""
    return str(folder / name / name)


def announced(folder: Path, name: str) -> int:
    """The step that a run's state file names; 0 without one."""
    path = run_files.state_path(files_of(folder, name))
    if not path.exists():
        return 0
    return int(Path(json.loads(path.read_text())["latest_checkpoint"]).stem.rpartition("_")[2])


def half_written(folder: Path) -> bool:
    return any(folder.rglob(".*.pth.*.part"))


def kill_once(run: Run, startup: float) -> str:
    """Kill a run at a random moment of a random kind; returns which it was."""
    when = random.choice(["starting", "saving", "training", "training"])
    deadline = run.started + random.uniform(0, 1.2 * startup)
    if when != "starting":
        end = time.monotonic() + PATIENCE
        while not run.trains() and time.monotonic() < end:
            time.sleep(0.01)
        deadline = time.monotonic() + random.uniform(0, 1)
    if when == "saving":
        while not half_written(run.folder) and time.monotonic() < deadline + PATIENCE:
            pass
    else:
        time.sleep(max(0, deadline - time.monotonic()))
    run.kill(everyone=when == "saving" or random.random() < 0.7)
    return "saving" if half_written(run.folder) else when


def check_start(said: str, step: int) -> bool:
    """Whether a run got as far as to say where it resumes, which must be at that step."""
    found = re.search(r"resumed from \S+ at step (\d+)", said)
    if found and int(found[1]) != step:
        raise Lost(f"resumed at step {found[1]}, and {step} had been announced:\n{said}")
    if not found and re.search(r"^step \d+,", said, re.MULTILINE) and step:
        raise Lost(f"started anew, and step {step} had been announced:\n{said}")
    return found is not None


def differences(folder: Path, a: str, b: str, step: int) -> list[str]:
    """Where two runs differ: keys of their checkpoints of a step, and rows of their logs."""
    states = []
    for name in a, b:
        state = torch.load(f"{files_of(folder, name)}_{step:08}.pth", weights_only=True)
        state.pop("elapsed")
        states.append({key: _flat(value) for key, value in state.items()})
    keys = sorted(states[0].keys() | states[1].keys())
    found = [key for key in keys if states[0].get(key) != states[1].get(key)]
    rows = [log.read_rows(Path(f"{files_of(folder, name)}_metrics.csv")) for name in (a, b)]
    for table in rows:
        for row in table:
            row.pop("time")
    return found + (["the CSV"] if rows[0] != rows[1] else [])


def _flat(value: Any) -> Any:
    leaves, shape = pytree.tree_flatten(value)
    return str(shape), [
        (x.dtype, x.shape, x.contiguous().flatten().view(torch.uint8).tolist())
        if isinstance(x, torch.Tensor)
        else repr(x)
        for x in leaves
    ]


def survive(folder: Path, kills: int, processes: int, workers: int) -> str:
    """Kill a run so often, and compare it with another; returns a summary. Raises Lost."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "data.py").write_text(DATA)
    moments: Counter[str] = Counter()
    startup, at, resumed, lost = 10.0, 0, 0, 0
    for i in range(kills):
        run = Run(folder, "killed", 10**8, processes, workers)
        moments[kill_once(run, startup)] += 1
        said = run.said()
        resumed += check_start(said, at)
        at = announced(folder, "killed")
        spoken = [int(step) for step in re.findall(r"saved killed/killed_(\d+)\.pth", said)]
        if max(spoken, default=0) > at:
            raise Lost(f"step {spoken[-1]} was said to be saved, and the state file names {at}")
        done = [int(step) for step in re.findall(r"^step (\d+),", said, re.MULTILINE)]
        lost = max(lost, max(done, default=0) - at)
        print(f"kill {i + 1} of {kills}: saved up to step {at}", flush=True)
    end = at + 4
    for name in "killed", "whole":
        run = Run(folder, name, end, processes, workers)
        run.wait()
        if name == "killed":
            resumed += check_start(run.said(), at)
    if left := sorted(p.name for p in folder.rglob(".*")):
        raise Lost(f"files are left over: {left}")
    if kept := len(run_files.find_checkpoints(files_of(folder, "killed"))) - 3:
        raise Lost(f"{kept} checkpoints more than were to be kept")
    if wrong := differences(folder, "killed", "whole", end):
        raise Lost(f"the end isn't the uninterrupted run's: {', '.join(wrong)} differ")
    kinds = ", ".join(f"{n} while {kind}" for kind, n in sorted(moments.items()))
    return (
        f"survived {kills} of {kills} kills ({kinds}) with {processes} process(es) of {workers} "
        f"workers; {resumed} restarts got as far as to resume, all at the newest announced step; "
        f"at step {end} weights, averages, optimizer, counters and CSV are bitwise those of an "
        "uninterrupted run"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--kills", type=int, default=50, metavar="N")
    p.add_argument("--processes", type=int, default=1, metavar="N", help="that train (default: 1)")
    p.add_argument("--workers", type=int, default=0, metavar="N", help="that load (default: 0)")
    p.add_argument("--random-seed", type=int, default=0, metavar="N", help="of the moments")
    args = p.parse_args()
    random.seed(args.random_seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            print(survive(Path(folder), args.kills, args.processes, args.workers))
        except Lost as error:
            sys.exit(f"lost: {error}")


if __name__ == "__main__":
    main()
