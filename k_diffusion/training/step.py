"""One optimizer step."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from .. import conditions, distributed, models
from ..common.seeds import derive_seed
from ..densities import enable_stratified_accelerate
from ..models.flags import CHECKPOINTING
from . import sharding
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

    Noise levels and dropped conditions are drawn on the CPU, and so are the same on any device.
    """
    model, section = config["model"], config["dataset"]
    image = batch["image"].to(device, non_blocking=True)
    cond = {}
    if model["augment_prob"] > 0 and _takes_aug_cond(denoiser.inner_model):
        cond["aug_cond"] = batch["aug_cond"].to(device, non_blocking=True)
    if section["num_classes"]:
        kept = drop_classes(batch["class"], section["num_classes"], section["cond_dropout_rate"])
        cond["class_cond"] = kept.to(device, non_blocking=True)
    for name, x in conditions.dropped(batch, config).items():
        cond[name] = x.to(device, non_blocking=True)
    sigma = sample_density([len(image)]).to(device, non_blocking=True)
    noise = torch.randn_like(image)
    return denoiser.loss(image, noise, sigma, **cond)


def train_step(
    accelerator: Any,
    denoiser: Any,
    opt: Any,
    state: TrainState,
    batches: Iterator[dict[str, Any]],
    sample_density: Any,
    *,
    accumulate: int = 1,
    checkpointing: str = "off",
    loss_of: Callable[..., torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, backward, clip, step, EMA: one optimizer step over `accumulate` batches of `batches`.

    denoiser: around the prepared (DDP-wrapped) inner model; opt: the prepared optimizer.
    checkpointing: a row of `models.flags.CHECKPOINTING`. loss_of: called in place of `batch_loss`.
    Noise levels are stratified over all processes and batches of the step, unless the state
    measures the noise scale: strata would correlate the samples. All random numbers follow from the
    seed, the step and the process. A step whose loss or gradient is NaN or infinite on any process
    is one of no length: it leaves the weights and the optimizer's state as they are, without
    waiting for the device. In fp16, where
    gradients overflow at times, it leaves the learning rate and the average, too. Returns the mean
    loss of this process and the norm of the whole gradient before clipping, on the device.
    """
    config = state.config
    opt.zero_grad(set_to_none=True)
    losses = []
    seen = 0
    measured = state.noise_scale
    density = sample_density if loss_of else state.levels.watch(sample_density)
    for i in range(accumulate):
        batch = next(batches)
        torch.manual_seed(derive_seed(state.seed, 2, state.step, i, accelerator.process_index))
        last = i == accumulate - 1
        with (
            # whole gradients, which wait to be summed up, are what shards have no memory for
            nullcontext()
            if last or distributed.sharded(accelerator)
            else accelerator.no_sync(denoiser.inner_model),
            enable_stratified_accelerate(accelerator, measured is not None, i, accumulate),
            models.checkpointing(**CHECKPOINTING[checkpointing]),
        ):
            parts = batch, density, config, accelerator.device
            each = (loss_of or batch_loss)(denoiser, *parts)
            if loss_of is None:
                state.levels.add(each)
            loss = each.mean()
            # where the loss is lost, so is the gradient, which all processes will see
            known = 1 + 0 * loss.detach()
            accelerator.backward(loss * known / accumulate)
        losses.append(loss.detach())
        seen += len(batch["image"]) * accelerator.num_processes

    max_norm = config["optimizer"]["max_grad_norm"]
    most = math.inf if max_norm is None else max_norm
    norm = sharding.clip_grad_norm_(accelerator, denoiser.parameters(), state.opt, most)
    if measured is not None:
        scale = 1.0 if state.scaler is None else state.scaler.get_scale()
        measured.step(norm, accumulate, seen, accelerator.num_processes, scale)
    with state.changing():
        update(opt, state, norm)
        if not opt.step_was_skipped:
            state.sched.step()
            ema_update(state.model, state.model_ema, state.ema_sched.get_value())
            state.ema_sched.step()
            if state.power_ema is not None:
                state.power_ema.update(state.model, state.samples + seen)
        state.samples += seen
        state.step += 1
    return torch.stack(losses).mean(), norm


def update(opt: Any, state: TrainState, norm: torch.Tensor) -> None:
    """Step the optimizer, unless the norm of the gradient, (), is NaN or infinite."""
    if state.scaler is not None:  # it looks for itself
        opt.step()
    elif not state.opt.defaults.get("fused"):
        if norm.isfinite():  # waits for the device
            opt.step()
    else:
        # on the device, the way that a GradScaler tells fused optimizers
        _begin_momentum(state.opt)
        state.opt.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        opt.step()
        del state.opt.found_inf  # type: ignore[attr-defined]


def _begin_momentum(opt: torch.optim.Optimizer) -> None:
    """Start SGD's momentum at 0, as its first step would leave it undefined if it were skipped."""
    if opt.state:
        return
    for group in opt.param_groups:
        for p in group["params"]:
            if group.get("momentum") and p.grad is not None:
                opt.state[p]["momentum_buffer"] = torch.zeros_like(p)
