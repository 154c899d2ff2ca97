"""What train.py does before and around its loop: the accelerator, the seed, messages."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..common.modules import n_params
from ..common.text import need
from .state import TrainState


def refuse_metrics(args: argparse.Namespace, say: Callable[[str], object]) -> None:
    """Say what this version can't measure. Raises ValueError if it was all that was asked for."""
    if args.evaluate_only:
        raise ValueError("--evaluate-only: this version has no metrics; sample.py draws samples")
    if args.gns:
        say("--gns has no effect: this version doesn't measure the gradient noise scale")


def make_accelerator(args: argparse.Namespace, config: Mapping[str, Any]) -> Any:
    """The Accelerator, with the trackers that the arguments ask for started; sets up TF32."""
    torch.backends.cuda.matmul.allow_tf32 = not args.no_tf32
    trackers = []
    if args.wandb_project:
        trackers.append("wandb")
        need("wandb", "--wandb-project")
    if args.tensorboard:
        trackers.append("tensorboard")
        need("tensorboard", "--tensorboard")
    accelerator = distributed.make_accelerator(
        mixed_precision=args.mixed_precision,
        log_with=trackers or None,
        project_dir=args.tensorboard,
        # layers of skipped stages are there and get no gradient
        find_unused_parameters=config["model"]["skip_stages"] > 0,
    )
    if trackers:
        options = {"entity": args.wandb_entity, "group": args.wandb_group}
        accelerator.init_trackers(
            args.wandb_project or args.name,
            config={k: str(v) for k, v in vars(args).items()},
            init_kwargs={"wandb": {k: v for k, v in options.items() if v}},
        )
    return accelerator


def describe(args: argparse.Namespace, state: TrainState, accelerator: Any) -> str:
    """A line or two on what is about to run."""
    per_step = args.batch_size * args.grad_accum_steps * accelerator.num_processes
    section = state.config["dataset"]
    classes = f", {section['num_classes']} classes" if section["num_classes"] else ""
    return (
        f"{args.name}: {state.config['model']['type']}, {n_params(state.model):,} parameters"
        f"; {section['type']}, {state.dataset_length:,} images{classes}\n"
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {per_step} images a "
        f"step, precision {accelerator.mixed_precision}, seed {state.seed}"
    )


def save_to_wandb(path: Path) -> None:
    """Keep a checkpoint with the Weights & Biases run."""
    import wandb

    wandb.save(str(path))
