"""Reconstruct the averaged weights of any width from a run's snapshots (train.py --power-ema)."""

import argparse

from ..checkpoints import write_inference
from ..checkpoints.snapshots import parse_width, reconstruct
from ..common import options
from ..common.files import check_writable
from ..common.tensors import DTYPES


def _parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m k_diffusion.training.posthoc",
        description=__doc__,
        formatter_class=options.HelpFormatter,
    )
    text = "the run's --name, the folder that it alone is in, or one of its checkpoints"
    p.add_argument("run", type=options.path, metavar="RUN_OR_FOLDER", help=text)
    text = "sigma_rel of the average, e.g. 0.07"
    p.add_argument("--width", type=options.of(parse_width), required=True, metavar="X", help=text)
    text = "up to this step, of which there must be a snapshot; else that of the latest checkpoint"
    p.add_argument("--step", type=options.steps, metavar="N", help=text)
    text = "the inference checkpoint to write (.safetensors)"
    p.add_argument("--output", "-o", type=options.path, required=True, metavar="FILE", help=text)
    p.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the weights")
    return p.parse_args()


@options.friendly_errors
def main() -> None:
    args = _parse_args()
    if args.output.suffix != ".safetensors":
        raise options.UsageError(f"--output must end in .safetensors, got {args.output}")
    check_writable(args.output)
    average = reconstruct(args.run, args.width, args.step)
    write_inference(args.output, average.config, average.weights, args.dtype)
    used = average.snapshots
    print(
        f"{args.output}: width {args.width:g} at step {average.step}, of {len(used)} snapshots "
        f"from step {used[0].step} on; its profile is met within {100 * average.error:.2g}%"
    )


if __name__ == "__main__":
    main()
