#!/usr/bin/env python3
"""Turn a training checkpoint into a slim inference checkpoint with its config inside."""

import argparse
import json
from pathlib import Path

import k_diffusion as K
from k_diffusion import cli
from k_diffusion.training import checkpoint


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("checkpoint", type=Path, help="the training checkpoint (.pth)")
    p.add_argument("--config", type=Path, help="the config; by default the checkpoint's own")
    p.add_argument("--output", "-o", type=Path,
                   help="the inference checkpoint; by default beside it, as .safetensors")
    p.add_argument("--dtype", choices=list(checkpoint.DTYPES), default="fp16",
                   help="of the weights")
    return p.parse_args()


@cli.friendly_errors
def main() -> None:
    args = parse_args()
    output = args.output or args.checkpoint.with_suffix(".safetensors")
    cli.writable(output)
    print(f"reading {args.checkpoint} ...")
    state = checkpoint.read_checkpoint(args.checkpoint)
    config = state["config"]
    if args.config is not None:
        config = K.config.load_config(args.config)
    print(f"writing {output} in {args.dtype} ...")
    checkpoint.write_inference(output, config, state.get("model_ema", state["model"]), args.dtype)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
