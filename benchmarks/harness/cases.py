"""The models whose training and sampling are measured, and random batches for them."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from k_diffusion.augmentation import COND_DIM
from k_diffusion.config import load_config, make_model

from .bench import ROOT


@dataclass(frozen=True)
class Case:
    """A config at a size of images, (h, w), and a batch size.

    config: its file, or itself. leave_out: rows that take long and tell little, or far too much
    memory: they are measured only if they are asked for.
    """

    name: str
    config: str | dict[str, Any]
    size: Sequence[int]
    batch: int
    leave_out: Sequence[str] = ()

    def load(self) -> dict[str, Any]:
        """The config with its defaults, at the size, and AdamW: what the plain forms have."""
        given = self.config
        config = given if isinstance(given, dict) else ROOT / "configs" / given
        at_size = {"input_size": list(self.size)}
        return load_config(config, {"model": at_size, "optimizer": {"type": "adamw"}})

    def title(self, dtype: str) -> str:
        h, w = self.size
        return f"{self.name}, {h} x {w}, batch of {self.batch}, {dtype}"


def hourglass(
    size: int, depths: list[int], widths: list[int], neighborhood: int, classes: int
) -> dict[str, Any]:
    """A config of the hourglass transformer paper (arXiv 2401.11605): patch size 4, neighborhood
    attention with a kernel of 7 on the outer levels, global attention on the others."""
    near = {"type": "neighborhood", "d_head": 64, "kernel_size": 7}
    far = {"type": "global", "d_head": 64}
    return {
        "model": {
            "type": "image_transformer_v2",
            "input_channels": 3,
            "input_size": [size, size],
            "patch_size": [4, 4],
            "depths": depths,
            "widths": widths,
            "self_attns": [near] * neighborhood + [far] * (len(depths) - neighborhood),
            "mapping_depth": 2,
            "mapping_width": 256,
            "mapping_d_ff": 768,
            "loss_weighting": "soft-min-snr",
            "sigma_data": 0.5,
            "sigma_min": 0.001,
            "sigma_max": 1000,
            "sigma_sample_density": {"type": "cosine-interpolated"},
        },
        "dataset": {"type": "none", "num_classes": classes},
        "optimizer": {"type": "adamw", "lr": 5e-4},
    }


WINDOWS = "config_oxford_flowers_classes_shifted_window.json"
IMAGENET = hourglass(256, [2, 2, 16], [384, 768, 1536], 2, 1000)
FFHQ = hourglass(1024, [2, 2, 2, 2, 2], [128, 256, 384, 768, 1024], 3, 0)

# By the type of device.
CASES = {
    "cpu": [
        Case("flowers", "config_oxford_flowers_classes.json", (128, 128), 4),
        Case("flowers, windows", WINDOWS, (128, 128), 4),
        Case("mnist", "config_mnist_hourglass.json", (28, 28), 16),
        Case("digits", "config_digits_transformer.json", (8, 8), 64, ["compiled", "by-block"]),
    ],
    "cuda": [
        Case("flowers-128", "config_oxford_flowers_classes.json", (128, 128), 64, ["brute-force"]),
        Case("flowers", "config_oxford_flowers_classes.json", (256, 256), 32, ["brute-force"]),
        Case("imagenet-256", IMAGENET, (256, 256), 32, ["brute-force"]),
        Case("ffhq-1024", FFHQ, (1024, 1024), 4, ["brute-force"]),
    ],
}
QUICK = replace(CASES["cpu"][-1], batch=4)


def add_arguments(p: argparse.ArgumentParser, rows: Iterable[str]) -> None:
    """Options that choose cases, and rows of their tables."""
    p.add_argument("--config", action="append", help="a case or a file; default: all of the device")
    p.add_argument("--size", type=int, help="height and width of the images")
    p.add_argument("--batch-size", type=int)
    p.add_argument("--rows", metavar="ROW,ROW", help=f"of {', '.join(rows)}")


def rows(p: argparse.ArgumentParser, args: argparse.Namespace, known: Iterable[str]) -> list[str]:
    """The rows that were asked for; none: all that a case doesn't leave out."""
    asked = args.rows.split(",") if args.rows else []
    if unknown := set(asked) - set(known):
        p.error(f"no row {', '.join(unknown)}; there are {', '.join(known)}")
    return asked


def choose(args: argparse.Namespace) -> list[Case]:
    """The cases that were asked for, by name or as files of configs, or all of the device.

    Raises SystemExit for what is neither a name nor a file.
    """
    known = {case.name: case for found in CASES.values() for case in found}
    known |= {case.name: case for case in CASES.get(args.device.type, ())}
    default = [QUICK] if args.quick else CASES[args.device.type]
    found = [_named(name, known) for name in args.config] if args.config else default
    if args.size:
        found = [replace(case, size=(args.size, args.size)) for case in found]
    return [replace(case, batch=args.batch_size or case.batch) for case in found]


def _named(name: str, known: Mapping[str, Case]) -> Case:
    if name in known:
        return known[name]
    if not Path(name).is_file():
        raise SystemExit(f"{name} is no config file and none of {', '.join(map(repr, known))}")
    h, w = load_config(name)["model"]["input_size"]
    return Case(Path(name).stem, str(Path(name).resolve()), (h, w), 4)


def inner_model(config: dict[str, Any], device: torch.device) -> nn.Module:
    """The model of a config with the same random weights each time, none of them zero."""
    torch.manual_seed(0)
    model = make_model(config)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.02)
    return model.to(device)


def batch_of(config: dict[str, Any], n: int) -> dict[str, torch.Tensor]:
    """A batch as the data loader gives it, of noise."""
    model = config["model"]
    g = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(n, model["input_channels"], *model["input_size"], generator=g),
        "aug_cond": torch.randn(n, COND_DIM, generator=g),
        "class": torch.randint(max(1, config["dataset"]["num_classes"]), (n,), generator=g),
    }
