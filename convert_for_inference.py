#!/usr/bin/env python3
"""Turn a training checkpoint into a slim inference checkpoint with its config inside."""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import argparse

import torch

import k_diffusion as K
from k_diffusion import checkpoints
from k_diffusion.checkpoints.runs import find_checkpoint
from k_diffusion.common import options
from k_diffusion.common.files import check_readable, check_writable, writable
from k_diffusion.common.tensors import DTYPES


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=options.HelpFormatter)
    text = "the training checkpoint (.pth), or the name or folder of a run, for its latest"
    p.add_argument("checkpoint", type=options.path, help=text)
    p.add_argument(
        "--config", type=options.path, metavar="FILE", help="else the one in the checkpoint"
    )
    p.add_argument(
        "--output",
        "-o",
        type=options.path,
        metavar="FILE",
        help="else CHECKPOINT with .safetensors",
    )
    p.add_argument("--dtype", choices=list(DTYPES), default="fp16", help="of the weights")
    add = p.add_argument_group("a model to share, instead of the file").add_argument
    text = "write weights, config, a model card and a grid of samples there"
    add("--output-folder", type=options.path, metavar="FOLDER", help=text)
    text = "upload them to the Hugging Face hub"
    add("--push-to-hub", type=options.text, metavar="OWNER/NAME", help=text)
    text = "of a new repository: seen by its owner alone"
    add("--private", action="store_true", help=text)
    text = "results.json of evaluate.py, for the model card"
    add("--metrics", type=options.path, metavar="FILE", help=text)
    text = "images on the grid; 0: no grid"
    add("--samples", type=options.non_negative, default=16, metavar="N", help=text)
    text = "of a latent model, if it isn't where its config says"
    add("--autoencoder", type=options.path, metavar="PATH", help=text)
    text = "of a model of texts, if it isn't where its config says"
    add("--text-encoder", type=options.text, metavar="PATH", help=text)
    return p.parse_args()


@options.friendly_errors
def main() -> None:
    args = parse_args()
    args.checkpoint = find_checkpoint(args.checkpoint)
    check_readable(args.checkpoint, "checkpoint")
    if args.output_folder or args.push_to_hub:
        return share(args)
    if args.metrics or args.private or args.autoencoder or args.text_encoder:
        raise options.UsageError(
            "--metrics, --private, --autoencoder and --text-encoder need --output-folder or "
            "--push-to-hub"
        )
    output = args.output or args.checkpoint.with_suffix(".safetensors")
    if output.resolve() == args.checkpoint.resolve():
        raise options.UsageError(
            f"{output} is the training checkpoint itself; choose another --output"
        )
    if output.suffix != ".safetensors":
        raise options.UsageError(f"--output must end in .safetensors, got {output}")
    check_writable(output)
    print(f"reading {args.checkpoint} ...")
    config, weights = checkpoints.read_averaged(args.checkpoint)
    if args.config is not None:
        config = K.config.load_config(args.config, strict=True)
    with torch.device("meta"):
        model = K.config.make_model(K.config.load_config(config))
    checkpoints.check_weights(model, weights, args.checkpoint)
    writable(output)
    print(f"writing {output} in {args.dtype} ...")
    checkpoints.write_inference(output, config, weights, args.dtype)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")


def share(args: argparse.Namespace) -> None:
    """Writes the folder of a model to share, and uploads it if asked to."""
    if args.output:
        raise options.UsageError("--output names a file; leave it out, or --output-folder")
    if args.private and not args.push_to_hub:
        raise options.UsageError("--private needs --push-to-hub OWNER/NAME")
    if args.metrics:
        check_readable(args.metrics, "file of --metrics")
    here = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if here else "cpu"
    print(f"reading {args.checkpoint} ...")
    denoiser, config = K.loading.load_denoiser(args.checkpoint, args.config, args.autoencoder)
    folders = [args.checkpoint.parent, "."]
    model = K.loading.Loaded(denoiser, config, args.text_encoder, folders).to(device)
    choices = {"metrics": args.metrics, "dtype": args.dtype, "samples": args.samples}
    if args.push_to_hub:
        where = {"private": args.private, "folder": args.output_folder}
        print(f"pushed {K.push_to_hub(model, args.push_to_hub, **choices, **where)}")
    else:
        K.save_pretrained(model, args.output_folder, **choices)
    if args.output_folder:
        print(f"wrote {args.output_folder}")


if __name__ == "__main__":
    main()
