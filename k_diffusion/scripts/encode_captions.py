"""Encode a data set's captions once, for training without the text encoder: text.precomputed."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import conditions
from ..common import options
from ..config import check_code, load_config
from ..data.captions import caption_of
from ..data.training_data import TrainingData, make_training_data
from ..encoders.text import write_texts


def captions(data: TrainingData) -> Iterator[str]:
    """The captions of training data, which has them, item by item."""
    assert data.caption_key is not None
    for index in range(len(data)):
        # of images in files the captions lie beside them, so that none is read
        item = None if hasattr(data.data, "paths") else data.data[index]
        yield caption_of(data.data, item, index, data.caption_key)


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
    data = make_training_data(config, args.config.parent)
    texts = [*section["prompts"], *captions(data)]
    n = write_texts(Path(args.output), encoder, texts, args.batch_size)
    print(f"wrote {args.output}: {n:,} texts of {len(data):,} images", file=sys.stderr)


if __name__ == "__main__":
    main()
