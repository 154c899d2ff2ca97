"""Encode a data set's captions once, for training without the text encoder: text.precomputed."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import conditions
from ..common import options
from ..config import check_code, load_config
from ..data.latent_sources import open_latents
from ..data.training_data import make_training_data
from ..encoders.text import write_texts


def captions(config: dict[str, Any], folder: Path) -> list[str]:
    """The captions of a config's data set, item by item. Raises ValueError without."""
    if config["dataset"]["type"] == "latents":
        source = open_latents(config["dataset"]["location"])
        source.check_captions()
        return [source.caption(index) for index in range(len(source))]
    data = make_training_data(config, folder)
    return [data.caption(index) for index in range(len(data))]


@options.friendly_errors
def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m k_diffusion.scripts.encode_captions",
        description=__doc__,
        formatter_class=options.HelpFormatter,
    )
    add = p.add_argument
    add("--config", type=options.path, required=True, metavar="FILE", help="as of train.py")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as of train.py")
    text = "the file to write (.safetensors)"
    add("--output", type=options.path, required=True, metavar="FILE", help=text)
    add("--batch-size", type=options.positive, default=64, metavar="N", help="captions at a time")
    add("--device", type=options.text, default="cpu", help="cpu, cuda, ...")
    args = p.parse_args()
    config = load_config(args.config, args.set, strict=True)
    check_code(args.config, config, args.set)
    section: Any = config.get("text")
    if section is None:
        raise ValueError(f"{args.config} has no section text, whose captions could be encoded")
    encoder = conditions.make_text_encoder(config, args.device)
    assert encoder is not None
    found = captions(config, args.config.parent)
    n = write_texts(args.output, encoder, [*section["prompts"], *found], args.batch_size)
    print(f"wrote {args.output}: {n:,} texts of {len(found):,} images", file=sys.stderr)


if __name__ == "__main__":
    main()
