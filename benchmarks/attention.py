"""Self-attention by each backend that can run here: time, memory, and how far from the limit.

Memory is the peak of a call, with the masks and indices that are kept between calls. The limit is
the time of the exact operation's multiply-accumulates, three times as many with the backward
pass, at the rate of a matrix product, which is measured in turn with the backends. On a GPU it is
at least the time to read q, k and v and to write the output once, and three times as much with the
backward pass, at the rate of a copy. Brute force is torch's fused attention over all tokens with an
N x N mask; the reference, where there is no mask.

    python benchmarks/attention.py [--device cuda] [--dtype bf16] [--kernel-size 7] [--write]
"""

import k_diffusion.common.cpu  # noqa: F401  (before torch, which loads OpenMP)

# isort: split
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from harness import bench
from harness.bench import COPY, MATMUL, MIB, Copy, Matmul, Row, Section
from torch.nn.attention import SDPBackend, sdpa_kernel

from k_diffusion.models import flops
from k_diffusion.models.attention import (
    BACKENDS,
    Backend,
    Geometry,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    Request,
    ShiftedWindowAttentionSpec,
    choose_backend,
    neighborhood,
    reasons,
    shifted_window,
    tiles,
)

D_HEAD = 64
WINDOW_SIZE = 8
# samples, tokens of a side, heads; by the type of device
SHAPES = {
    "cpu": [(4, 16, 2), (4, 32, 4), (2, 64, 2), (1, 128, 2), (1, 256, 1)],
    "cuda": [(64, 16, 24), (32, 32, 12), (32, 64, 6), (8, 128, 4), (8, 256, 2)],
}
SDPA_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
BRUTE_FORCE = "brute force"
# What took so many seconds isn't run on larger grids.
TOO_LONG = 1.0
# Bytes of a mask of all tokens, and of the scores of all heads, that are not too many.
LARGEST_MASK = 1.1 * 2**30
LARGEST_SCORES = 0.6 * 2**30

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

COLUMNS: bench.Columns = {
    "shape": ("samples x tokens x heads", str),
    "backend": ("backend", str),
    "forward": ("forward, ms", bench.digits),
    "forward_mib": ("MiB", bench.digits),
    "forward_share": ("of the limit", bench.percent),
    "forward_ratio": ("brute force / it", bench.digits),
    "both": ("with backward, ms", bench.digits),
    "both_mib": ("MiB", bench.digits),
    "both_share": ("of the limit", bench.percent),
    "both_ratio": ("brute force / it", bench.digits),
}


def inputs(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k of cosine-similarity attention with scale 10, and v, a part of a projection."""
    n, side, heads = shape
    torch.manual_seed(0)
    qkv = torch.randn(n, side, side, 3, heads, D_HEAD, device=device)
    q, k = (10**0.5 * F.normalize(qkv[..., i, :, :], dim=-1) for i in (0, 1))
    return q.to(dtype), k.to(dtype), qkv.to(dtype)[..., 2, :, :]


class BruteForce:
    """Torch's fused attention with an N x N mask, made beforehand."""

    def __init__(
        self, geometry: Geometry, side: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        seen = geometry.mask(side, side).to(device)
        mask = torch.zeros(seen.shape, device=device, dtype=dtype)
        self.mask = mask.masked_fill_(~seen, -torch.inf)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q_, k_, v_ = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=self.mask, scale=1.0)
        return out.transpose(1, 2).reshape(q.shape)


def by_backend(backend: Backend, geometry: Geometry) -> Attention:
    return lambda q, k, v: backend.run(q, k, v, geometry)


def by_sdpa_kernel(kernel: SDPBackend, geometry: Geometry) -> Attention:
    sdpa = BACKENDS["global"]["sdpa"].run

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(kernel):
            return sdpa(q, k, v, geometry)

    return run


def kept(attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    """Bytes of the masks and indices that a backend keeps for the next call."""
    if isinstance(attention, BruteForce):
        return attention.mask.nbytes
    plans = {}

    def record(*args: Any) -> torch.Tensor:
        plans[id(args[-1])] = args[-1]
        return tiles.tiled_attention(*args)

    with ExitStack() as stack:
        for module in (neighborhood, shifted_window):
            stack.enter_context(mock.patch.object(module, "tiled_attention", record))
        attention(q, k, v)
    held = [x for plan in plans.values() for x in (plan.mask, *(plan.index or ()))]
    return sum(x.nbytes for x in held if x is not None)


def candidates(
    geometry: Geometry,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    needs_grad: bool,
) -> dict[str, Attention]:
    """Brute force and the backends, those that can run and whose memory isn't out of bounds."""
    n, side, heads = shape
    request = Request(geometry, side, side, device.type, dtype, needs_grad)
    table = side**4 * dtype.itemsize
    can: dict[str, Attention] = {}
    # without a mask it would be the backend "sdpa"
    if geometry.name != "global" and table <= LARGEST_MASK:
        can[BRUTE_FORCE] = BruteForce(geometry, side, device, dtype)
    for name, reason in reasons(request).items():
        if reason is None and (name != "reference" or n * heads * table <= LARGEST_SCORES):
            can[name] = by_backend(BACKENDS[geometry.name][name], geometry)
    if geometry.name == "global" and device.type == "cuda":
        can |= {f"sdpa, {k}": by_sdpa_kernel(SDPA_KERNELS[k], geometry) for k in SDPA_KERNELS}
    return can


def runnable(runs: Mapping[str, bench.Run]) -> dict[str, bench.Run]:
    """Those that run; why another doesn't is printed."""
    can = {}
    for name, run in runs.items():
        try:
            run()
            can[name] = run
        except Exception as error:  # of a kernel: its memory, a shape that it doesn't take
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
    return can


def measure(
    geometry: Geometry,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    needs_grad: bool,
    skip: set[str],
    budget: float,
) -> dict[str, Row]:
    """By backend: milliseconds, MiB, share of the limit, and brute force's time by its. Adds to
    `skip` what takes too long for larger grids."""
    q, k, v = inputs(shape, device, dtype)
    if needs_grad:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    grad = torch.randn(q.shape, device=device, dtype=dtype)

    def whole(attention: Attention) -> Any:
        out = attention(q, k, v)
        return torch.autograd.grad(out, (q, k, v), grad) if needs_grad else out

    can = candidates(geometry, shape, device, dtype, needs_grad)
    runs = {name: partial(whole, run) for name, run in can.items() if name not in skip}
    matmul, on_gpu = Matmul(device, dtype), device.type == "cuda"
    rates: dict[str, bench.Run] = {MATMUL: matmul}
    if on_gpu:
        rates[COPY] = copy = Copy(device)
    with torch.set_grad_enabled(needs_grad):
        runs = runnable(runs) if on_gpu else runs
        times = bench.in_turn({**runs, **rates}, device, budget)
        peaks = {name: bench.peak_memory(run, device) for name, run in runs.items()}
        held = {name: kept(can[name], q, k, v) for name in runs}
    skip |= {name for name in runs if times[name] > TOO_LONG}
    with flops.flop_counter() as counter:
        geometry.record_flops(q.shape)
    passes = 3 if needs_grad else 1
    limit = passes * 2 * counter.flops / (matmul.flop / times[MATMUL])
    if on_gpu:
        limit = max(limit, passes * 4 * q.nbytes / (copy.bytes / times[COPY]))
        print(
            f"{geometry.name}, {shape}: limit {limit * 1e6:.0f} us at "
            f"{matmul.flop / times[MATMUL] / 1e12:.0f} TFLOP/s and "
            f"{copy.bytes / times[COPY] / 1e12:.2f} TB/s",
            flush=True,
        )
    brute = times.get("reference" if geometry.name == "global" else BRUTE_FORCE)
    return {
        name: {
            "ms": times[name] * 1e3,
            "mib": (peaks[name] + held[name]) / MIB,
            "share": limit / times[name],
            "ratio": brute and brute / times[name],
        }
        for name in runs
    }


def compare(
    geometry: Geometry,
    shapes: Sequence[tuple[int, int, int]],
    device: torch.device,
    dtype: torch.dtype,
    budget: float,
    on: str,
    omit: Sequence[str] = (),
) -> Section:
    """A geometry's table, without some backends. What is chosen in training is in bold."""
    rows: list[Row] = []
    skip = {False: set(omit), True: set(omit)}
    for n, side, heads in shapes:
        results = {
            grad: measure(geometry, (n, side, heads), device, dtype, grad, skip[grad], budget)
            for grad in (False, True)
        }
        chosen = choose_backend(Request(geometry, side, side, device.type, dtype))
        for name in dict.fromkeys([*results[False], *results[True]]):
            row: Row = {"shape": f"{n} x {side}² x {heads}", "backend": name}
            row["bold"] = name == chosen
            for column, grad in (("forward", False), ("both", True)):
                for key, value in results[grad].get(name, {}).items():
                    row[column if key == "ms" else f"{column}_{key}"] = value
            rows.append(row)
    return {"on": on, "rows": rows, "notes": cannot_run(geometry, shapes[-1][1], device, dtype)}


def cannot_run(
    geometry: Geometry, side: int, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Why backends are missing, as a list, if any are."""
    never, in_training = (
        {name: why for name, why in reasons(request).items() if why}
        for request in (
            Request(geometry, side, side, device.type, dtype, needs_grad=grad)
            for grad in (False, True)
        )
    )
    lines = [f"- `{name}`: {why}" for name, why in never.items()]
    lines += [
        f"- `{name}` with gradients: {why}"
        for name, why in in_training.items()
        if name not in never
    ]
    return ["Can't run here:\n\n" + "\n".join(lines)] if lines else []


def main(argv: Sequence[str] | None = None) -> None:
    p = bench.parser(__doc__)
    p.add_argument("--kernel-size", type=int, default=7)
    p.add_argument("--budget", type=float, default=2.5, help="seconds for a row of runs in turn")
    p.add_argument("--geometry", action="append", choices=list(BACKENDS), help="default: all")
    args = bench.parse(p, argv)
    geometries: list[Geometry] = [
        NeighborhoodAttentionSpec(D_HEAD, args.kernel_size),
        ShiftedWindowAttentionSpec(D_HEAD, WINDOW_SIZE, WINDOW_SIZE // 2),
        GlobalAttentionSpec(D_HEAD),
    ]
    titles = [f"neighborhood, kernel {args.kernel_size}", f"shifted window {WINDOW_SIZE}", "global"]
    shapes = SHAPES[args.device.type]
    shapes, budget = (shapes[:1], 0.0) if args.quick else (shapes, args.budget)
    omit = ["flex"] if args.quick else []  # which is compiled
    sections = {}
    for geometry, title in zip(geometries, titles):
        if args.no_run or geometry.name not in (args.geometry or BACKENDS):
            continue
        key = f"{title}, {args.dtype}"
        dtype = bench.DTYPES[args.dtype]
        sections[key] = compare(geometry, shapes, args.device, dtype, budget, args.on, omit)
        print(bench.text(key, sections[key], COLUMNS), end="\n\n", flush=True)
    bench.finish("attention", "attention.py", args, sections, COLUMNS)


if __name__ == "__main__":
    main()
