"""What train.py does before and around its loop: the accelerator, the seed, messages."""

import argparse
import secrets
from pathlib import Path
from typing import Any

from .. import utils
from .optim import set_base_lr
from .state import TrainState


def refuse_metrics(args: argparse.Namespace) -> None:
    """Say what this version can't measure; leave if it was all that was asked for."""
    if args.evaluate_only:
        raise SystemExit("--evaluate-only: this version has no metrics; sample.py draws samples")
    if args.gns:
        print("--gns is ignored: this version does not measure the gradient noise scale")


def make_accelerator(args: argparse.Namespace) -> Any:
    """The Accelerator, with the trackers that the arguments ask for started."""
    from accelerate import Accelerator

    trackers = ["wandb"] * bool(args.wandb_project) + ["tensorboard"] * bool(args.tensorboard)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=trackers or None,
        project_dir=args.tensorboard,
    )
    if trackers:
        options = {"entity": args.wandb_entity, "group": args.wandb_group}
        accelerator.init_trackers(
            args.wandb_project or args.name,
            config={k: str(v) for k, v in vars(args).items()},
            init_kwargs={"wandb": {k: v for k, v in options.items() if v}},
        )
    return accelerator


def agree_on_seed(seed: int | None) -> int:
    """The given seed, or a new one, the same on all processes."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([secrets.randbits(32) if seed is None else seed])[0]


def apply_overrides(args: argparse.Namespace, state: TrainState) -> None:
    """What was given on the command line holds against what a checkpoint brought."""
    if args.seed is not None:
        state.seed = args.seed
    if args.lr is not None:
        set_base_lr(state.opt, state.sched, state.model, args.lr)
    if args.reset_ema:
        state.reset_ema()


def describe(args: argparse.Namespace, state: TrainState, accelerator: Any) -> str:
    """A line or two on what is about to run."""
    per_step = args.batch_size * args.grad_accum_steps * accelerator.num_processes
    section = state.config["dataset"]
    classes = f", {section['num_classes']} classes" if section["num_classes"] else ""
    return (
        f"{args.name}: {state.config['model']['type']}, {utils.n_params(state.model):,} parameters"
        f"; {section['type']}, {state.dataset_length:,} images{classes}\n"
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {per_step} images a "
        f"step, precision {accelerator.mixed_precision}, seed {state.seed}"
    )


def save_to_wandb(path: Path) -> None:
    """Keep a checkpoint with the Weights & Biases run."""
    import wandb

    wandb.save(str(path))
