"""The flags of evaluate.py."""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...checkpoints.snapshots import parse_width
from ...common import options
from ...common.text import did_you_mean, unknown_name
from ...evaluation.protocols import PROTOCOLS, get_protocol
from ...evaluation.registry import METRICS
from .. import sample

RECOGNITION = "recognition"


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


@options.of
def _metrics(text: str) -> list[str]:
    """An argparse type: names of METRICS and RECOGNITION, by commas."""
    rows = {**METRICS, RECOGNITION: None}
    for name in _words(text):
        if name not in rows:
            raise unknown_name("metric", name, rows)
    return _words(text)


@options.of
def _protocols(text: str) -> list[str]:
    """An argparse type: names of PROTOCOLS or of their encoders, by commas."""
    return [get_protocol(name).name for name in _words(text)]


@options.of
def _widths(text: str) -> list[float]:
    """An argparse type: widths of averages, by commas."""
    return [parse_width(word) for word in _words(text)]


def _choices_parser() -> argparse.ArgumentParser:
    """The flags on how samples are drawn, which --sweep may vary."""
    p = argparse.ArgumentParser(add_help=False, formatter_class=options.HelpFormatter)
    sample.add_choices(p, sampler="dpmpp_2m", steps=50)
    p.set_defaults(seed=0)
    return p


def parse_args(
    description: str | None = None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """The command line of evaluate.py.

    `settings`: a namespace for each combination of --sweep, one without it. `choices`: the flags,
    by their names in the namespace, in which these may differ. `sources`: what to measure, each a
    path and the width of an average, if any.
    """
    choices = _choices_parser()
    p = argparse.ArgumentParser(
        description=description, formatter_class=options.HelpFormatter, parents=[choices]
    )
    file: dict[str, Any] = {"type": options.path, "metavar": "FILE"}
    count: dict[str, Any] = {"type": options.positive, "metavar": "N"}
    add = p.add_argument_group("what to measure").add_argument
    text = "checkpoints, .safetensors or .pth, or names or folders of runs, for their latest"
    add("--checkpoint", nargs="+", default=[], **file, help=text)
    text = "of latent models, if it isn't where their configs say"
    add("--autoencoder", type=options.path, metavar="PATH", help=text)
    text = "widths of averages to measure, of the run whose name, folder or .pth --checkpoint is"
    add("--ema-width", type=_widths, metavar="WIDTHS", help=text)
    text = "images in place of a checkpoint: a folder, or an .npz of ADM's evaluator"
    add("--samples", type=options.path, metavar="PATH", help=text)
    text = "what to compare with: a folder, a config's data set, or a reference .npz or .pkl; else "
    add(
        "--data",
        type=options.path,
        metavar="PATH",
        help=text + "the data set of the checkpoint's config",
    )
    add("--split", type=options.text, metavar="NAME", help="of the data set; else its config's")
    add("-n", **count, help="the number of samples; else the protocol's")
    add("--n-reference", **count, help="real images to use; else all")
    text = f"comma-separated: {', '.join([*METRICS, RECOGNITION])}"
    add("--metrics", type=_metrics, default="fd", metavar="NAMES", help=text)
    text = f"comma-separated: {', '.join(PROTOCOLS)}"
    add("--protocol", type=_protocols, default="edm", metavar="NAMES", help=text)
    text = "weights of the protocol's encoder; else the cache folder's, or a download"
    add("--weights", **file, help=text)
    add("--force", action="store_true", help="take a reference of another protocol, and say so")
    add("--k", **count, default=5, help="neighbours, of precision, recall, density and coverage")
    add("--kid-size", **count, default=1000, help="images in each of KID's 100 subsets")
    text = "bootstrap resamples of the intervals; 0: none"
    add("--resamples", type=options.non_negative, metavar="N", default=20, help=text)
    add = p.add_argument_group("what else").add_argument
    text = "bits per dimension of N images of the data set (100 without a number)"
    add("--likelihood", nargs="?", const=100, type=options.positive, metavar="N", help=text)
    text = "a page of samples with their K nearest training images (4 without a number)"
    add("--nearest", nargs="?", const=4, type=options.positive, metavar="K", help=text)
    text = "settings to go through: steps=4,8,16 sampler=heun,dpmpp_2m"
    add("--sweep", nargs="+", default=[], metavar="KEY=VALUES", help=text)
    add("--write-samples", action="store_true", help="write the samples as .npz, as ADM's")
    add = p.add_argument_group("where").add_argument
    add(
        "--output-dir",
        type=options.path,
        default=Path("evaluation"),
        metavar="FOLDER",
        help="of the report",
    )
    add("--cache", type=options.path, metavar="FOLDER", help="of statistics of real data")
    text = "processes that load images"
    add("--num-workers", type=options.non_negative, default=0, metavar="N", help=text)
    args = p.parse_args(argv)
    if bool(args.checkpoint) == bool(args.samples):
        p.error("pass one of --checkpoint and --samples")
    if args.samples and (args.sweep or args.likelihood or args.ema_width):
        p.error("--sweep, --likelihood and --ema-width need a --checkpoint")
    widths = args.ema_width or [None]
    args.sources = [(path, w) for path in args.checkpoint or [args.samples] for w in widths]
    how = {"device", "batch_size", "cuda_graphs"}  # images are computed, not which
    known = sorted(set(vars(choices.parse_args([]))) - how)
    args.choices = known
    args.settings = []
    for words in _sweep(args.sweep, known, p):
        setting = choices.parse_args(words, argparse.Namespace(**vars(args)))
        sample.check_choices(setting)
        args.settings.append(setting)
    return args


def _sweep(
    sweep: Sequence[str], known: Sequence[str], p: argparse.ArgumentParser
) -> Iterator[list[str]]:
    """The command lines of all combinations."""
    axes = []
    for text in sweep:
        key, equals, values = text.partition("=")
        key = {"class": "classes"}.get(key, key).replace("-", "_")
        if not equals or not _words(values):
            p.error(f"--sweep takes KEY=VALUE,VALUE..., got {text!r}")
        if key not in known:
            p.error(
                f"--sweep has no {key!r}{did_you_mean(key, known)}; there are {', '.join(known)}"
            )
        flag = "--" + {"classes": "class"}.get(key, key).replace("_", "-")
        axes.append([[flag, *value.split(":")] for value in _words(values)])
    for words in itertools.product(*axes):
        yield list(itertools.chain(*words))
