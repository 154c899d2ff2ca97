"""What train.py does before and around its loop: the accelerator, the seed, messages."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..checkpoints.sharded import shard_folders
from ..common.files import check_writable
from ..common.modules import n_params
from ..common.text import need
from ..data.training_data import TrainingData
from . import sharding
from .state import TrainState


def make_accelerator(args: argparse.Namespace, config: Mapping[str, Any]) -> Any:
    """The Accelerator; sets up TF32. `start_trackers` starts the trackers that it knows of."""
    torch.backends.cuda.matmul.allow_tf32 = not args.no_tf32
    trackers: list[Any] = []
    if args.wandb_project:
        need("wandb", "--wandb-project", '"k-diffusion[wandb]"')
        trackers.append("wandb")
    if args.tensorboard:
        need("tensorboard", "--tensorboard", '"k-diffusion[tensorboard]"')
        trackers.append(_tensorboard(args.tensorboard))
    plugin = sharding.make_plugin(args, config)
    accelerator = distributed.make_accelerator(
        mixed_precision=args.mixed_precision,
        fsdp_plugin=plugin,
        log_with=trackers or None,
        # layers of skipped stages are there and get no gradient
        find_unused_parameters=config["model"].get("skip_stages", 0) > 0,
    )
    if plugin is not None:
        sharding.check(accelerator)
    return accelerator


def _tensorboard(folder: Path) -> Any:
    need("accelerate", "this script")
    from accelerate.tracking import TensorBoardTracker, on_main_process

    class Tracker(TensorBoardTracker):
        """Accelerate's, but it writes to the folder itself, and its config may have sections."""

        @on_main_process
        def start(self) -> None:
            check_writable(folder / "events")
            super().start()

        @on_main_process
        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.writer.add_text("config", f"```json\n{json.dumps(values, indent=2)}\n```")
            self.writer.flush()

    return Tracker("", folder)


def start_trackers(accelerator: Any, args: argparse.Namespace, state: TrainState) -> None:
    """Start the accelerator's trackers, and tell them the flags, the run's seed and its config.

    Raises OSError for one that can't start, as without a key or its folder. A run that goes on from
    a checkpoint says so and does without it: nobody may be there to mend it.
    """
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    flags |= {"seed": state.seed, "config_file": flags.pop("config")}
    options = {"entity": args.wandb_entity, "group": args.wandb_group}
    # one by one: Accelerate keeps those that failed, and starts none after them
    asked = accelerator.log_with
    started: list[Any] = []
    for tracker in asked:
        accelerator.log_with, accelerator.trackers = [tracker], []
        try:
            accelerator.init_trackers(
                args.wandb_project or args.name,
                config={**flags, "parameters": n_params(state.model), "config": state.config},
                init_kwargs={"wandb": {k: v for k, v in options.items() if v}},
            )
            started += accelerator.trackers
        except Exception as error:  # of the tracker's own kinds: no network, no key
            said = " ".join(str(error).split()) or type(error).__name__
            if not state.step:
                raise OSError(
                    f"a tracker can't start ({said}); for wandb, run `wandb login` or set "
                    "WANDB_MODE=offline, or leave out its flag, --wandb-project or --tensorboard"
                ) from error
            accelerator.print(f"a tracker can't start ({said}); going on without it")
    accelerator.log_with, accelerator.trackers = asked, started


def run_facts(args: argparse.Namespace, accelerator: Any, images: int) -> dict[str, Any]:
    """What a run's numbers depend on besides its config; the seed, if it was given."""
    facts = {
        "batch_size": args.batch_size,
        "grad_accum_steps": args.grad_accum_steps,
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "images": images,
        "power_ema": args.power_ema,
    }
    return facts if args.seed is None else {**facts, "seed": args.seed}


def describe(
    args: argparse.Namespace, state: TrainState, accelerator: Any, data: TrainingData
) -> str:
    """A few lines on what is about to run."""
    per_step = args.batch_size * args.grad_accum_steps * accelerator.num_processes
    section = state.config["dataset"]
    classes = f", {section['num_classes']} classes" if section["num_classes"] else ""
    lines = [
        f"{args.name}: {state.config['model']['type']}, {n_params(state.model):,} parameters"
        f"; {section['type']}, {state.dataset_length:,} images{classes}",
        data.describe(),
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {per_step} images per "
        f"step, precision {accelerator.mixed_precision}, seed {state.seed}",
    ]
    return "\n".join(filter(None, lines))


def save_to_wandb(path: Path) -> None:
    """Keep a checkpoint, with its shards, with the Weights & Biases run."""
    import wandb

    wandb.save(str(path))
    for folder in shard_folders(path):
        for file in sorted(folder.iterdir()):
            wandb.save(str(file), base_path=str(folder.parent))
