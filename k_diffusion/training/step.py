"""One optimizer step."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from .. import models
from ..common.seeds import derive_seed
from ..densities import enable_stratified_accelerate
from ..models.flags import CHECKPOINTING
from .ema import ema_update
from .state import TrainState


def drop_classes(classes: torch.Tensor, num_classes: int, rate: float) -> torch.Tensor:
    """Replace a share of class ids by num_classes, "no class", for classifier-free guidance.

    classes: (n,).
    """
    return torch.where(torch.rand(classes.shape) < rate, num_classes, classes)


def _takes_aug_cond(network: Any) -> bool:
    """Whether a model takes `aug_cond`, under wrappers such as DDP's."""
    while not hasattr(network, "takes_aug_cond") and hasattr(network, "module"):
        network = network.module
    return getattr(network, "takes_aug_cond", False)


def batch_loss(
    denoiser: Any,
    batch: dict[str, Any],
    sample_density: Callable[..., torch.Tensor],
    config: dict[str, Any],
    device: torch.device,
) -> torch.Tensor:
    """The loss per sample, (n,), of a batch at noise levels drawn from the density.

    Noise levels and dropped classes are drawn on the CPU, and so are the same on any device.
    """
    model, section = config["model"], config["dataset"]
    image = batch["image"].to(device, non_blocking=True)
    cond = {}
    if model["augment_prob"] > 0 and _takes_aug_cond(denoiser.inner_model):
        cond["aug_cond"] = batch["aug_cond"].to(device, non_blocking=True)
    if section["num_classes"]:
        kept = drop_classes(batch["class"], section["num_classes"], section["cond_dropout_rate"])
        cond["class_cond"] = kept.to(device, non_blocking=True)
    sigma = sample_density([len(image)]).to(device, non_blocking=True)
    noise = torch.randn_like(image)
    return denoiser.loss(image, noise, sigma, **cond)


def train_step(
    accelerator: Any,
    denoiser: Any,
    opt: Any,
    state: TrainState,
    batches: Iterator[dict[str, Any]],
    sample_density: Callable[..., torch.Tensor],
    *,
    accumulate: int = 1,
    checkpointing: str = "off",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss, backward, clip, step, EMA: one optimizer step over `accumulate` batches of `batches`.

    denoiser: around the prepared (DDP-wrapped) inner model; opt: the prepared optimizer.
    checkpointing: a row of `models.flags.CHECKPOINTING`. Noise levels are stratified over all
    processes and batches of the step, unless the state measures the noise scale: strata would
    correlate the samples. All random numbers follow from the seed, the step and the process. In
    fp16, a step whose gradients overflowed leaves the weights, and so the learning rate and the
    average, as they are. Returns the mean loss of this process and the norm of the gradient
    (None without clipping or noise scale), on the device.
    """
    config = state.config
    opt.zero_grad(set_to_none=True)
    losses = []
    seen = 0
    measured = state.noise_scale
    for i in range(accumulate):
        batch = next(batches)
        torch.manual_seed(derive_seed(state.seed, 2, state.step, i, accelerator.process_index))
        last = i == accumulate - 1
        with (
            nullcontext() if last else accelerator.no_sync(denoiser.inner_model),
            enable_stratified_accelerate(accelerator, measured is not None, i, accumulate),
            models.checkpointing(**CHECKPOINTING[checkpointing]),
        ):
            loss = batch_loss(denoiser, batch, sample_density, config, accelerator.device).mean()
            accelerator.backward(loss / accumulate)
        losses.append(loss.detach())
        seen += len(batch["image"]) * accelerator.num_processes

    norm = None
    max_norm = config["optimizer"]["max_grad_norm"]
    if max_norm is not None or measured is not None:
        most = math.inf if max_norm is None else max_norm
        norm = accelerator.clip_grad_norm_(denoiser.parameters(), most)
        if measured is not None:
            scale = 1.0 if state.scaler is None else state.scaler.get_scale()
            measured.step(norm, accumulate, seen, accelerator.num_processes, scale)
    with state.changing():
        opt.step()
        if not opt.step_was_skipped:
            state.sched.step()
            ema_update(state.model, state.model_ema, state.ema_sched.get_value())
            state.ema_sched.step()
        state.samples += seen
        state.step += 1
    return torch.stack(losses).mean(), norm
