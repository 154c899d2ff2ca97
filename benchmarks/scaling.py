"""Memory and time of a training step by model, resolution and number of GPUs: a model of them.

    python benchmarks/scaling.py [--quick] [--write]
    python benchmarks/scaling.py --measure [--write]      # on two CPU cores, beside the model

Without --measure nothing is measured. Memory is what `train.py --dry-run` says of a process: its
states, or with --fsdp its shards of them, and the activations of fake tensors. The time of
arithmetic is that of the multiply-accumulates at the rate that benchmarks/train_step.py measured on
an H100: matrix products, and the part of it that a step compiled by block reached. Communication is
its bytes by a bandwidth.

With --measure train.py runs on one core, and on two by two processes, each with as many images, and
the memory of a process is put beside that of the model.
"""

import k_diffusion.common.cpu  # noqa: F401  before torch, which loads OpenMP

# isort: split
import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import bench
from harness.cases import hourglass
from harness.page import replace

from k_diffusion.config import load_config, make_model
from k_diffusion.training.dry_run import dry_run, gathered

PAGE = bench.ROOT / "docs" / "scaling.md"
MATMUL, UTILISATION = 786e12, 0.37  # operations a second of an H100 in bf16; imagenet-256
# bytes a second that a ring passes on: NVLink; a link of 400 Gbit/s for each machine of 8
BANDWIDTH = {"within": 300e9, "between": 40e9}
IMAGES = 16  # of a GPU and step

# widths are in multiples of those of the paper's model for ImageNet
MODELS = {"1x, 256²": (1, 256), "1x, 512²": (1, 512), "2x, 256²": (2, 256), "3x, 256²": (3, 256)}
GPUS = (1, 8, 64)
NAMES = {None: "DDP", "again": "`--fsdp`", "keep": "`--fsdp keep`"}

COLUMNS: bench.Columns = {
    "model": ("widths, images", str),
    "parameters": ("parameters", lambda n: f"{n / 1e6:,.0f} M"),
    "gpus": ("GPUs", str),
    "way": ("", str),
    "states": ("states, GiB", lambda n: bench.digits(n / 2**30)),
    "off": ("with activations", lambda n: bench.digits(n / 2**30)),
    "full": ("checkpointed", lambda n: bench.digits(n / 2**30)),
    "compute": ("arithmetic, ms", bench.digits),
    "send": ("communication, ms", bench.digits),
}


def sent(bytes_: int, gpus: int, way: str | None) -> float:
    """Bytes that a GPU sends in a step, of weights that take `bytes_`, in rings of all GPUs.

    DDP sums up gradients and hands the sums round; FSDP2 hands weights round for the forward pass,
    and again for the backward pass, and sums up gradients.
    """
    return {None: 2, "keep": 2, "again": 3}[way] * bytes_ * (gpus - 1) / gpus


def rows(name: str, gpus: Sequence[int] = GPUS, images: int = IMAGES) -> Iterator[dict[str, Any]]:
    """The rows of a model by number of GPUs and way of sharing the work."""
    factor, size = MODELS[name]
    widths = [factor * width for width in (384, 768, 1536)]
    depths = [2, 2, 16] if size == 256 else [2, 2, 2, 16]
    if size > 256:
        widths = [factor * width for width in (192, 384, 768, 1536)]
    config = load_config(hourglass(size, depths, widths, len(widths) - 1, 1000))
    run = dry_run(config, mixed_precision="bf16", batch_size=images)
    with torch.device("meta"):
        inner = make_model(config)
    compute = 6 * run.macs * images / (MATMUL * UTILISATION)
    for n in gpus:
        for way in NAMES if n > 1 else (None,):
            states = sum(run.states.values())
            if way:
                states = states // n + gathered(inner, way)
            elif n > 1:
                states += run.states["gradients"]  # DDP's buckets
            bandwidth = BANDWIDTH["within" if n <= 8 else "between"]
            yield {
                "model": name,
                "parameters": run.parameters,
                "gpus": n,
                "way": NAMES[way] if n > 1 else "",
                "states": states,
                **{key: states + run.activations[key].most for key in ("off", "full")},
                "compute": 1e3 * compute,
                "send": 1e3 * sent(run.states["gradients"], n, way) / bandwidth if n > 1 else None,
            }


# ---------------------------------------------------------------- two processes, measured

MEASURED: bench.Columns = {
    "way": ("", str),
    "ms": ("a step, ms", bench.digits),
    "images": ("images / s", bench.digits),
    "rss": ("memory of a process, GiB", lambda n: bench.digits(n / 2**30)),
    "more": ("more than alone, MiB", lambda n: f"{n / 2**20:,.0f}"),
    "modelled": ("modelled, MiB", lambda n: f"{n / 2**20:,.0f}"),
}
DATA = """
from PIL import Image

class Noise:
    def __init__(self, size, transform):
        self.size, self.transform = size, transform
    def __len__(self):
        return 256
    def __getitem__(self, i):
        return self.transform(Image.effect_noise(self.size, i).convert("RGB")), i % 10

def get_dataset(config, transform):
    return Noise(config["size"], transform)
"""


def run(folder: Path, processes: int, way: str | None, steps: int) -> tuple[float, int]:
    """Seconds of a step of train.py, the median, and the most memory of a process, in bytes."""
    name = f"{processes}_{way}"
    alone, many = [sys.executable], ["-m", "accelerate.commands.launch", "--cpu"]
    launch = [*alone, *many, "--num_processes", str(processes), "--num_machines", "1"]
    command = launch if processes > 1 else alone
    command += [str(bench.ROOT / "train.py"), "--config", "config.json", "--name", name]
    command += ["--end-step", str(steps), "--log-every", "1", "--sample-n", "1", "--batch-size"]
    command += ["2", "--num-workers", "0", "--seed", "0"]
    command += ["--fsdp", way, "--save-sharded"] if way else []  # the whole would gather it
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(bench.ROOT)}
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(command, cwd=folder, env=one_thread, stdout=log, stderr=log)
        _, status, used = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError((folder / "log").read_text()[-2000:])
    with (folder / f"{name}_metrics.csv").open() as file:
        times = [float(row["time"]) for row in csv.DictReader(file)]
    return statistics.median(b - a for a, b in itertools.pairwise(times)), used.ru_maxrss * 1024


def measured(config: dict[str, Any], steps: int) -> Iterator[dict[str, Any]]:
    """The rows of one process and of two, with 2 images each."""
    config = {**config, "dataset": {"type": "custom", "location": "data.py", "num_classes": 10}}
    config["dataset"]["config"] = {"size": config["model"]["input_size"]}
    with torch.device("meta"):
        inner = make_model(load_config(config))
    states = sum(dry_run(load_config(config), batch_size=2).states.values())
    weights = sum(p.nbytes for p in inner.parameters())
    first = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "data.py").write_text(DATA)
        (folder / "config.json").write_text(json.dumps(config))
        for processes, way in (1, None), *((2, way) for way in NAMES):
            seconds, rss = run(folder, processes, way, steps)
            first = first or rss
            more = gathered(inner, way) - states // 2 if way else (processes - 1) * weights
            yield {
                "way": f"2 processes, {NAMES[way]}" if processes > 1 else "1 process",
                "ms": 1e3 * seconds,
                "images": 2 * processes / seconds,
                "rss": rss,
                "more": rss - first,
                "modelled": more,
            }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="the first model alone, of 2 images")
    p.add_argument("--measure", action="store_true", help="on two cores; --quick: few steps")
    p.add_argument("--write", action="store_true", help="put the table in docs/scaling.md")
    args = p.parse_args()
    section, columns = "steps", COLUMNS
    if args.measure:
        section, columns = "two processes", MEASURED
        found = list(measured(hourglass(64, [2, 2], [384, 768], 1, 10), 3 if args.quick else 12))
    elif args.quick:
        found = list(rows(next(iter(MODELS)), GPUS[:2], 2))
    else:
        found = [row for name in MODELS for row in rows(name)]
    text = bench.table(columns, found)
    print(text)
    if args.write and not args.quick:
        PAGE.write_text(replace(PAGE.read_text(), section, "scaling.py", text))


if __name__ == "__main__":
    main()
