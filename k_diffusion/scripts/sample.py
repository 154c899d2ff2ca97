"""The sampling scripts: the flags that they share, and what they do with them."""

import argparse
import inspect
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from .. import distributed, generation, models, sampling
from ..checkpoints.runs import find_checkpoint
from ..common import memory, options
from ..common.files import check_writable, writable
from ..common.images import PIL_MODES, grid_columns, image_grid, to_pil_image
from ..common.tensors import DTYPES
from ..common.text import aligned
from ..config import load_config
from ..encoders.autoencoder import find_autoencoder
from ..loading import load_denoiser
from . import editing, guiding, told
from .guiding import make_guidance

# A sampler's own parameters, by the flag that sets them.
OPTIONS = {"eta": "eta", "churn": "s_churn"}

Guide = Callable[[nn.Module, torch.device], nn.Module]


class ListSamplers(argparse.Action):
    """A flag that prints the table of samplers and exits."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        print(sampler_table(), flush=True)
        parser.exit()


def add_arguments(p: argparse.ArgumentParser, *, sampler: str, steps: int) -> None:
    """Adds the flags of the scripts that write samples. sampler, steps: the defaults."""
    file: dict[str, Any] = {"type": options.path, "metavar": "FILE"}
    count: dict[str, Any] = {"type": options.positive, "metavar": "N"}
    add = p.add_argument
    text = "an inference checkpoint (.safetensors), a training checkpoint (.pth), or the name or "
    text += "folder of a run, for its latest"
    add("--checkpoint", required=True, **file, help=text)
    add("--config", **file, help="else the one in the checkpoint")
    text = "of a latent model, if it isn't where its config says"
    add("--autoencoder", type=options.path, metavar="PATH", help=text)
    add("-n", default=64, **count, help="the number of images")
    add(
        "--prefix",
        type=options.name,
        default="out",
        metavar="NAME",
        help="images are written to PREFIX_00000.png ...",
    )
    add("--grid", type=picture, metavar="FILE", help="write one picture of all of them instead")
    add("--grid-labels", action="store_true", help="with each image's class above it")
    add_choices(p, sampler=sampler, steps=steps)
    editing.add_arguments(p)


def add_choices(p: argparse.ArgumentParser, *, sampler: str, steps: int) -> None:
    """Adds the flags on how samples are drawn. sampler, steps: the defaults."""
    share: dict[str, Any] = {"type": options.non_negative_number, "metavar": "X"}
    add = p.add_argument
    text = "images at a time"
    add("--batch-size", default=64, type=options.positive, metavar="N", help=text)
    text = "image i has seed N + i; else a new one, which is printed"
    add("--seed", type=options.seed, metavar="N", help=text)
    text = "class ids, assigned to the images in turn, or 'all'"
    add(
        "--class",
        dest="classes",
        nargs="+",
        type=class_id,
        default=["all"],
        metavar="ID",
        help=text,
    )
    add("--size", type=options.size, metavar="HxW", help="of the images; else the config's")
    add("--dtype", choices=list(DTYPES), default="fp32", help="of the model's matrix products")
    add("--device", type=options.text, help="cpu, cuda, ...; else the best there is")
    options.add_compile(add, models.UNITS)
    text = "with --compile: launch an evaluation of the model at once, as a CUDA graph"
    add("--cuda-graphs", action="store_true", help=text)

    add = p.add_argument_group("how to sample").add_argument
    add("--sampler", type=sampler_name, default=sampler, metavar="NAME", help="see --list-samplers")
    add("--list-samplers", action=ListSamplers, help="print a table of them and exit")
    text = f"of noise levels: one of {', '.join(sampling.SCHEDULES)}"
    add("--schedule", type=schedule_name, default="karras", metavar="NAME", help=text)
    add("--steps", type=options.denoising_steps, default=steps, metavar="N", help="denoising steps")
    add("--eta", **share, help="share of fresh noise in stochastic samplers; 0: deterministic")
    add("--churn", **share, help="noise that euler, heun and dpm_2 add over the run")

    guiding.add_arguments(p)
    told.add_arguments(p)


def run(args: argparse.Namespace, guide: Guide | None = None) -> None:
    """Samples what the flags ask for, shared out over the processes, and writes it.

    guide: puts further guidance around the denoiser. Raises ValueError, OSError or ImportError for
    what can't be done.
    """
    if args.grid_labels and not args.grid:
        raise options.UsageError("--grid-labels are written on a grid: pass --grid FILE, too")
    check_choices(args)
    editing.check(args)
    device = distributed.check_device(args.device) if args.device else None
    accelerator = distributed.make_accelerator(cpu=args.device == "cpu")
    device = device or accelerator.device
    output = args.grid or image_path(args.prefix, 0)
    check_writable(output)
    # one for all processes, though the run may go on
    args.checkpoint = distributed.broadcast(find_checkpoint(args.checkpoint))
    denoiser, config = load_denoiser(args.checkpoint, args.config, args.autoencoder)
    guided = make_guidance(ready(denoiser, args, device), config, args, device)
    guided = guided if guide is None else guide(guided, device)

    seed = distributed.agree_on_seed(args.seed)
    shape, classes, batches = draw(accelerator, guided, config, args, seed, device)
    if args.grid_labels and classes is None:
        raise ValueError("--grid-labels: this model is unconditional, its images have no classes")
    check_picture(output, shape[0])
    writable(output)
    accelerator.print(
        f"{args.n} images of {shape[1]} x {shape[2]} from {args.checkpoint}: {args.sampler}, "
        f"{args.steps} steps, seed {seed}"
    )
    model = config["model"]
    trained = generation.image_shape(guided, (model["input_channels"], *model["input_size"]))
    if shape != trained:
        h, w = trained[1:]
        accelerator.print(f"the model was trained on {h} x {w}; other sizes can look worse")
    if args.grid:
        images = torch.cat([torch.empty(0, *shape, device=device), *batches])
    else:
        write_images(batches, distributed.share(accelerator, args.n), args.prefix)

    if args.grid:
        everyone = distributed.gather_shares(accelerator, images, args.n)
        if everyone is not None:
            columns = grid_columns(len(classes or args.prompts), args.n, *shape[1:])
            labels = [classes[i % len(classes)] for i in range(args.n)] if classes else None
            labels = labels if args.grid_labels else None
            image_grid(everyone, columns, labels=labels).save(args.grid)
        accelerator.print(f"wrote {args.grid}")
    else:
        first, last = (image_path(args.prefix, i) for i in (0, args.n - 1))
        accelerator.print(f"wrote {first} to {last}")
    accelerator.end_training()


def ready(denoiser: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The denoiser on its device, compiled where the flags say so.

    Raises ValueError for CUDA graphs on another device.
    """
    if args.cuda_graphs and device.type != "cuda":
        raise ValueError(f"--cuda-graphs needs a CUDA device, got {device.type}; leave it out")
    if args.compile:
        mode = {"mode": models.CUDA_GRAPHS} if args.cuda_graphs else {}
        models.compile_model(denoiser.inner_model, args.compile, **mode)  # type: ignore[arg-type]
    return denoiser.to(device)


class Drawn(NamedTuple):
    """Images to sample: their shape (c, h, w), the class ids that they have in turn (None without),
    and this process's share of them, batch by batch, sampled as they are asked for."""

    shape: tuple[int, ...]
    classes: list[int] | None
    batches: Iterator[torch.Tensor]


def draw(
    accelerator: Any,
    guided: nn.Module,
    config: dict[str, Any],
    args: argparse.Namespace,
    seed: int,
    device: torch.device,
) -> Drawn:
    """The args.n images that the flags ask for: image i has seed + i, whoever samples it.

    guided: the denoiser of `config` with its guidance. Raises ValueError for a size that is missing
    or that the model can't have, and for classes that it doesn't have.
    """
    model, num_classes = config["model"], config["dataset"]["num_classes"]
    classes = parse_classes(args.classes, num_classes)
    autoencoder = find_autoencoder(guided)
    size = args.size or model["input_size"]
    if size is None:
        raise ValueError("the config has no model.input_size; pass --size")
    if args.size and autoencoder is not None:
        size = autoencoder.latent_shape((autoencoder.image_channels, *size))[1:]
    if list(size) != model["input_size"]:
        with warnings.catch_warnings():  # the config's keys have been told of
            warnings.simplefilter("ignore")
            load_config({**config, "model": {**model, "input_size": list(size)}})
    shape = (model["input_channels"], *size)
    images = generation.image_shape(guided, shape)
    count = args.n if getattr(args, "grid", None) else min(args.n, args.batch_size)
    memory.check(
        4 * count * math.prod(images) + 100 * args.n,
        f"{count:,} images of {images[1]} x {images[2]}",
        "pass a smaller --size, -n or --batch-size",
    )
    mine = distributed.share(accelerator, args.n)
    sigmas = sampling.make_sigmas(args.schedule, args.steps, model["sigma_min"], model["sigma_max"])
    say = accelerator.print
    given = told.prepare(args, config, images[1:], device, say, autoencoder)
    edit = editing.prepare(args, guided, config, shape, sigmas, classes, device, say, given)
    batches = generation.generate(
        edit.denoiser,
        shape,
        [seed + i for i in mine],
        edit.sigmas,
        classes=classes and [classes[i % len(classes)] for i in mine],
        num_classes=num_classes,
        sampler=args.sampler,
        sampler_args=sampler_options(args),
        batch_size=args.batch_size,
        device=device,
        disable=not accelerator.is_main_process,
        static=args.compile is not None,
        given=given and (lambda rows: given([mine[i] for i in rows])),
        finish=edit.finish,
        **edit.options,
    )
    dtype = DTYPES[args.dtype]
    autocast = (
        nullcontext if dtype == torch.float32 else partial(torch.autocast, device.type, dtype)
    )
    return Drawn(images, classes, generation.in_context(batches, autocast))


@options.of
def sampler_name(text: str) -> str:
    """An argparse type: a sampler that takes a schedule."""
    generation.check_sampler(text)
    return text


@options.of
def schedule_name(text: str) -> str:
    """An argparse type: a schedule between two noise levels."""
    sampling.make_sigmas(text, 2, 0.01, 1.0)
    return text


@options.of
def class_id(text: str) -> str:
    """An argparse type: a class id, or 'all'."""
    if text != "all" and not (text.isascii() and text.isdigit()):
        raise ValueError(f"a class is a number or 'all', got {text!r}")
    return text


@options.of
def picture(text: str) -> Path:
    """An argparse type: a file that a picture can be written to."""
    path = options.path(text)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"must end in .png or another ending that PIL can write, got {text!r}")
    return path


def check_picture(path: Path, channels: int) -> None:
    """Raises ValueError unless images of so many channels can be written to a file of that name."""
    if channels not in PIL_MODES:
        raise ValueError(
            f"the model's images have {channels} channels; pictures have "
            f"{', '.join(map(str, PIL_MODES))}"
        )
    try:
        tiny = Image.new(PIL_MODES[channels], (1, 1))
        tiny.save(io.BytesIO(), Image.registered_extensions()[path.suffix.lower()])
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} can't hold images of {channels} channels: {error}") from None


def check_choices(args: argparse.Namespace) -> None:
    """Raises UsageError where the flags of `add_choices` don't go together."""
    for flag, given in (("interval", args.cfg_interval), ("rule", args.cfg_rule != "linear")):
        if given and args.cfg_scale == 1:
            raise options.UsageError(f"--cfg-{flag} needs a --cfg-scale other than 1")
    if args.cfg_interval and not args.cfg_interval[0] < args.cfg_interval[1]:
        low, high = args.cfg_interval
        raise options.UsageError(f"--cfg-interval needs LOW < HIGH, got {low:g} and {high:g}")
    if args.autoguidance_scale is not None and args.autoguidance is None:
        raise options.UsageError("--autoguidance-scale needs --autoguidance CHECKPOINT")
    if args.perturbed_scale is not None and not (args.skip_layers or args.identity_attention):
        raise options.UsageError("--perturbed-scale needs --skip-layers or --identity-attention")
    if args.cuda_graphs and args.compile != models.UNITS[0]:
        raise options.UsageError("--cuda-graphs needs --compile, of the whole model")
    sampler_options(args)


def sampler_options(args: argparse.Namespace) -> dict[str, float]:
    """What --eta and --churn set. Raises UsageError for a sampler that doesn't have it."""
    given = {flag: value for flag in OPTIONS if (value := getattr(args, flag)) is not None}
    for flag in given:
        rows = [
            name
            for name, row in sampling.SAMPLERS.items()
            if row.takes_sigmas and OPTIONS[flag] in inspect.signature(row.function).parameters
        ]
        if sampling.get_sampler(args.sampler).name not in rows:
            raise options.UsageError(
                f"sampler {args.sampler!r} takes no --{flag}; these do: {', '.join(rows)}"
            )
    return {OPTIONS[flag]: value for flag, value in given.items()}


def image_path(prefix: str, i: int) -> Path:
    """The file of image i."""
    return Path(f"{prefix}_{i:05}.png")


def write_images(batches: Iterator[torch.Tensor], indices: range, prefix: str) -> None:
    """Writes each image of the batches to its file, as soon as it's there.

    batches: tensors of (n, c, h, w) in [-1, 1].
    """
    left = iter(indices)
    for batch in batches:
        for image, i in zip(batch, left):
            to_pil_image(image).save(image_path(prefix, i))


def sampler_table() -> str:
    """SAMPLERS as text, one row per line: first those that need no noise."""
    rows = [("sampler", "order", "evaluations", "stochastic", "paper")]
    for info in sorted(sampling.SAMPLERS.values(), key=lambda info: (info.stochastic, info.name)):
        stochastic = "yes" if info.stochastic else "no"
        rows.append((info.name, str(info.order), str(info.evaluations), stochastic, info.paper))
    return "\n".join(aligned(rows))


def parse_classes(names: Sequence[str], num_classes: int) -> list[int] | None:
    """Class ids from the command line, where "all" stands for each of them; None without classes.

    Raises ValueError for what is no id of the model.
    """
    if not num_classes:
        if list(names) != ["all"]:
            raise ValueError("this model is unconditional: it has no classes to choose from")
        return None
    classes: list[int] = []
    for name in names:
        classes += range(num_classes) if name == "all" else [int(name)]
    generation.check_classes(classes, num_classes)
    return classes
