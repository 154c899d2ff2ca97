"""The flags of train.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.snapshots import parse_width
from ..common import options
from ..evaluation.protocols import PROTOCOLS, get_protocol
from ..models.compiling import UNITS
from ..models.flags import CHECKPOINTING
from .sharding import WAYS


class Default(int):
    """A flag's default, told from the same number on the command line."""


@options.of
def protocol(text: str) -> str:
    """An argparse type: an evaluation protocol's name, or its encoder's."""
    get_protocol(text)
    return text


def parse_args(description: str | None = None, unused: Sequence[str] = ()) -> argparse.Namespace:
    """The command line of train.py, or of a script without what these names of flags hold."""
    p = argparse.ArgumentParser(description=description, formatter_class=options.HelpFormatter)
    count: dict[str, Any] = {"type": options.positive, "metavar": "N"}
    steps: dict[str, Any] = {"type": options.steps, "metavar": "STEPS"}
    add = p.add_argument_group("the run").add_argument
    add("--config", type=options.path, required=True, metavar="FILE", help="the configuration file")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of it, e.g. model.patch_size=[2,2]; repeatable",
    )
    add("--name", type=options.name, default="model", help="the run's name; its files are NAME_...")
    text = "keep its files together in this folder of its own, with index.html, a page of its "
    text += "curves and grids; else they lie where --name says"
    add("--output-dir", type=options.path, metavar="FOLDER", help=text)
    add("--end-step", **steps, help="stop after this many steps; else at Ctrl-C")
    add("--seed", type=options.seed, metavar="N", help="the random seed; else a new one")
    add(
        "--dry-run",
        action="store_true",
        help="estimate memory and compute, print the filled-in config, and exit",
    )
    add = p.add_argument_group("optimization").add_argument
    add("--batch-size", **count, default=64, help="images per process and batch")
    add("--grad-accum-steps", **count, default=1, help="batches that make up one step")
    add(
        "--lr",
        type=options.positive_number,
        metavar="X",
        help="override the config's learning rate",
    )
    add(
        "--max-bad-steps",
        **count,
        default=10,
        help="stop when so many in a row had a NaN or infinite loss or gradient",
    )
    add("--mixed-precision", choices=["no", "fp16", "bf16", "fp8"], help="of the model")
    add(
        "--no-tf32",
        action="store_true",
        help="compute CUDA's matrix products of float32 in full precision, not in TF32",
    )
    add(
        "--checkpointing",
        nargs="?",
        const="full",
        default="off",
        choices=list(CHECKPOINTING),
        help="save memory: recompute blocks in the backward pass, fully (without a value) or, with "
        "'selective', all but their attention",
    )
    options.add_compile(add, UNITS)
    add(
        "--fsdp",
        nargs="?",
        const="again",
        choices=WAYS,
        help="split the model, its averages and the optimizer's state over the processes (FSDP2), "
        "gathering weights again in the backward pass (without a value), or, with 'keep', keeping "
        "them from the forward pass",
    )
    add(
        "--gns",
        action="store_true",
        help="measure the gradient noise scale: how large a batch pays",
    )
    add(
        "--power-ema",
        type=options.of(parse_width),
        nargs="+",
        default=[],
        metavar="WIDTH",
        help="keep power-function averages of these widths, e.g. 0.05 0.1, and write a snapshot of "
        "each at every save, from which k_diffusion.training.posthoc makes any other width",
    )
    add = p.add_argument_group("data").add_argument
    add("--num-workers", type=options.few, default=8, metavar="N", help="loading processes")
    add(
        "--start-method",
        default="spawn",
        choices=["fork", "forkserver", "spawn"],
        help="how they are started",
    )
    add("--strict-data", action="store_true", help="stop at a corrupt image, don't skip it")
    add = p.add_argument_group("checkpoints").add_argument
    add("--save-every", **steps, default=10000, help="save a checkpoint")
    add(
        "--save-minutes",
        type=options.positive_number,
        default=30,
        metavar="MINUTES",
        help="save one, too, when the last is that old",
    )
    text = "with --fsdp: each process writes its shards, into the folder NAME_STEP.dcp, instead of "
    text += "sending them to the first process, which otherwise needs memory for the whole state"
    add("--save-sharded", action="store_true", help=text)
    add("--keep", **count, help="delete all but the newest N, and the last from before trouble")
    add(
        "--resume",
        type=options.path,
        metavar="FILE",
        help="the checkpoint to resume from; else the run's latest, as NAME_state.json says",
    )
    add(
        "--resume-inference",
        type=options.path,
        metavar="FILE",
        help="the inference checkpoint whose weights a new run starts from",
    )
    add("--reset-ema", action="store_true", help="go on from the averaged weights and average anew")
    add = p.add_argument_group("demo grids and logs").add_argument
    add("--demo-every", **steps, default=500, help="draw a demo grid")
    add("--sample-n", **count, default=64, help="images in a demo grid")
    add("--log-every", **steps, default=25, help="write a row of NAME_metrics.csv")
    text = "measure the loss of the averaged weights on the test images, where dataset.split is "
    add(
        "--validate-every",
        type=options.non_negative,
        metavar="STEPS",
        default=500,
        help=text + "train; 0 for never",
    )
    add("--validate-n", **count, default=512, help="test images for it, at most")
    add("--tensorboard", type=options.path, metavar="FOLDER", help="log to TensorBoard there")
    add("--wandb-project", type=options.text, metavar="PROJECT", help="log to Weights & Biases")
    add("--wandb-entity", type=options.text, metavar="ENTITY", help="its entity")
    add("--wandb-group", type=options.text, metavar="GROUP", help="its group of runs")
    add("--wandb-save-model", action="store_true", help="save checkpoints there too")
    add = p.add_argument_group("metrics").add_argument
    add(
        "--evaluate-every",
        type=options.non_negative,
        default=Default(10000),
        metavar="STEPS",
        help="measure FID and KID; 0 for never; by default only with weights that are in the cache",
    )
    add(
        "--evaluate-n",
        type=options.non_negative,
        default=2000,
        metavar="N",
        help="samples to draw; 0 for no evaluation",
    )
    add("--evaluate-only", action="store_true", help="evaluate, then exit")
    add(
        "--evaluate-with",
        type=protocol,
        default="inception",
        metavar="NAME",
        help=f"a protocol or its encoder: inception, clip, dinov2, {', '.join(PROTOCOLS)}",
    )
    text = "weights of the encoder; else the cache folder's, or a download"
    add("--evaluate-weights", type=options.path, metavar="FILE", help=text)
    text = "of the data set, to compare with; else the one that is trained on"
    add("--evaluate-split", type=options.text, metavar="NAME", help=text)
    add("--clip-model", default="ViT-B/16", metavar="MODEL", help="of CLIP")
    add("--dinov2-model", default="vitl14", metavar="MODEL", help="of DINOv2")
    for action in p._actions:
        if action.dest in unused:
            action.help = argparse.SUPPRESS
    args = p.parse_args()
    for flag in unused:
        if getattr(args, flag) != p.get_default(flag):
            p.error(f"--{flag.replace('_', '-')} is of train.py, not of this script")
    for flag in ("wandb_entity", "wandb_group", "wandb_save_model"):
        if getattr(args, flag) and not args.wandb_project:
            p.error(f"--{flag.replace('_', '-')} needs a --wandb-project")
    if args.save_sharded and not args.fsdp:
        p.error("--save-sharded writes the shards that --fsdp makes: pass both, or neither")
    if args.resume and args.resume_inference:
        p.error("--resume goes on with a run and --resume-inference starts one: pass one of them")
    if args.output_dir is not None:
        if Path(args.name).name != args.name:
            p.error(f"--output-dir is the folder: pass a --name without one, not {args.name}")
        args.name = str(args.output_dir / args.name)
    return args
