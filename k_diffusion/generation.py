"""Images of a model by their seeds: image i is the same in any batch and on any process."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from . import sampling, utils


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
) -> Iterator[torch.Tensor]:
    """Sample one image per seed, batch by batch.

    model: a denoiser, guided or not, (x, sigma, class_cond=) -> denoised. shape: of an image,
    (c, h, w). sigmas: the schedule. classes: one id per seed, for a class-conditional model of
    num_classes. sampler: a row of `sampling.SAMPLERS`. disable: hides the progress bar; None hides
    it where there's no terminal.

    Yields (n, c, h, w) in float32, n <= batch_size, in the order of the seeds. Raises ValueError
    for class ids out of range or an unknown sampler.
    """
    check_classes(classes, num_classes)
    if classes is not None and len(classes) != len(seeds):
        raise ValueError(f"needs one class for each of {len(seeds)} seeds, got {len(classes)}")
    info = sampling.get_sampler(sampler)
    if not info.takes_sigmas:
        names = ", ".join(name for name, row in sampling.SAMPLERS.items() if row.takes_sigmas)
        raise ValueError(f"sampler {sampler!r} takes no schedule; these do: {names}")

    def run(at: slice, step: Callable[..., object]) -> torch.Tensor:
        x = sampling.randn_per_seed(seeds[at], shape, device=device) * float(sigmas[0])
        args: dict[str, Any] = dict(sampler_args or {})
        noise_sampler = sampling.make_noise_sampler(sampler, x, sigmas, seeds[at])
        if noise_sampler is not None:
            args["noise_sampler"] = noise_sampler
        cond = {} if classes is None else {"class_cond": torch.tensor(classes[at], device=device)}
        with utils.eval_mode(model):
            return info.function(
                model, x, sigmas, extra_args=cond, callback=step, disable=True, **args
            ).float()

    starts = range(0, len(seeds), batch_size)
    with tqdm(
        total=len(starts) * (len(sigmas) - 1),
        desc="sampling",
        unit="step",
        leave=None,  # gone when done, where it stands below another bar
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        disable=disable,
    ) as bar:
        for start in starts:
            yield run(slice(start, start + batch_size), lambda _: bar.update())


def check_classes(classes: Sequence[int] | None, num_classes: int) -> None:
    """Raises ValueError unless the ids fit a model of num_classes (0: unconditional)."""
    if num_classes and classes is None:
        raise ValueError(f"this model has {num_classes} classes: say which to sample")
    bad = [c for c in classes or () if not 0 <= c < num_classes]
    if bad:
        limit = f"0 to {num_classes - 1}" if num_classes else "none: the model is unconditional"
        raise ValueError(f"class {bad[0]} is out of range; classes are {limit}")


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
        if not name.isdecimal() and name != "all":
            raise ValueError(f"a class is a number or 'all', got {name!r}")
        classes += range(num_classes) if name == "all" else [int(name)]
    check_classes(classes, num_classes)
    return classes


def load_denoiser(
    path: str | Path, config: str | Path | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser of an inference checkpoint (.safetensors) or, by its averaged weights, of a
    training checkpoint (.pth); in float32, on the CPU, in evaluation mode.

    config: a config file; by default the one in the checkpoint. Returns the denoiser and the
    config. Raises ValueError for a damaged file or one of another architecture.
    """
    from .config import load_config, make_denoiser_wrapper, make_model
    from .training import checkpoint

    path = Path(path)
    if path.suffix == ".safetensors":
        weights = checkpoint.read_weights(path)
        loaded = load_config(config or path)
    else:
        state = checkpoint.read_checkpoint(path)
        weights = state.get("model_ema", state["model"])
        loaded = load_config(config or state["config"], embedded=config is None)
    model = make_model(loaded)
    checkpoint.load_weights(model, weights, path)
    return make_denoiser_wrapper(loaded)(model).eval().requires_grad_(False), loaded
