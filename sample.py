#!/usr/bin/env python3
"""Sample images of a trained model. For several processes: accelerate launch sample.py"""

import argparse

from k_diffusion import cli, sample_cli


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    sample_cli.add_arguments(p, sampler="dpmpp_2m", steps=50)
    return p.parse_args()


@cli.friendly_errors
def main() -> None:
    sample_cli.run(parse_args())


if __name__ == "__main__":
    main()
