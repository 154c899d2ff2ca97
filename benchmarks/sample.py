"""Sampling: images per second, eager and compiled.

Both draw the same images, measured in turn. Utilisation is the time of the model's
multiply-accumulates at the rate of a matrix product measured in turn with the rest, by the time of
the batch.

    python benchmarks/sample.py [--device cuda] [--dtype bf16] [--config flowers] [--write]
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from harness import bench, cases
from harness.bench import MATMUL, MIB, Matmul, Row, Section
from harness.cases import Case
from train_step import first

import k_diffusion as K
from k_diffusion import generation
from k_diffusion.config import make_denoiser_wrapper
from k_diffusion.models import flops

SAMPLER = "dpmpp_2m"
# A row's name, and the arguments of `compile_model`.
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "eager": ("eager", {}),
    "compiled": ("compiled", {"unit": "model"}),
    "cuda-graphs": ("compiled, CUDA graphs", {"unit": "model", "mode": K.models.CUDA_GRAPHS}),
    "by-block": ("compiled by block", {"unit": "block"}),
}

COLUMNS: bench.Columns = {
    "way": ("model", str),
    "ms": ("ms a batch", bench.digits),
    "images": ("images / s", bench.digits),
    "speed": ("speed, eager = 1", bench.digits),
    "mib": ("peak MiB", bench.digits),
    "utilisation": ("utilisation", bench.percent),
    "compile": ("first two steps, s", bench.digits),
}


def sampling(case: Case, inner: Any, steps: int, device: torch.device, dtype: str) -> bench.Run:
    """A function that samples a batch."""
    config = case.load()
    model, classes = config["model"], config["dataset"]["num_classes"]
    denoiser = make_denoiser_wrapper(config)(inner).eval().requires_grad_(False)
    sigmas = K.sampling.get_sigmas_karras(
        steps, model["sigma_min"], model["sigma_max"], device=device
    )
    autocast = (
        torch.autocast(device.type, bench.DTYPES[dtype]) if dtype != "fp32" else nullcontext()
    )

    def run() -> torch.Tensor:
        batches = generation.generate(
            denoiser,
            (model["input_channels"], *case.size),
            range(case.batch),
            sigmas,
            classes=[i % classes for i in range(case.batch)] if classes else None,
            num_classes=classes,
            sampler=SAMPLER,
            batch_size=case.batch,
            device=device,
            disable=True,
        )
        with autocast:
            return next(iter(batches))

    return run


def measure(case: Case, names: Sequence[str], args: Any, budget: float) -> Section:
    """A case's table."""
    torch._dynamo.reset()
    inner = cases.inner_model(case.load(), args.device)
    tensors = {id(x): x for x in [*inner.parameters(), *inner.buffers()]}
    runs: dict[str, bench.Run] = {}
    two_steps: dict[str, bench.Run] = {}  # for what doesn't depend on their number
    for name in names:
        model, how = copy.deepcopy(inner, dict(tensors)), WAYS[name][1]
        model = K.models.compile_model(model, **how) if how else model
        runs[name] = sampling(case, model, args.steps, args.device, args.dtype)
        two_steps[name] = sampling(case, model, 2, args.device, args.dtype)
    took = first(two_steps, args.device)
    runs = {name: runs[name] for name in took}
    matmul = Matmul(args.device, bench.DTYPES[args.dtype])
    times = bench.in_turn({**runs, MATMUL: matmul}, args.device, budget)
    with flops.flop_counter() as counter:
        sampling(case, inner, 2, args.device, args.dtype)()
    flop = 2 * counter.flops / 2 * args.steps  # one evaluation per step
    rows: list[Row] = [
        {
            "way": WAYS[name][0],
            "ms": times[name] * 1e3,
            "images": case.batch / times[name],
            "speed": times["eager"] / times[name] if "eager" in times else None,
            "mib": bench.peak_memory(two_steps[name], args.device) / MIB,
            "utilisation": flop / times[name] / (matmul.flop / times[MATMUL]),
            "compile": took[name] if WAYS[name][1] else None,
        }
        for name in runs
    ]
    return {"on": args.on, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    p = bench.parser(__doc__)
    cases.add_arguments(p, WAYS)
    p.add_argument("--steps", type=int, default=20)
    args = bench.parse(p, argv)
    asked = cases.rows(p, args, WAYS)
    sections = {}
    for case in () if args.no_run else cases.choose(args):
        leave_out = [*case.leave_out, *(["cuda-graphs"] if args.device.type != "cuda" else [])]
        names = asked or [name for name in WAYS if name not in leave_out]
        title = f"{case.title(args.dtype)}, {args.steps} steps of {SAMPLER}"
        sections[title] = measure(case, names, args, 0.0 if args.quick else 5.0)
        print(bench.text(title, sections[title], COLUMNS), end="\n\n", flush=True)
    bench.finish("sample", "sample.py", args, sections, COLUMNS)


if __name__ == "__main__":
    main()
