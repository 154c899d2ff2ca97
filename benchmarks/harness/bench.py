"""What the benchmarks share: times of runs in turn, peak memory, tables, and results.

The results of a script are sections, a table each, kept in benchmarks/results/NAME_DEVICE.json. A
run replaces those that it measured; docs/performance.md is written from all of them.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks of GPUs that aren't there

import torch

from k_diffusion.common import memory

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20
MATMUL = "matmul"
COPY = "copy"

Run: TypeAlias = Callable[[], object]
Row: TypeAlias = dict[str, Any]
# {"on": what it was measured on, "rows": [...], "notes": [...]}
Section: TypeAlias = dict[str, Any]
# key of a row: (its heading, how its values are written)
Columns: TypeAlias = Mapping[str, tuple[str, Callable[[Any], str]]]

# ---------------------------------------------------------------- time


def clock(device: torch.device) -> float:
    """Seconds, when the device has done all that it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def seconds(run: Run, device: torch.device, number: int = 1) -> float:
    """Seconds of a run, the mean of so many in a row."""
    start = clock(device)
    for _ in range(number):
        run()
    return (clock(device) - start) / number


def in_turn(
    runs: Mapping[str, Run],
    device: torch.device,
    budget: float = 3.0,
    rounds: tuple[int, int] = (3, 25),
    shortest: float = 0.01,
) -> dict[str, float]:
    """The median seconds of runs that are to be compared.

    They are measured in turn, A B A B ..., so that a machine that slows down does so for all of
    them: after two runs of each to warm up, one if that takes a second, as many rounds as take
    `budget` seconds, within the bounds of `rounds`. Short runs are repeated until they take
    `shortest` seconds per round, and those below a quarter of a second begin each turn with one
    that isn't timed: they then find the caches and the allocator as their own run left them.
    """
    numbers, brief = {}, set()
    for name, run in runs.items():
        once = seconds(run, device)
        once = once if once > 1 else seconds(run, device)
        numbers[name] = max(1, math.ceil(shortest / once))
        if once < 0.25:
            brief.add(name)
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(1, rounds[1] + 1):
        for name, run in runs.items():
            if name in brief:
                run()
            times[name].append(seconds(run, device, numbers[name]))
        if done >= rounds[0] and time.perf_counter() - start > budget:
            break
    return {name: statistics.median(measured) for name, measured in times.items()}


class Matmul:
    """A product of square matrices, whose rate is the limit of what computes by products.

    flop: its floating point operations.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, n: int | None = None):
        n = n or (1024 if device.type == "cpu" else 8192)
        self.a, self.b, self.out = (
            torch.randn(n, n, device=device, dtype=dtype) / n**0.5 for _ in range(3)
        )
        self.flop = 2 * n**3

    def __call__(self) -> None:
        torch.mm(self.a, self.b, out=self.out)


class Copy:
    """A copy of a large tensor, whose rate is the limit of what moves data.

    bytes: those that it reads and those that it writes.
    """

    def __init__(self, device: torch.device, mib: int = 1024):
        self.a = torch.empty(mib * MIB, device=device, dtype=torch.uint8)
        self.b = torch.ones_like(self.a)
        self.bytes = 2 * self.a.nbytes

    def __call__(self) -> None:
        self.a.copy_(self.b)


# ---------------------------------------------------------------- memory


def peak_memory(run: Run, device: torch.device) -> int:
    """The most bytes of tensors that a run holds at once, beyond those from before it.

    The run should have warmed up.
    """
    if device.type == "cpu":
        return _peak_of_allocations(run)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_allocations(run: Run) -> int:
    """By the profiler's events, one an allocation (of positive size) or release (of negative)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return most


# ---------------------------------------------------------------- what it is measured on


def describe(device: torch.device, dtype: str | None = None) -> str:
    """The machine and PyTorch, in a line."""
    if device.type == "cuda":
        parts = [torch.cuda.get_device_name(device), f"CUDA {torch.version.cuda}"]
    else:
        cores = memory.cores()
        threads = torch.get_num_threads()
        parts = [
            _cpu(),
            f"{cores} core{'s' * (cores != 1)}, {threads} thread{'s' * (threads != 1)}",
        ]
    version = torch.__version__.split("+")[0]
    return ", ".join([*parts, f"PyTorch {version}", *([dtype] if dtype else [])])


def _cpu() -> str:
    """Its name, and the instructions that matrix products depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    flags = found.get("flags", "").split()
    has = [torch.backends.cpu.get_cpu_capability(), *(["AMX"] if "amx_bf16" in flags else [])]
    return f"{name} ({', '.join(has)})"


# ---------------------------------------------------------------- tables


def digits(x: float) -> str:
    """Three significant digits, without an exponent above 1."""
    return f"{x:.3g}" if abs(x) < 999.5 else f"{x:,.0f}"


def percent(x: float) -> str:
    return f"{x:.0%}" if x >= 0.0995 else f"{x:.1%}"


def table(columns: Columns, rows: Sequence[Row]) -> str:
    """Rows as Markdown, with the columns that any of them has; a "-" where one has none.

    Numbers are right-aligned. A row whose key "bold" is true is in bold.
    """
    columns = {key: c for key, c in columns.items() if any(r.get(key) is not None for r in rows)}

    def cell(row: Row, key: str) -> str:
        value = row.get(key)
        text = "-" if value is None else columns[key][1](value)
        return f"**{text}**" if row.get("bold") and value is not None else text

    lines = [[heading for heading, _ in columns.values()]]
    lines += [[cell(row, key) for key in columns] for row in rows]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    right = [not any(isinstance(row.get(key), str) for row in rows) for key in columns]

    def line(cells: Iterable[str]) -> str:
        padded = (c.rjust(n) if r else c.ljust(n) for c, n, r in zip(cells, widths, right))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (n + 1) + (":" if r else "-") for n, r in zip(widths, right))
    return "\n".join([line(lines[0]), f"|{rule}|", *map(line, lines[1:])])


def text(name: str, section: Section, columns: Columns) -> str:
    """A section as Markdown."""
    parts = [f"**{name}**, on {section['on']}", table(columns, section["rows"])]
    return "\n\n".join([*parts, *section.get("notes", ())])


# ---------------------------------------------------------------- results


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def read(name: str, device: str, folder: Path = RESULTS) -> dict[str, Section]:
    """The sections that were measured on a kind of device (cpu, cuda)."""
    path = folder / f"{name}_{device}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(name: str, device: str, sections: Mapping[str, Section], folder: Path = RESULTS) -> None:
    """Lay sections over those that were measured before."""
    path = folder / f"{name}_{device}.json"
    folder.mkdir(parents=True, exist_ok=True)
    both = read(name, device, folder) | _rounded(dict(sections))
    path.write_text(json.dumps(both, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def write(
    name: str, device: str, script: str, columns: Columns, folder: Path = RESULTS, page: Path = PAGE
) -> None:
    """Put all sections of a kind of device between their markers on the page."""
    from .page import replace

    sections = read(name, device, folder)
    if not sections:
        raise SystemExit(f"nothing to write: there are no results of {name} on {device}")
    tables = "\n\n".join(text(key, section, columns) for key, section in sections.items())
    page.write_text(replace(page.read_text(), f"{name} {device}", script, tables))
    print(f"wrote {page.relative_to(ROOT) if page.is_relative_to(ROOT) else page}")


# ---------------------------------------------------------------- command line


def parser(doc: str) -> argparse.ArgumentParser:
    """With the options that all benchmarks of speed have."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on GPUs, fp32 on CPUs")
    p.add_argument("--quick", action="store_true", help="the smallest case, in seconds; not saved")
    p.add_argument("--write", action="store_true", help="put all results in docs/performance.md")
    p.add_argument("--no-run", action="store_true", help="measure nothing: only --write")
    p.add_argument(
        "--results", type=Path, metavar="FOLDER", help="to save to, in place of benchmarks/results"
    )
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with the device and the dtype (a key of DTYPES) filled in."""
    args = p.parse_args(argv)
    args.device = torch.device(args.device)
    if args.device.type not in ("cpu", "cuda"):
        p.error(f"memory can be measured on cpu and cuda alone, got {args.device}")
    args.dtype = args.dtype or ("fp32" if args.device.type == "cpu" else "bf16")
    args.on = describe(args.device, args.dtype)
    return args


def finish(
    name: str,
    script: str,
    args: argparse.Namespace,
    sections: Mapping[str, Section],
    columns: Columns,
) -> None:
    """Save the sections that were measured, which were printed already, and write the page."""
    device = args.device.type
    if sections and (args.results or not args.quick):
        save(name, device, sections, args.results or RESULTS)
    if args.write:
        write(name, device, script, columns, args.results or RESULTS)
