#!/usr/bin/env python3
"""Train a diffusion model from a config file. For several processes: accelerate launch train.py"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP
import k_diffusion.common.launcher  # before torch: the launcher may be gone when it's loaded

# isort: split
import argparse
import copy
import math
import sys
from contextlib import suppress
from functools import partial
from typing import Any

import torch

import k_diffusion as K
from k_diffusion import conditions, distributed, generation, models
from k_diffusion.common import console, options
from k_diffusion.common.files import check_writable
from k_diffusion.data import training_data
from k_diffusion.training import (
    demo,
    dry_run,
    evaluation,
    latent,
    loop,
    noise_scale,
    optim,
    power_ema,
    resume,
    run_files,
    run_lock,
    setup,
    sharding,
    signals,
    step,
    validation,
)
from k_diffusion.training.args import parse_args
from k_diffusion.training.state import TrainState


@options.friendly_errors
def main() -> None:
    args = parse_args(__doc__)
    config = K.config.load_config(args.config, args.set, strict=True)
    K.config.check_code(args.config, config, args.set)
    if args.lr is not None:
        config["optimizer"]["lr"] = args.lr
    if args.dry_run:
        dry_run.main(args, config)
        return
    console.forgive()
    check_writable(run_files.state_path(args.name))
    if args.output_dir:
        run_files.check_own_folder(args.name)
    accelerator = setup.make_accelerator(args, config)
    with run_lock.hold(args.name, accelerator):
        train(args, config, accelerator)


def train(args: argparse.Namespace, config: dict[str, Any], accelerator: Any) -> None:
    seed = distributed.agree_on_seed(args.seed)

    # build
    torch.manual_seed(seed)
    with accelerator.local_main_process_first():  # one process downloads
        coder = latent.prepare(config, args.config.parent, accelerator.device)
        shape = latent.data_shape(config, coder)
        strict = args.strict_data
        train_data = training_data.make_training_data(config, args.config.parent, strict, shape)
        encode = conditions.make_training_encoder(config, accelerator.device, train_data)
    config["dataset"]["num_classes"] = train_data.num_classes
    given = conditions.of_data(train_data, config, encode, accelerator.device, coder)
    inner = K.config.make_model(config)
    opt = optim.make_optimizer(config, inner, fused=accelerator.scaler is None)
    place = partial(sharding.place, accelerator)
    state = TrainState(
        config=config,
        model=inner,
        model_ema=place(copy.deepcopy(inner).eval().requires_grad_(False)),
        opt=opt,
        sched=optim.make_lr_sched(config, opt),
        ema_sched=optim.make_ema_sched(config),
        scaler=accelerator.scaler,
        seed=seed,
        dataset_length=len(train_data),
        run=setup.run_facts(args, accelerator, len(train_data)),
    )
    if args.power_ema:
        state.power_ema = power_ema.PowerEMA(inner, args.power_ema, place=place)
    if args.compile:
        models.compile_model(inner, args.compile)
    prepared, opt = sharding.prepare(accelerator, inner, opt)
    state.noise_scale = noise_scale.make_noise_scale(args, accelerator, inner)
    wrap = K.config.make_denoiser_wrapper(config)
    denoiser, denoiser_ema = wrap(prepared), wrap(state.model_ema)
    if coder is not None:  # demos and evaluations decode by it
        denoiser_ema.autoencoder = coder
    density = K.config.make_sample_density(config["model"])

    # resume
    resume.begin(state, args, accelerator)
    begin, end = state.step, args.end_step or math.inf
    if state.step >= end and not args.evaluate_only:
        accelerator.print(f"step {state.step} is done; pass a larger --end-step to continue")
        accelerator.end_training()
        return
    evaluator = evaluation.make_evaluator(accelerator, args, config, begin, end, coder)
    validator = validation.make_validation(accelerator, args, config, encode, coder)

    # loop
    logger, batches = loop.begin(args, accelerator, state, train_data)
    batches = conditions.conditioned(batches, config, encode, accelerator.device, coder)
    batches = latent.batches_of_latents(batches, coder, config)

    def make_demo() -> None:
        rest = config, args.sample_n, state.demo_gen, stop.asked, given
        with suppress(generation.SamplingStopped):
            logger.image(demo.sample_demo(accelerator, denoiser_ema, *rest), state.step)

    def evaluate() -> bool:
        if evaluator is not None:
            loop.save(state, logger, saver, stop)  # what follows takes long
            with suppress(generation.SamplingStopped):
                found = evaluator.evaluate(denoiser_ema, state, logger.say, stop.asked, given)
                logger.evaluated(state, found)
                return True
        return False

    def take_step() -> tuple[torch.Tensor, torch.Tensor]:
        return step.train_step(
            accelerator,
            denoiser,
            opt,
            state,
            batches,
            density,
            accumulate=args.grad_accum_steps,
            checkpointing=args.checkpointing,
        )

    def then() -> None:
        if state.step % args.demo_every == 0 or state.step == end:
            make_demo()
        if args.evaluate_every and state.step % args.evaluate_every == 0:
            evaluate()
        if validator and (state.step % args.validate_every == 0 or state.step == end):
            logger.evaluated(state, {"val_loss": validator.loss(denoiser_ema, density)})

    saver = loop.make_saver(args, accelerator, state, logger)
    with signals.StopSignal() as stop, saver:
        stopped = args.evaluate_only and not evaluate()
        while stopped and not stop.agreed(accelerator):
            pass  # until all know the signal
        if args.evaluate_only:
            end = state.step
        loop.run(accelerator, state, logger, saver, stop, end, take_step, then)
    if stopped or state.step < end:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
