#!/usr/bin/env python3
"""Train an autoencoder for latent models. For several processes: accelerate launch"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP
import k_diffusion.common.launcher  # before torch: the launcher may be gone when it's loaded

# isort: split
import argparse
import copy
import math
import sys
from typing import Any

import torch

import k_diffusion as K
from k_diffusion import distributed
from k_diffusion.common import console, options
from k_diffusion.common.files import check_writable
from k_diffusion.data import training_data
from k_diffusion.training import (
    autoencoder,
    loop,
    optim,
    resume,
    run_files,
    run_lock,
    setup,
    signals,
    step,
)
from k_diffusion.training.args import parse_args
from k_diffusion.training.state import TrainState


@options.friendly_errors
def main() -> None:
    args = parse_args(__doc__, autoencoder.UNUSED)
    config = K.config.load_config(args.config, args.set, strict=True)
    K.config.check_code(args.config, config, args.set)
    if args.lr is not None:
        config["optimizer"]["lr"] = args.lr
    wrap = autoencoder.make_loss(config)
    console.forgive()
    check_writable(run_files.state_path(args.name))
    if args.output_dir:
        run_files.check_own_folder(args.name)
    accelerator = setup.make_accelerator(args, config)
    with run_lock.hold(args.name, accelerator):
        train(args, config, accelerator, wrap)


def train(args: argparse.Namespace, config: dict[str, Any], accelerator: Any, wrap: Any) -> None:
    # build
    seed = distributed.agree_on_seed(args.seed)
    torch.manual_seed(seed)
    with accelerator.local_main_process_first():  # one process downloads
        data = training_data.make_training_data(config, args.config.parent, args.strict_data)
    config["dataset"]["num_classes"] = data.num_classes
    inner = K.config.make_model(config)
    opt = optim.make_optimizer(config, inner, fused=accelerator.scaler is None)
    state = TrainState(
        config=config,
        model=inner,
        model_ema=copy.deepcopy(inner).eval().requires_grad_(False).to(accelerator.device),
        opt=opt,
        sched=optim.make_lr_sched(config, opt),
        ema_sched=optim.make_ema_sched(config),
        scaler=accelerator.scaler,
        seed=seed,
        dataset_length=len(data),
        run=setup.run_facts(args, accelerator, len(data)),
    )
    prepared, opt = accelerator.prepare(inner, opt)
    loss = wrap(prepared)

    # resume
    resume.begin(state, args, accelerator)
    end = args.end_step or math.inf
    if state.step >= end:
        accelerator.print(f"step {state.step} is done; pass a larger --end-step to continue")
        accelerator.end_training()
        return

    # loop
    logger, batches = loop.begin(args, accelerator, state, data)

    def take_step() -> tuple[torch.Tensor, torch.Tensor]:
        return step.train_step(
            accelerator,
            loss,
            opt,
            state,
            batches,
            None,
            accumulate=args.grad_accum_steps,
            loss_of=autoencoder.batch_loss,
        )

    def then() -> None:
        if accelerator.is_main_process and (state.step % args.demo_every == 0 or state.step == end):
            grid, psnr = autoencoder.reconstructions(
                accelerator, state.model_ema, data, args.sample_n
            )
            logger.say(f"reconstructions: PSNR {psnr:.1f} dB")
            logger.image(grid, state.step)

    saver = loop.make_saver(args, accelerator, state, logger)
    with signals.StopSignal() as stop, saver:
        loop.run(accelerator, state, logger, saver, stop, end, take_step, then)
    if state.step < end:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
