#!/usr/bin/env python3
"""Turn a training checkpoint into a slim inference checkpoint with its config inside."""

import argparse
from pathlib import Path

import k_diffusion as K
from k_diffusion import checkpoints
from k_diffusion.common import options
from k_diffusion.common.files import writable
from k_diffusion.common.tensors import DTYPES


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=options.HelpFormatter)
    p.add_argument("checkpoint", type=Path, help="the training checkpoint (.pth)")
    p.add_argument("--config", type=Path, metavar="FILE", help="else the one in the checkpoint")
    p.add_argument(
        "--output", "-o", type=Path, metavar="FILE", help="else CHECKPOINT with .safetensors"
    )
    p.add_argument("--dtype", choices=list(DTYPES), default="fp16", help="of the weights")
    return p.parse_args()


@options.friendly_errors
def main() -> None:
    args = parse_args()
    output = args.output or args.checkpoint.with_suffix(".safetensors")
    if output.resolve() == args.checkpoint.resolve():
        raise ValueError(f"{output} is the training checkpoint itself; choose another --output")
    writable(output)
    print(f"reading {args.checkpoint} ...")
    state = checkpoints.read_checkpoint(args.checkpoint)
    config = (
        state["config"] if args.config is None else K.config.load_config(args.config, strict=True)
    )
    print(f"writing {output} in {args.dtype} ...")
    checkpoints.write_inference(output, config, state.get("model_ema", state["model"]), args.dtype)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
