"""Memory and time of a training step by model, resolution and number of GPUs: a model of them.

    python benchmarks/scaling.py [--quick] [--write]

Nothing is measured here. Memory is what `train.py --dry-run` says of a process: its states, or with
--fsdp its shards of them, and the activations of fake tensors. The time of arithmetic is that of
the multiply-accumulates at the rate that benchmarks/train_step.py measured on an H100: matrix
products, and the part of it that a step compiled by block reached. Communication is its bytes by a
bandwidth.
"""

import k_diffusion.common.cpu  # noqa: F401  before torch, which loads OpenMP

# isort: split
import argparse
from collections.abc import Iterator, Sequence
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


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="the first model alone, of 2 images")
    p.add_argument("--write", action="store_true", help="put the table in docs/scaling.md")
    args = p.parse_args()
    if args.quick:
        found = list(rows(next(iter(MODELS)), GPUS[:2], 2))
    else:
        found = [row for name in MODELS for row in rows(name)]
    text = bench.table(COLUMNS, found)
    print(text)
    if args.write and not args.quick:
        PAGE.write_text(replace(PAGE.read_text(), "steps", "scaling.py", text))


if __name__ == "__main__":
    main()
