#!/usr/bin/env python3
"""Encode a data set's images, to train on latents. For several processes: accelerate launch"""

import k_diffusion.common.cpu
import k_diffusion.common.launcher  # noqa: F401  (both before torch)

# isort: split
from k_diffusion.common import options
from k_diffusion.scripts import encode_latents


@options.friendly_errors
def main() -> None:
    encode_latents.run(encode_latents.parse_args(__doc__))


if __name__ == "__main__":
    main()
