#!/usr/bin/env python3
"""Train a Karras et al. (2022) diffusion model: accelerate launch train.py --config CONFIG"""

import argparse
import copy
import math
from pathlib import Path

import torch

import k_diffusion as K
from k_diffusion import cli
from k_diffusion.models import flags
from k_diffusion.training import checkpoint, data, demo, log, optim, resume, setup, signals, step
from k_diffusion.training.state import TrainState


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--config", type=Path, required=True, help="the configuration file")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                   help="override a config key, e.g. model.patch_size=[2,2]; repeatable")
    p.add_argument("--name", default="model", help="the name of the run, and of its files")
    p.add_argument("--batch-size", type=cli.positive, default=64, help="images a process a step")
    p.add_argument("--grad-accum-steps", type=cli.positive, default=1,
                   help="batches that are accumulated into one step")
    p.add_argument("--end-step", type=cli.positive, help="stop after this many steps")
    p.add_argument("--lr", type=float, help="override the config's learning rate")
    p.add_argument("--seed", type=cli.seed, help="the random seed; by default a new one")
    p.add_argument("--mixed-precision", choices=["no", "fp16", "bf16", "fp8"], help="of the model")
    p.add_argument("--checkpointing", action="store_true",
                   help="recompute blocks in the backward pass to save memory")
    p.add_argument("--compile", action="store_true", help="compile the model")
    p.add_argument("--num-workers", type=int, default=8, help="data loading processes")
    p.add_argument("--start-method", default="spawn", choices=["fork", "forkserver", "spawn"],
                   help="how data loading processes are started")
    p.add_argument("--strict-data", action="store_true",
                   help="stop at a corrupt image instead of skipping it")
    p.add_argument("--resume", type=Path,
                   help="the checkpoint to resume from; by default the run's latest")
    p.add_argument("--resume-inference", type=Path,
                   help="the inference checkpoint whose weights to start from")
    p.add_argument("--reset-ema", action="store_true", help="start the averaged weights anew")
    p.add_argument("--save-every", type=cli.positive, default=10000, help="steps")
    p.add_argument("--demo-every", type=cli.positive, default=500, help="steps")
    p.add_argument("--log-every", type=cli.positive, default=25, help="steps")
    p.add_argument("--sample-n", type=cli.positive, default=64, help="images in a demo grid")
    p.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="log to TensorBoard there")
    p.add_argument("--wandb-project", help="log to this Weights & Biases project")
    p.add_argument("--wandb-entity", help="the Weights & Biases entity")
    p.add_argument("--wandb-group", help="the Weights & Biases group")
    p.add_argument("--wandb-save-model", action="store_true", help="save checkpoints there too")
    metrics = p.add_argument_group("metrics (not in this version: accepted, and said so)")
    metrics.add_argument("--evaluate-every", type=int, default=10000, help="steps; 0 for never")
    metrics.add_argument("--evaluate-n", type=int, default=2000, help="samples to draw")
    metrics.add_argument("--evaluate-only", action="store_true", help="evaluate, then leave")
    metrics.add_argument("--evaluate-with", choices=["inception", "clip", "dinov2"],
                         default="inception", help="the feature extractor")
    metrics.add_argument("--clip-model", default="ViT-B/16", help="of CLIP, to evaluate with")
    metrics.add_argument("--dinov2-model", default="vitl14", help="of DINOv2, to evaluate with")
    metrics.add_argument("--gns", action="store_true", help="measure the gradient noise scale")
    return p.parse_args()


@cli.friendly_errors
def main() -> None:
    args = parse_args()
    setup.refuse_metrics(args)

    # build
    config = K.config.load_config(args.config, args.set)
    if args.lr is not None:
        config["optimizer"]["lr"] = args.lr
    accelerator = setup.make_accelerator(args)
    seed = setup.agree_on_seed(args.seed)
    torch.manual_seed(seed)
    with accelerator.local_main_process_first():  # one process downloads
        train_data = data.make_training_data(config, args.config.parent, args.strict_data)
    inner = K.config.make_model(config)
    opt = optim.make_optimizer(config, inner)
    state = TrainState(
        config=config,
        model=inner,
        model_ema=copy.deepcopy(inner).eval().requires_grad_(False).to(accelerator.device),
        opt=opt,
        sched=optim.make_lr_sched(config, opt),
        ema_sched=optim.make_ema_sched(config),
        seed=seed,
        dataset_length=len(train_data),
    )

    # resume
    if args.resume_inference:
        resume.resume_inference(state, args.resume_inference)
    else:
        resume.resume(state, args.name, args.resume, accelerator.print)
    setup.apply_overrides(args, state)
    if args.end_step is not None and state.step >= args.end_step:
        accelerator.print(f"step {state.step} is done; pass an --end-step above it to go on")
        return

    # prepare
    wrap = K.config.make_denoiser_wrapper(config)
    if args.compile and flags.get_use_compile():
        inner.compile()
    prepared, opt = accelerator.prepare(inner, opt)
    denoiser, denoiser_ema = wrap(prepared), wrap(state.model_ema)
    density = K.config.make_sample_density(config["model"])
    stream = data.Stream(
        len(train_data),
        args.batch_size,
        state.seed,
        start=state.samples,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    accelerator.print(setup.describe(args, state, accelerator))

    # loop
    logger = log.Log(accelerator, args.name, state, args.end_step, args.log_every)
    batches = data.checked(
        data.make_loader(train_data, stream, args.num_workers, args.start_method), logger.skip
    )

    def make_demo() -> None:
        path = checkpoint.run_file(args.name, f"demo_{state.step:08}.png")
        n = args.sample_n
        demo.write_demo(accelerator, denoiser_ema, config, path, n, state.demo_gen)
        logger.image(path, state.step)

    def save() -> None:
        logger.flush(state)
        if accelerator.is_main_process:
            path = checkpoint.save_checkpoint(args.name, state.step, state.state_dict())
            logger.say(f"saved {path}")
            if args.wandb_save_model:
                setup.save_to_wandb(path)

    with signals.StopSignal() as stop:
        end = args.end_step or math.inf
        while state.step < end and not stop.agreed(accelerator, state.step):
            loss, norm = step.train_step(
                accelerator,
                denoiser,
                opt,
                state,
                batches,
                density,
                accumulate=args.grad_accum_steps,
                checkpointing=args.checkpointing,
            )
            logger.step(state, loss, norm)
            if state.step % args.demo_every == 0 or state.step == end:
                make_demo()
            if state.step % args.save_every == 0:
                save()
        if stop.requested:
            logger.say(f"{stop.requested}: saving before leaving")
        if state.step % args.save_every:
            save()
    logger.plot()
    logger.close()


if __name__ == "__main__":
    main()
