"""Prints which attention backends can run here: python -m k_diffusion.models.attention"""

import argparse
from collections.abc import Sequence

import torch

from ...common import options
from ...common.tensors import DTYPES
from ...common.text import aligned
from . import BACKENDS, choice
from .geometry import (
    Geometry,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    ShiftedWindowAttentionSpec,
)


def table(requests: list[choice.Request]) -> str:
    """A row for each backend of each request: whether it can run, is chosen, and why not; then
    what is forced and can't run. Raises ValueError where a geometry doesn't fit."""
    rows = [("geometry", "backend", "can run here", "why not")]
    errors: list[str] = []
    for request in requests:
        request.geometry.check(request.h, request.w)
        try:
            chosen = choice.choose_backend(request)
        except ValueError as error:
            chosen = ""
            errors += ["", str(error)]
        for name, reason in choice.reasons(request).items():
            can = "no" if reason else "chosen" if name == chosen else "yes"
            why = reason or BACKENDS[request.geometry.name][name].passed_over(request) or ""
            rows.append((request.geometry.name, name, can, "" if name == chosen else why))
    return "\n".join([*aligned(rows), *dict.fromkeys(errors)])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of a geometry each. argv: the command line's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m k_diffusion.models.attention",
        description="Which attention backends can run here, which is chosen, and why not others.",
    )
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = ["cpu", found.type] if found else ["cpu"]
    p.add_argument("--device", choices=devices, default=devices[-1])
    p.add_argument("--dtype", choices=list(DTYPES), default="bf16" if found else "fp32")
    p.add_argument("--tokens", type=options.positive, default=64, help="of a side of the grid")
    p.add_argument("--d-head", type=options.positive, default=64)
    p.add_argument("--kernel-size", type=options.positive, default=7)
    p.add_argument("--window-size", type=options.positive, default=8)
    p.add_argument("--inference", action="store_true", help="without gradients")
    args = p.parse_args(argv)
    geometries: list[Geometry] = [
        GlobalAttentionSpec(args.d_head),
        NeighborhoodAttentionSpec(args.d_head, args.kernel_size),
        ShiftedWindowAttentionSpec(args.d_head, args.window_size),
    ]
    n, dtype, grad = args.tokens, DTYPES[args.dtype], not args.inference
    try:
        rows = table([choice.Request(g, n, n, args.device, dtype, grad) for g in geometries])
    except ValueError as error:
        p.exit(1, f"{p.prog}: {error}\n")
    print(
        f"{args.device}, {args.dtype}, {n} x {n} tokens, d_head {args.d_head}, "
        f"{'training' if grad else 'inference'}; {choice.ENV_VAR} forces a backend\n\n{rows}"
    )


if __name__ == "__main__":
    main()
