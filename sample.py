#!/usr/bin/env python3
"""Sample images of a trained model. For several processes: accelerate launch sample.py"""

import k_diffusion.common.cpu
import k_diffusion.common.launcher  # noqa: F401  (both before torch)

# isort: split
import argparse

from k_diffusion.common import options
from k_diffusion.scripts import sample


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=options.HelpFormatter)
    sample.add_arguments(p, sampler="dpmpp_2m", steps=50)
    return p.parse_args()


@options.friendly_errors
def main() -> None:
    sample.run(parse_args())


if __name__ == "__main__":
    main()
