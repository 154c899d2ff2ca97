"""A training step: loss on random images, backward, clipping, optimizer, averaged weights.

Rows stand for ways to run it, measured in turn on the same weights: the straightforward form
(harness.plain_step), also with neighborhood attention by brute force, and the package's own step,
eager, checkpointed and compiled. Utilisation is the time of the model's multiply-accumulates, three
times those of a forward pass, at the rate of a matrix product measured in turn with the rest, by
the time of the step; what checkpointing recomputes doesn't count. Peak memory is beyond weights,
averaged weights and the optimizer's state: activations, gradients, temporaries.

    python benchmarks/train_step.py [--device cuda] [--dtype bf16] [--config flowers] [--write]
    python benchmarks/train_step.py --profile          # where the time of a step goes
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from harness import bench, cases, plain_step, step_profile
from harness.bench import MATMUL, MIB, Matmul, Row, Section
from harness.cases import Case
from torch import nn

import k_diffusion as K
from k_diffusion.config import make_denoiser_wrapper, make_sample_density
from k_diffusion.models import flops
from k_diffusion.training.optim import make_optimizer
from k_diffusion.training.step import batch_loss

DECAY = 0.999


@dataclass(frozen=True)
class Way:
    """One way to run a training step.

    name: in the table. within: the context of the forward and backward pass. plain: whether
    AdamW and the average are the straightforward ones. unit: what is compiled, of `compile_model`.
    """

    name: str
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    plain: bool = False
    unit: str | None = None


WAYS = {
    "straightforward": Way("straightforward", plain_step.plain, plain=True),
    "brute-force": Way(
        "straightforward, brute-force mask",
        partial(plain_step.plain, brute_force=True),
        plain=True,
    ),
    "eager": Way("eager"),
    "norms": Way("eager, norms by formula", partial(plain_step.formulas, "rms_norm")),
    "qk": Way("eager, q and k by formula", partial(plain_step.formulas, "normalize_and_rotate")),
    "checkpointed": Way("checkpointed", K.models.checkpointing),
    "selective": Way(
        "checkpointed but for attention", partial(K.models.checkpointing, keep_attention=True)
    ),
    "compiled": Way("compiled", unit="model"),
    "by-block": Way("compiled by block", unit="block"),
}

COLUMNS: bench.Columns = {
    "way": ("step", str),
    "ms": ("ms", bench.digits),
    "images": ("images / s", bench.digits),
    "speed": ("speed, straightforward = 1", bench.digits),
    "mib": ("peak MiB", bench.digits),
    "memory": ("memory, straightforward = 1", bench.digits),
    "utilisation": ("utilisation", bench.percent),
    "compile": ("first step, s", bench.digits),
}


class Trainee:
    """A model in training, whose steps can be run in several ways on the same weights."""

    def __init__(self, config: dict[str, Any], n: int, device: torch.device, dtype: str):
        self.config, self.n, self.device = config, n, device
        self.autocast = bench.DTYPES[dtype]
        self.inner = cases.inner_model(config, device)
        self.averaged = copy.deepcopy(self.inner).eval().requires_grad_(False)
        self.batch = cases.batch_of(config, n)
        if device.type == "cuda":
            self.batch = {key: x.pin_memory() for key, x in self.batch.items()}
        self.density = make_sample_density(config["model"])
        self.make_denoiser = make_denoiser_wrapper(config)
        self._optimizers: dict[bool, torch.optim.Optimizer] = {}

    def optimizer(self, plain: bool) -> torch.optim.Optimizer:
        """The one of all ways that are plain, or of all that aren't: they share its state."""
        if plain not in self._optimizers:
            make = plain_step.make_optimizer if plain else make_optimizer
            self._optimizers[plain] = make(self.config, self.inner)
        return self._optimizers[plain]

    def loss(self, inner: nn.Module) -> torch.Tensor:
        enabled = self.autocast != torch.float32
        with torch.autocast(self.device.type, self.autocast, enabled=enabled):
            denoiser = self.make_denoiser(inner)
            losses = batch_loss(denoiser, self.batch, self.density, self.config, self.device)
        return losses.mean()

    def macs(self) -> int:
        """Multiply-accumulates of the forward pass of a batch."""
        with torch.no_grad(), flops.flop_counter() as counter:
            self.loss(self.inner)
        return counter.flops

    def step(self, way: Way) -> bench.Run:
        """A function that takes a step."""
        inner = self.inner
        if way.unit:
            # another module with the same parameters, to be compiled beside this one
            tensors = [*inner.parameters(), *inner.buffers()]
            inner = copy.deepcopy(inner, {id(x): x for x in tensors})
            inner = K.models.compile_model(inner, way.unit)
        opt = self.optimizer(way.plain)
        update = plain_step.ema_update if way.plain else K.utils.ema_update
        max_norm = self.config["optimizer"]["max_grad_norm"]
        parameters = list(inner.parameters())

        def step() -> None:
            with way.within():
                self.loss(inner).backward()
            with torch.profiler.record_function(step_profile.OPTIMIZER):
                if max_norm is not None:
                    foreach = False if way.plain else None
                    nn.utils.clip_grad_norm_(parameters, max_norm, foreach=foreach)
                opt.step()
                opt.zero_grad(set_to_none=True)
                update(inner, self.averaged, DECAY)

        return step


def first(runs: Mapping[str, bench.Run], device: torch.device) -> dict[str, float]:
    """Seconds of the first run of each, with nothing compiled before; of those that have the
    memory."""
    took = {}
    for name, run in runs.items():
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
        ):
            try:
                took[name] = bench.seconds(run, device)
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory", flush=True)
    return took


def ways_of(case: Case, asked: Sequence[str]) -> list[str]:
    """The rows of a case: those that were asked for or, if none were, all but those it leaves out.
    Brute force is one of neighborhood attention alone."""
    names = asked or [name for name in WAYS if name not in case.leave_out]
    kinds = {attn["type"] for attn in case.load()["model"].get("self_attns") or ()}
    return [name for name in names if name != "brute-force" or "neighborhood" in kinds]


def measure(case: Case, names: Sequence[str], args: Any, budget: float) -> Section:
    """A case's table, a row a way."""
    torch._dynamo.reset()
    trainee = Trainee(case.load(), case.batch, args.device, args.dtype)
    flop = 3 * 2 * trainee.macs()
    runs = {name: trainee.step(WAYS[name]) for name in names}
    took = first(runs, args.device)
    runs = {name: runs[name] for name in took}
    matmul = Matmul(args.device, bench.DTYPES[args.dtype])
    times = bench.in_turn({**runs, MATMUL: matmul}, args.device, budget)
    peaks = {name: bench.peak_memory(run, args.device) for name, run in runs.items()}
    base = "straightforward"
    rows = [
        {
            "way": WAYS[name].name,
            "ms": times[name] * 1e3,
            "images": case.batch / times[name],
            "speed": times[base] / times[name] if base in times else None,
            "mib": peaks[name] / MIB,
            "memory": peaks[name] / peaks[base] if base in peaks else None,
            "utilisation": flop / times[name] / (matmul.flop / times[MATMUL]),
            "compile": took[name] if WAYS[name].unit else None,
        }
        for name in runs
    ]
    gradients = sum(p.nbytes for p in trainee.inner.parameters()) / MIB
    note = (
        f"A forward pass is {flop / 6 / case.batch / 1e9:.3g} GMAC an image; a matrix product runs "
        f"at {bench.digits(matmul.flop / times[MATMUL] / 1e9)} GFLOP/s. Of the peak, up to "
        f"{bench.digits(gradients)} MiB are gradients."
    )
    return {"on": args.on, "rows": rows, "notes": [note]}


def profile(case: Case, args: Any) -> Section:
    """Where a step's time goes, eager and straightforward."""
    trainee = Trainee(case.load(), case.batch, args.device, args.dtype)
    ways = {name: WAYS[name] for name in ("eager", "straightforward")}
    steps = {name: trainee.step(way) for name, way in ways.items()}
    times = bench.in_turn(steps, args.device, 0.0 if args.quick else 5.0)
    number = 1 if args.quick else max(3, int(3 / times["eager"]))
    parts = {}
    for name, way in ways.items():
        marked = replace(way, within=partial(step_profile.marked, way.within))
        parts[name] = step_profile.by_class(trainee.step(marked), args.device, number)
    rows: list[Row] = [
        {
            "part": part,
            **{name: parts[name].get(part, 0) * times[name] * 1e3 for name in ways},
            "share": share,
        }
        for part, share in parts["eager"].items()
    ]
    total = {name: times[name] * 1e3 for name in ways}
    rows.append({"part": "a step", **total, "share": 1.0, "bold": True})
    return {"on": args.on, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    p = bench.parser(__doc__)
    cases.add_arguments(p, WAYS)
    p.add_argument("--profile", action="store_true", help="where the time of an eager step goes")
    args = bench.parse(p, argv)
    asked = cases.rows(p, args, WAYS)
    chosen = cases.choose(args)
    name, columns = ("profile", step_profile.COLUMNS) if args.profile else ("train_step", COLUMNS)
    sections = {}
    for case in () if args.no_run else chosen:
        if args.profile:
            section = profile(case, args)
        else:
            section = measure(case, ways_of(case, asked), args, budget=0.0 if args.quick else 8.0)
        sections[case.title(args.dtype)] = section
        print(bench.text(case.title(args.dtype), section, columns), end="\n\n", flush=True)
    bench.finish(name, "train_step.py", args, sections, columns)


if __name__ == "__main__":
    main()
