#!/usr/bin/env python3
"""Turn a training checkpoint into a slim inference checkpoint with its config inside."""

import k_diffusion.common.threads  # before torch, which loads OpenMP

# isort: split
import argparse

import torch

import k_diffusion as K
from k_diffusion import checkpoints
from k_diffusion.common import options
from k_diffusion.common.files import check_readable, check_writable, writable
from k_diffusion.common.tensors import DTYPES


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=options.HelpFormatter)
    p.add_argument("checkpoint", type=options.path, help="the training checkpoint (.pth)")
    p.add_argument(
        "--config", type=options.path, metavar="FILE", help="else the one in the checkpoint"
    )
    p.add_argument(
        "--output",
        "-o",
        type=options.path,
        metavar="FILE",
        help="else CHECKPOINT with .safetensors",
    )
    p.add_argument("--dtype", choices=list(DTYPES), default="fp16", help="of the weights")
    return p.parse_args()


@options.friendly_errors
def main() -> None:
    args = parse_args()
    check_readable(args.checkpoint, "checkpoint")
    output = args.output or args.checkpoint.with_suffix(".safetensors")
    if output.resolve() == args.checkpoint.resolve():
        raise ValueError(f"{output} is the training checkpoint itself; choose another --output")
    if output.suffix != ".safetensors":
        raise options.UsageError(f"--output must end in .safetensors, got {output}")
    check_writable(output)
    print(f"reading {args.checkpoint} ...")
    state = checkpoints.read_checkpoint(args.checkpoint)
    config = state["config"]
    if args.config is not None:
        config = K.config.load_config(args.config, strict=True)
    weights = state.get("model_ema", state["model"])
    with torch.device("meta"):
        model = K.config.make_model(K.config.load_config(config))
    checkpoints.check_weights(model, weights, args.checkpoint)
    writable(output)
    print(f"writing {output} in {args.dtype} ...")
    checkpoints.write_inference(output, config, weights, args.dtype)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
