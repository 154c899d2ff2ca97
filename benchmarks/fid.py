"""FID over many features: time and memory, beside the published form in float32.

Both get the same two sets of features in float32, one after the other. The published form takes
square roots of whole covariances by their eigenvectors, in float32. Seconds are those of all cores
together, so that other processes on them count little.

    python benchmarks/fid.py [-n 50000] [-d 2048] [--write]
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from harness import bench

import k_diffusion as K

BATCH = 1000
COLUMNS: bench.Columns = {
    "way": ("FID by", str),
    "s": ("CPU s", bench.digits),
    "ratio": ("float32 / it", bench.digits),
    "mib": ("MiB beside the features", bench.digits),
    "value": ("its value", "{:.6g}".format),
    "identical": ("of half as many samples as features and themselves", "{:.1g}".format),
}


def features(seed: int, n: int, d: int, device: torch.device) -> torch.Tensor:
    """Features (n, d) whose standard deviations fall over three decades, as a network's do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    return x.mul_(torch.logspace(0, -3, d)).add_(0.01 * (seed + 1)).to(device)


def published_form(x: torch.Tensor, y: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """FID in the features' dtype, by square roots of covariances."""

    def root(a: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(a)
        return (vectors * values.abs().sqrt()) @ vectors.T

    ridge = eps * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    a, b = torch.cov(x.T) + ridge, torch.cov(y.T) + ridge
    half = root(a)
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return shift + a.trace() + b.trace() - 2 * root(half @ b @ half).trace()


WAYS = {"published form, float32": published_form, "`fid`": K.evaluation.fid}


def process_peak(n: int, d: int) -> int:
    """MiB of a whole process in which features are made, counted and dropped batch by batch."""
    parts = [K.evaluation.FeatureStatistics(d) for _ in range(2)]
    for start in range(0, n, BATCH):
        for i, part in enumerate(parts):
            part.update(features(2 * start + i, min(BATCH, n - start), d, torch.device("cpu")))
    K.evaluation.frechet_distance(*parts)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(argv: Sequence[str] | None = None) -> None:
    p = bench.parser(__doc__)
    p.add_argument("-n", type=int, default=50000, help="features in each set")
    p.add_argument("-d", type=int, default=2048, help="their width")
    p.add_argument(
        "--process-peak", action="store_true", help="print the MiB of a process, streamed"
    )
    args = bench.parse(p, argv)
    if args.quick:
        args.n, args.d = 3000, 64
    if args.process_peak:
        return print(process_peak(args.n, args.d))
    sections = {} if args.no_run else {f"{args.n:,} x {args.d:,}": measure(args)}
    for name, section in sections.items():
        print(bench.text(name, section, COLUMNS))
    bench.finish("fid", "fid.py", args, sections, COLUMNS)


def measure(args) -> bench.Section:
    section: bench.Section = {"on": args.on, "rows": []}
    if args.device.type == "cpu":
        size = ["-n", str(args.n), "-d", str(args.d)]
        command = [sys.executable, __file__, "--process-peak", *size]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    x, y = (features(seed, args.n, args.d, args.device) for seed in (0, 1))
    few = x[: args.d // 2]
    for name, way in WAYS.items():
        found = {}

        def run(way=way, found=found):
            start = seconds(args.device)
            found["value"] = float(way(x, y))
            found["s"] = seconds(args.device) - start

        found["mib"] = bench.peak_memory(run, args.device) / bench.MIB
        found["identical"] = float(way(few, few))
        section["rows"].append({"way": name, **found})
    for row in section["rows"]:
        row["ratio"] = section["rows"][0]["s"] / row["s"]
    if args.device.type == "cpu":
        peak = process.communicate()[0].strip()
        section["notes"] = [
            "A whole process that makes both sets batch by batch and takes their FID peaks at "
            f"{peak} MiB, PyTorch included."
        ]
    return section


def seconds(device: torch.device) -> float:
    """Seconds of all of this process's threads, or on another device of the clock."""
    return time.process_time() if device.type == "cpu" else bench.clock(device)


if __name__ == "__main__":
    main()
