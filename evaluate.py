#!/usr/bin/env python3
"""Measure how good samples are: checkpoints, or images, against real ones.

For several processes: accelerate launch evaluate.py
"""

import k_diffusion.common.cpu  # noqa: F401  (before torch, which loads OpenMP)

# isort: split
from k_diffusion.common import options
from k_diffusion.scripts import evaluate


@options.friendly_errors
def main() -> None:
    evaluate.run(evaluate.parse_args(__doc__))


if __name__ == "__main__":
    main()
