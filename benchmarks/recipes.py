"""Which training recipe is best at equal time: optimizers, learning rates, losses and averages,
raced on the digits and on Fashion-MNIST, by their samples against images that none was trained on.

    python benchmarks/recipes.py [--seconds 150] [--seeds 3] [--recipes adamw,muon] [--write]

A step of each recipe is timed first, all recipes in turn. Each then trains for as many steps as
take `--seconds` at that speed, so that what else the machine does later favours none. The data sets
are trained on `split=train` and compared with their test images: the Fréchet distance of lite0's
features (of a random network's where that is not installed), and how many samples a classifier of
the training images reads as their class. Prints a table for each data set, means over the seeds
with their standard errors, and with --write puts it on docs/training.md. Three hours on two free
cores at full length.
"""

import k_diffusion.common.cpu

# isort: split
import argparse
import copy
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import page
from harness.bench import ROOT, in_turn
from tqdm.auto import tqdm

import k_diffusion as K
from k_diffusion import distributed, generation
from k_diffusion.data import stream, training_data
from k_diffusion.encoders.digits import MAX_IMAGES, Recognizer
from k_diffusion.evaluation.extraction import Eye, look_at
from k_diffusion.evaluation.protocols import get_protocol
from k_diffusion.evaluation.reals import RealImages, real_sets
from k_diffusion.evaluation.registry import Options, measure
from k_diffusion.training import optim, power_ema, step
from k_diffusion.training.state import TrainState

PAGE = ROOT / "docs" / "training.md"


class Recipe(NamedTuple):
    """What differs from BASE: values of --set, in which STEPS / N is a share of the run.

    width: of the power-function average that is sampled, in place of the usual one.
    """

    about: str
    overrides: tuple[str, ...] = ()
    width: float | None = None


# What a recipe doesn't change, whatever the config says.
BASE = {
    "model": {
        "prediction": "karras",
        "loss_weighting": "soft-min-snr",
        "sigma_sample_density": {"type": "lognormal", "mean": -0.4, "std": 1.2},
    },
    "optimizer": {"type": "adamw", "lr": 3e-3},
    "lr_sched": {"type": "exponential", "num_steps": 450, "decay": 0.5, "warmup": 0.95},
}
WARM = "lr_sched.warmup_steps=STEPS/20"
MUON = "optimizer.type=muon", "optimizer.lr=LR"
COSINE = "lr_sched.type=cosine", "lr_sched.num_steps=STEPS/1", WARM
JIT = (
    "model.prediction=x",
    "model.loss_weighting=karras",  # it has one of its own
    "model.sigma_sample_density.type=logit-normal",
)
TUNED = (
    "model.loss_max_weight=16",
    "model.sigma_sample_density.mean=-0.7",
    "model.sigma_sample_density.std=0.9",
)
RECIPES = {
    "adamw": Recipe("AdamW, exponential decay, soft-min-SNR"),
    "muon": Recipe("Muon for the hidden matrices", MUON),
    "cosine": Recipe("a cosine to 0 at the end", COSINE),
    "muon + cosine": Recipe("both of these", (*MUON, *COSINE)),
    "inverse-sqrt": Recipe(
        "constant, then falling as 1 / sqrt(step) from a fifth on",
        ("lr_sched.type=inverse-sqrt", "lr_sched.decay_start=STEPS/5", WARM),
    ),
    "learned weighting": Recipe(
        "all noise levels weigh the same", ("model.learned_weighting=true",)
    ),
    "sigmoid": Recipe(
        "soft-min-SNR with a cap of e^2", ("model.loss_weighting=sigmoid", "model.loss_bias=2")
    ),
    "x-prediction": Recipe("JiT's loss and noise levels", JIT),
    "muon + cosine + x-prediction": Recipe("all three", (*MUON, *COSINE, *JIT)),
    "tuned": Recipe(
        "all three; rate, noise levels and cap of the weight by trial on digits",
        (*MUON, *COSINE, *JIT, "optimizer.lr=5e-3", *TUNED),
    ),
    "power average": Recipe("a power-function average of width 0.1", width=0.1),
}

DATA = {
    "digits": ROOT / "configs" / "config_digits_transformer.json",
    "fashion-mnist": ROOT / "configs" / "config_fashion_mnist_transformer.json",
}


def make_config(path: Path, recipe: Recipe, steps: int, sets: Sequence[str]) -> dict[str, Any]:
    """The config of a recipe for a run of so many steps. sets: further values of --set, first."""
    base = K.config.load_config(path, BASE, strict=True)
    base = K.config.load_config(base, [*sets, "dataset.split=train"], strict=True)
    overrides = []
    for text in recipe.overrides:
        key, _, value = text.partition("=")
        if value.startswith("STEPS/"):
            value = str(max(1, steps // int(value.removeprefix("STEPS/"))))
        overrides.append(f"{key}={base['optimizer']['lr'] if value == 'LR' else value}")
    return K.config.load_config(base, overrides, strict=True)


class Trainee:
    """A run in memory: `step` trains it for a step, `sampled` is what one samples from."""

    def __init__(
        self, accelerator: Any, config: dict[str, Any], recipe: Recipe, batch_size: int, seed: int
    ):
        torch.manual_seed(seed)
        data = training_data.make_training_data(config, ROOT)
        inner = K.config.make_model(config)
        opt = optim.make_optimizer(config, inner)
        self.accelerator, self.config = accelerator, config
        self.state = TrainState(
            config=config,
            model=inner,
            model_ema=copy.deepcopy(inner).eval().requires_grad_(False).to(accelerator.device),
            opt=opt,
            sched=optim.make_lr_sched(config, opt),
            ema_sched=optim.make_ema_sched(config),
            seed=seed,
            dataset_length=len(data),
        )
        if recipe.width is not None:
            self.state.power_ema = power_ema.PowerEMA(self.state.model_ema, [recipe.width])
        prepared, self.opt = accelerator.prepare(inner, opt)
        self.wrap = K.config.make_denoiser_wrapper(config)
        self.denoiser = self.wrap(prepared)
        self.density = K.config.make_sample_density(config["model"])
        self.batches = iter(stream.make_loader(data, stream.Stream(len(data), batch_size, seed)))

    def step(self) -> None:
        step.train_step(
            self.accelerator, self.denoiser, self.opt, self.state, self.batches, self.density
        )
        self.state.levels.pending.clear()

    @property
    def sampled(self) -> Any:
        """The denoiser of the averaged weights."""
        average = self.state.model_ema
        if self.state.power_ema is not None:
            (profile,) = self.state.power_ema.profiles.values()
            average = profile.model
        return self.wrap(average).eval()


class Judge:
    """The held-out images of a data set, and a classifier of the others."""

    def __init__(self, accelerator: Any, config: dict[str, Any], protocol: str, n: int, steps: int):
        self.accelerator, self.n, self.steps = accelerator, n, steps
        model, section = config["model"], config["dataset"]
        self.num_classes = section["num_classes"]
        made = get_protocol(protocol)
        self.eyes = {protocol: Eye(made, made.make_encoder(None, accelerator.device))}
        size, channels = tuple(model["input_size"]), model["input_channels"]
        held_out = RealImages({**section, "split": "test"}, size, channels, ROOT)
        self.real = real_sets(accelerator, held_out, self.eyes, min(n, len(held_out)))
        self.recognizer = Recognizer(*RealImages(section, size, channels, ROOT).load(MAX_IMAGES))

    def of(self, denoiser: Any, config: dict[str, Any]) -> tuple[float, float]:
        """The Fréchet distance of n samples to the held-out images, and the share read right."""
        seen = look_at(
            self.accelerator,
            generation.sample_batches(
                self.accelerator, denoiser, config, range(self.n), steps=self.steps
            ),
            self.n,
            self.eyes,
            recognizer=self.recognizer,
            classes=[i % self.num_classes for i in range(self.n)],
        )
        ((name, eye),) = self.eyes.items()
        options = Options(resamples=0)
        features, formula = seen.features[name], eye.protocol.formula
        found = measure(("fd",), features, self.real[name], options, formula=formula)
        return found["fd"].value, seen.hits.double().mean().item()


class Result(NamedTuple):
    """A recipe's steps, and for each seed the distance and the share of samples read right."""

    steps: int
    distances: list[float]
    shares: list[float]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN of a single value."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def table(results: Mapping[str, Result], protocol: str) -> str:
    """Markdown, the nearest first; bold: what can't be told from the best, by two errors."""
    columns = [("distances", -1, ".3g", 1), ("shares", 1, ".1f", 100)]
    cells: dict[str, list[str]] = {name: [] for name in results}
    for field, sign, form, scale in columns:
        found = {name: mean_and_error(getattr(result, field)) for name, result in results.items()}
        top, error = max(found.values(), key=lambda pair: sign * pair[0])
        for name, (mean, own) in found.items():
            text = f"{scale * mean:{form}}" + ("" if math.isnan(own) else f" ± {scale * own:.2g}")
            behind = sign * (top - mean)
            alike = behind <= (0 if math.isnan(own) else 2 * math.hypot(own, error))
            cells[name].append(f"**{text}**" if alike else text)
    lines = [f"| recipe | steps | FD[{protocol}] | read as their class, % |", "|---|---|---|---|"]
    nearest = sorted(results, key=lambda name: mean_and_error(results[name].distances)[0])
    for name in nearest:
        about = f"{name}: {RECIPES[name].about}"
        lines.append(f"| {about} | {results[name].steps:,} | " + " | ".join(cells[name]) + " |")
    return "\n".join(lines)


def race(args: argparse.Namespace, accelerator: Any, path: Path, protocol: str) -> str:
    """Race the recipes on a data set; the table, with a line on how it was measured."""
    recipes = {name: RECIPES[name] for name in args.recipes}

    def trainee(name: str, steps: int, seed: int = 0) -> Trainee:
        config = make_config(path, recipes[name], steps, args.set)
        return Trainee(accelerator, config, recipes[name], args.batch_size, seed)

    timed = {name: trainee(name, 1000).step for name in recipes}
    times = in_turn(timed, accelerator.device, budget=min(30.0, args.seconds), rounds=(3, 200))
    steps = {name: max(1, round(args.seconds / times[name])) for name in recipes}
    del timed
    results = {name: Result(steps[name], [], []) for name in recipes}
    judge = None
    jobs = list(itertools.product(range(args.seeds), recipes))  # an interrupted race is a fair one
    for seed, name in tqdm(jobs, unit="run", disable=None):
        run = trainee(name, steps[name], seed)
        for _ in range(steps[name]):
            run.step()
        judge = judge or Judge(accelerator, run.config, protocol, args.n, args.steps)
        distance, share = judge.of(run.sampled, run.config)
        results[name].distances.append(distance)
        results[name].shares.append(share)
        accelerator.free_memory()
        print(f"{name}, seed {seed}: {steps[name]} steps, FD {distance:.4g}, {share:.1%} right")
    seeds = f"{args.seeds} seeds, with standard errors" if args.seeds > 1 else "one seed"
    return (
        table(results, protocol)
        + f"\n\n{args.seconds:g} s of training each, batches of {args.batch_size}, {args.n:,} "
        f"samples in {args.steps} steps of `dpmpp_2m`, {seeds}. Bold: within two errors of "
        "the best."
    )


def find_protocol(device: torch.device) -> str:
    """lite0 if its weights are here, else random."""
    try:
        get_protocol("lite0").make_encoder(None, device)
    except (ImportError, OSError, ValueError):
        return "random"
    return "lite0"


def names_of(known: Mapping[str, object]) -> Any:
    """An argparse type: names by commas, of those known."""

    def read(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in names if name not in known] or not names:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {unknown}")
        return names

    return read


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--seconds", type=float, default=150.0, help="of training, for each run")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--recipes", type=names_of(RECIPES), default=list(RECIPES))
    p.add_argument("--data", type=names_of(DATA), default=list(DATA))
    p.add_argument("--fashion-location", default="data", help="the folder of Fashion-MNIST's files")
    p.add_argument("--protocol", help="lite0, random, ...; else lite0 where it is installed")
    p.add_argument("-n", type=int, default=1000, help="samples that are measured")
    p.add_argument("--steps", type=int, default=generation.STEPS, help="of sampling")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all")
    p.add_argument("--write", action="store_true", help="into docs/training.md")
    args = p.parse_args()
    accelerator = distributed.make_accelerator()
    protocol = args.protocol or find_protocol(accelerator.device)
    common = args.set
    for name in args.data:
        here = name == "fashion-mnist"
        args.set = [*common, *([f"dataset.location={args.fashion_location}"] if here else [])]
        section = race(args, accelerator, DATA[name], protocol)
        print(f"\n{name}\n\n{section}\n")
        if args.write:
            text = page.replace(PAGE.read_text(), f"recipes on {name}", "recipes.py", section)
            PAGE.write_text(text)
            print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
