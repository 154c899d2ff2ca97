"""`train.py --dry-run`: what a run would cost, before it runs."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ... import distributed
from ...common.modules import n_params
from ...common.options import UsageError
from ...common.tensors import DTYPES
from ...common.text import aligned, unknown_name
from ...config import make_denoiser_wrapper, make_model
from ...models import attention
from ...models.compiling import blocks
from ...models.flags import CHECKPOINTING
from ...models.levels import Level
from .footprint import Step, estimate_steps
from .levels import make_levels

# In fp8 matrix products alone are narrower; activations are counted as in bf16.
AUTOCAST: dict[str, torch.dtype | None] = {
    "no": None,
    "fp16": DTYPES["fp16"],
    "bf16": DTYPES["bf16"],
    "fp8": DTYPES["bf16"],
}

# Bytes of an optimizer's state for each parameter.
OPTIMIZER_STATE: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "adamw": lambda o: 8,
    "adam8bit": lambda o: 2,
    "sgd": lambda o: 4 if o["momentum"] else 0,
    "muon": lambda o: 8,  # at most: 4 for those of Muon
}


@dataclass(frozen=True)
class DryRun:
    """What a run would cost; as a string, a report.

    setting: device and precision. parts: of a step, (images, batches, processes). checkpointing:
    the run's. states: bytes of what is there all the time, by name. macs: multiply-accumulates of
    an image's forward pass. activations: bytes of a batch, by way of checkpointing. notes: on
    these estimates.
    """

    setting: str
    parts: tuple[int, int, int]
    checkpointing: str
    parameters: int
    states: Mapping[str, int]
    macs: int
    levels: Sequence[Level]
    activations: Mapping[str, Step]
    notes: Sequence[str]

    def __str__(self) -> str:
        n, batches, processes = self.parts
        step = n * batches * processes
        always = sum(self.states.values())
        what = "a forward and a backward pass, which costs twice as much, of"
        facts = [
            ["parameters", f"{self.parameters:,}"],
            *([name, size(bytes_)] for name, bytes_ in self.states.items()),
            ["these together", size(always)],
            ["forward, 1 image", count(self.macs)],
            ["a training step", f"{count(3 * step * self.macs)}: {what} {step} images"],
        ]
        levels = [
            ["level", "tokens", "width", "depth", "heads", "attention", "backend"],
            *(
                [
                    f"{i}",
                    f"{level.h} x {level.w}",
                    f"{level.width}",
                    level.depth,
                    f"{level.heads} x {level.geometries[0].d_head}" if level.heads else "-",
                    level.attention,
                    level.backend,
                ]
                for i, level in enumerate(self.levels)
            ),
        ]
        activations = [
            ["checkpointing", "for backward", "at most", "per image", "with all the above"],
            *(
                [
                    f"{mode} (this run)" if mode == self.checkpointing else mode,
                    size(a.kept),
                    size(a.most),
                    size(a.most / n),
                    size(a.most + always),
                ]
                for mode, a in self.activations.items()
            ),
        ]
        return "\n".join(
            [
                f"{self.setting}; per step {n} images x {batches} batches x {processes} processes",
                "",
                *aligned(facts),
                "",
                *aligned(levels),
                "",
                f"estimated memory of the activations of {n} images:",
                *aligned(activations),
                *self.notes,
            ]
        )


def size(n: float) -> str:
    """Bytes as text, e.g. 1.5 MiB."""
    return _with_unit(n, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))


def count(n: float) -> str:
    """Multiply-accumulates as text, e.g. 1.5 GMAC."""
    return _with_unit(n, 1000, ("MAC", "KMAC", "MMAC", "GMAC", "TMAC", "PMAC"))


def _with_unit(n: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while n >= base and power < len(units) - 1:
        n, power = n / base, power + 1
    return f"{n:,.0f} {units[power]}" if n >= 100 else f"{n:.3g} {units[power]}"


def dry_run(
    config: Mapping[str, Any],
    device: torch.device | str = "cpu",
    mixed_precision: str = "no",
    batch_size: int = 64,
    accumulate: int = 1,
    processes: int = 1,
    checkpointing: str = "off",
    averages: int = 1,
    fsdp: str | None = None,
) -> DryRun:
    """What training would cost with a config, as `load_config` returns it; it needs no data.

    mixed_precision: a row of AUTOCAST. batch_size: images per process and batch, `accumulate`
    batches per step. checkpointing: a row of CHECKPOINTING. averages: that it keeps. fsdp: a row
    of sharding.WAYS, if the states are split over the processes.

    Raises ValueError for what the model or the device can't do.
    """
    device = torch.device(device)
    if mixed_precision not in AUTOCAST:
        raise unknown_name("--mixed-precision", mixed_precision, AUTOCAST)
    if checkpointing not in CHECKPOINTING:
        raise unknown_name("--checkpointing", checkpointing, CHECKPOINTING)
    autocast = AUTOCAST[mixed_precision]
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("--mixed-precision fp16 needs a GPU; the CPU has bf16 and no")
    make_denoiser_wrapper(config)  # refuses what is no denoiser
    with torch.device("meta"):
        inner = make_model(config)
    notes = []
    if buckets := config["dataset"].get("buckets"):
        h, w = max(buckets, key=math.prod)
        config = {**config, "model": {**config["model"], "input_size": [h, w]}}
        notes.append(f"all of it with images of the largest bucket, {h} x {w}")
    h, w = config["model"]["input_size"]
    levels = make_levels(inner, h, w, device, autocast or torch.float32)
    kernels = [
        level.backend
        for level in levels
        if level.geometries
        and not attention.BACKENDS[level.geometries[0].name][level.backend].plain
    ]
    notes += [
        f"{name} is taken to keep what torch's fused attention does: q, k, v and its output"
        for name in dict.fromkeys(kernels)
    ]
    tokens = max(
        [1, *(level.h * level.w for level in levels if level.attention not in ("global", "none"))]
    )
    try:
        steps = estimate_steps(config, device, autocast, batch_size, tokens)
    except RuntimeError as error:  # fake tensors don't know every operation of every device
        if device.type == "cpu":
            raise
        said = str(error).splitlines()[0]
        notes.append(f"as on the CPU: {device.type} can't be estimated ({said})")
        steps = estimate_steps(config, torch.device("cpu"), autocast, batch_size, tokens)

    parameters = n_params(inner)
    weights = sum(x.numel() * x.element_size() for x in inner.state_dict().values())
    optimizer = config["optimizer"]
    per_parameter = OPTIMIZER_STATE[optimizer["type"]](optimizer)
    states = {
        "weights": weights,
        "gradients": 4 * parameters,
        f"{optimizer['type']} state": per_parameter * parameters,
        "averaged weights": weights * averages,
    }
    setting = f"{config['model']['type']} on {device.type}, precision {mixed_precision}"
    if fsdp:
        states = {f"1/{processes} of {name}": -(-n // processes) for name, n in states.items()}
        states["gathered at once"] = gathered(inner, fsdp)
        setting += ", memory of each process"
    return DryRun(
        setting=setting,
        parts=(batch_size, accumulate, processes),
        checkpointing=checkpointing,
        parameters=parameters,
        states=states,
        macs=next(iter(steps.values())).macs // batch_size,
        levels=levels,
        activations=steps,
        notes=notes,
    )


def gathered(inner: nn.Module, fsdp: str) -> int:
    """The most bytes of whole weights and gradients that a process of FSDP2 has at once.

    What is in no block stays from the forward to the backward pass, where its gradients join it. Of
    blocks there are the weights of one, those of the next one on their way, and the gradients of
    one, twice as they are sent; with "keep", the weights of all.
    """
    sizes = [4 * n_params(block) for block in blocks(inner)]
    rest, largest = 4 * n_params(inner) - sum(sizes), max(sizes, default=0)
    return 2 * rest + (sum(sizes) if fsdp == "keep" else 2 * largest) + 2 * largest


# ---------------------------------------------------------------- as train.py runs it

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def _environment(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def main(args: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """Print what a run with these arguments would cost, and to stdout its config as JSON.

    Of several processes the main one prints. They don't meet, no port is opened and no file
    written.
    """
    if _environment(_RANKS, 0):
        return
    processes = _environment(distributed.LAUNCHED, distributed.processes_missing() or 1)
    if args.fsdp and processes == 1:
        raise UsageError(
            "--fsdp splits a model over processes: say how many there will be, as in "
            "`WORLD_SIZE=8 python train.py ... --fsdp --dry-run`"
        )
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True"
    found = None if on_cpu else torch.accelerator.current_accelerator(check_available=True)
    run = dry_run(
        config,
        device=found or "cpu",
        mixed_precision=args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        batch_size=args.batch_size,
        accumulate=args.grad_accum_steps,
        processes=processes,
        checkpointing=args.checkpointing,
        averages=1 + len(args.power_ema),
        fsdp=args.fsdp,
    )
    print(run, file=sys.stderr, flush=True)
    print(json.dumps(config, indent=2))
