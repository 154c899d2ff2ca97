"""Images of a model by their seeds: image i is the same in any batch and on any process.

`editing` begins with images that are there; `pretrained` is `K.sample` and models to share.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import sampling
from ..common import numbers
from ..common.modules import eval_mode
from ..conditions import Given
from ..distributed import any_process, gather_shares, sharded, share
from ..encoders.autoencoder import find_autoencoder
from . import editing

STEPS = 50  # of the images that training shows


class SamplingStopped(Exception):
    """Sampling was given up, as its caller asked."""


def generate(
    model: nn.Module,
    shape: Sequence[int],
    seeds: Sequence[int],
    sigmas: torch.Tensor,
    *,
    classes: Sequence[int] | None = None,
    num_classes: int = 0,
    sampler: str = "dpmpp_2m",
    sampler_args: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    disable: bool | None = None,
    stop: Callable[[], bool] = lambda: False,
    start: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    resample: int = 1,
    jump: int = 10,
    static: bool = False,
    given: Given | None = None,
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Iterator[torch.Tensor]:
    """Sample one image per seed, batch by batch.

    model: a denoiser, guided or not, (x, sigma, class_cond=) -> denoised; the latents of one that
    has an autoencoder are decoded. shape: of x, an image or the latents of one, (c, h, w). sigmas:
    (steps + 1,), the schedule. classes: one id per seed, for a class-conditional model of
    num_classes. sampler: a row of `sampling.SAMPLERS`. disable: hides the progress bar; None hides
    it where there's no terminal. stop: asked after each step, whether to give up. start:
    (1, c, h, w), a sample that the noise is added to. noise: (1, c, h, w), of standard deviation 1,
    instead of the seeds'. resample, jump: of `editing.sample_resampled`. finish: of the
    images, (n, c, h, w), once they are decoded.
    static: the model always sees as many images, for which it was compiled: a last batch of fewer
    is filled up with images that are thrown away. given: from places in seeds to the conditions of
    texts and images, see `conditions`.

    Yields images (n, c, h, w) in float32, n <= batch_size, in the order of the seeds. Raises
    ValueError for class ids out of range or an unknown sampler, SamplingStopped once `stop` says
    so.
    """
    check_classes(classes, num_classes)
    if classes is not None and len(classes) != len(seeds):
        raise ValueError(f"needs one class for each of {len(seeds)} seeds, got {len(classes)}")
    check_sampler(sampler)
    numbers.count(1, batch_size=batch_size)

    autoencoder = find_autoencoder(model)
    draw: Callable[..., torch.Tensor] = sampling.sample
    if resample > 1:
        draw = partial(editing.sample_resampled, resample=resample, jump=jump)

    def run(rows: Sequence[int], step: Callable[..., object]) -> torch.Tensor:
        batch = [seeds[i] for i in rows]
        x = sampling.randn_per_seed(batch, shape, device=device)
        x = (x if noise is None else noise.expand_as(x)) * float(sigmas[0])
        x = x if start is None else x + start
        cond = {}
        if classes is not None:
            cond["class_cond"] = torch.tensor([classes[i] for i in rows], device=device)
        if given is not None:
            cond |= given(rows)
        with eval_mode(model):
            x = draw(
                model,
                x,
                sigmas,
                sampler,
                batch,
                callback=step,
                extra_args=cond,
                disable=True,
                **(sampler_args or {}),
            ).float()
        with torch.no_grad():
            return finish(x if autoencoder is None else autoencoder.decode(x))

    def step(_: object) -> None:
        bar.update()
        if stop():
            raise SamplingStopped

    starts = range(0, len(seeds), batch_size)
    batch_size = min(batch_size, len(seeds))
    with tqdm(
        total=len(starts) * (len(sigmas) - 1) * resample,
        desc="sampling",
        unit="step",
        leave=None,  # gone when done, where it stands below another bar
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        disable=disable,
    ) as bar:
        for first in starts:
            rows = range(first, min(first + batch_size, len(seeds)))
            spare = [first] * (batch_size - len(rows)) if static else []
            yield run([*rows, *spare], step)[: len(rows)]


def image_shape(model: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """(c, h, w) of the images that `generate` makes of a model's samples, (c, h, w)."""
    autoencoder = find_autoencoder(model)
    return tuple(shape) if autoencoder is None else autoencoder.image_shape(shape)


def check_sampler(name: str) -> None:
    """Raises ValueError unless it is a row of `sampling.SAMPLERS` that takes a schedule."""
    if not sampling.get_sampler(name).takes_sigmas:
        names = ", ".join(name for name, row in sampling.SAMPLERS.items() if row.takes_sigmas)
        raise ValueError(f"sampler {name!r} takes no schedule; these do: {names}")


def check_classes(classes: Sequence[int] | None, num_classes: int) -> None:
    """Raises ValueError unless the ids fit a model of num_classes (0: unconditional)."""
    if num_classes and classes is None:
        raise ValueError(f"this model has {num_classes} classes: say which to sample")
    bad = [c for c in classes or () if not 0 <= c < num_classes]
    if bad:
        limit = f"0 to {num_classes - 1}" if num_classes else "none: the model is unconditional"
        raise ValueError(f"class {bad[0]} is out of range; classes are {limit}")


def sample_batches(
    accelerator: Any,
    denoiser: nn.Module,
    config: Mapping[str, Any],
    seeds: Sequence[int],
    *,
    sampler: str = "dpmpp_2m",
    sampler_args: Mapping[str, Any] | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    stop: Callable[[], bool] = lambda: False,
    given: Given | None = None,
) -> Iterator[torch.Tensor]:
    """This process's share of one image per seed, (k, c, h, w) each, with all classes in turn.

    The share is seeds i = process, process + processes, ...; `steps` steps, or STEPS, on the Karras
    schedule, in the accelerator's precision. stop: asked after each step. Once it is True on any
    process, SamplingStopped is raised on all of them, when the others are done with their batch.
    given: the conditions of images by their numbers, see `conditions`.
    """
    model, num_classes = config["model"], config["dataset"]["num_classes"]
    mine = list(share(accelerator, len(seeds)))
    most = math.ceil(len(seeds) / accelerator.num_processes)
    count = len(mine)
    if sharded(accelerator):  # each step is one of all processes: as many images for each
        mine += [0] * (most - count)
        alone = stop
        stop = lambda: any_process(accelerator, alone())  # noqa: E731
    batches = generate(
        denoiser,
        (model["input_channels"], *model["input_size"]),
        [seeds[i] for i in mine],
        sampling.get_sigmas_karras(steps or STEPS, model["sigma_min"], model["sigma_max"]),
        classes=[i % num_classes for i in mine] if num_classes else None,
        num_classes=num_classes,
        sampler=sampler,
        sampler_args=sampler_args,
        batch_size=batch_size,
        device=accelerator.device,
        disable=None if accelerator.is_main_process else True,
        stop=stop,
        given=given and (lambda places: given([mine[i] for i in places])),
    )
    batches = _first(in_context(batches, accelerator.autocast), count)
    return _stopping_together(accelerator, batches, math.ceil(most / batch_size))


def _first(batches: Iterator[torch.Tensor], n: int) -> Iterator[torch.Tensor]:
    """The first n of the images in batches (k, c, h, w), all of which are drawn."""
    for batch in batches:
        if n > 0:
            yield batch[:n]
        n -= len(batch)


def _stopping_together(
    accelerator: Any, batches: Iterator[torch.Tensor], most: int
) -> Iterator[torch.Tensor]:
    """The batches (n, ...) of a process, of which each has `most` or one less."""
    for _ in range(most):
        batch, stopped = None, False
        try:
            batch = next(batches, None)
        except SamplingStopped:
            stopped = True
        if any_process(accelerator, stopped):
            raise SamplingStopped
        if batch is not None:
            yield batch
    yield from batches  # none is left, but a progress bar to be closed


def in_context(
    batches: Iterator[torch.Tensor], context: Callable[[], AbstractContextManager[Any]]
) -> Iterator[torch.Tensor]:
    """The batches (n, ...), each sampled within a new context; what is done with them is not."""
    while True:
        with context():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def sample_share(
    accelerator: Any,
    denoiser: nn.Module,
    config: Mapping[str, Any],
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    stop: Callable[[], bool] = lambda: False,
    given: Given | None = None,
) -> torch.Tensor | None:
    """One image per seed, shared out over the processes; all of them on the main one, else None.

    stop, given: as of `sample_batches`.
    """
    model = config["model"]
    shape = image_shape(denoiser, (model["input_channels"], *model["input_size"]))
    rest: dict[str, Any] = {"batch_size": batch_size, "stop": stop, "given": given}
    batches = sample_batches(accelerator, denoiser, config, seeds, **rest)
    images = torch.cat([torch.empty(0, *shape, device=accelerator.device), *batches])
    return gather_shares(accelerator, images, len(seeds))
