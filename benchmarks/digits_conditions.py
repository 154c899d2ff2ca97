"""How well models of docs/conditioning.md do what they are told, as a classifier reads it.

    python benchmarks/digits_conditions.py pairs pairs_00000600.pth
    python benchmarks/digits_conditions.py super-resolution sr_00000600.pth

The judge is scikit-learn's SVC fitted to the real digits (`digits_accuracy.py`). Of pairs it reads
both halves of a picture, apart for captions that were trained on and for those held out. Of
super-resolution it reads what becomes of held-out digits that the model saw at 2 x 2 pixels.
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from digits_accuracy import judge, real
from sklearn.svm import SVC

import k_diffusion as K
from k_diffusion import conditions, generation


def sample(model: Any, given: Any, n: int, args: argparse.Namespace) -> torch.Tensor:
    """n images (n, 1, h, w) of a loaded model under its conditions."""
    denoiser = model
    if args.cfg_scale != 1:
        null: dict[str, Any] = dict(conditions.null(model.config, "--cfg-scale"))
        denoiser = K.guidance.CFGDenoiser(model, args.cfg_scale, **null)
    sigmas = K.sampling.get_sigmas_karras(args.steps, model.sigma_min, model.sigma_max)
    return torch.cat(
        list(generation.generate(denoiser, model.shape, range(n), sigmas, given=given))
    )


def pairs(model: Any, args: argparse.Namespace) -> None:
    """Prints how many captions' pictures are read right."""
    file = Path(__file__).parent.parent / "configs/digit_pairs.py"
    spec: Any = importlib.util.spec_from_file_location("digit_pairs", file)
    data: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)
    wanted = torch.cartesian_prod(torch.arange(10), torch.arange(10)).repeat(args.n // 100, 1)
    captions = [data.caption(*pair) for pair in wanted[:100].tolist()]
    images = sample(model, model.given(captions), len(wanted), args)
    reader = judge()
    read = torch.stack([reader.classify(half) for half in images.chunk(2, dim=3)], dim=1)
    right = (read == wanted).double()
    out = torch.tensor([data.held_out(*pair) for pair in wanted.tolist()])
    for name, rows in ("trained on", ~out), ("held out", out):
        part = right[rows]
        print(
            f"captions {name}: both digits read right in {part.all(1).double().mean():.1%} of "
            f"{len(part)} pictures, {part.mean():.1%} of the digits"
        )


def super_resolution(model: Any, args: argparse.Namespace) -> None:
    """Prints what samples keep of held-out digits, and of what the model was shown."""
    images, classes = real("test")
    section = model.config["image_condition"]
    told = conditions.of_images(section, images)["unet_cond"]
    given = conditions.given(model.config, None, images=told)
    made = sample(model, given, len(images), args).clamp(-1, 1)
    again = conditions.of_images(section, made)["unet_cond"]
    print(f"root mean square error of what is told: {(again - told).square().mean().sqrt():.3f}")
    reader = judge("train")
    for name, x in ("whole digits", images), ("enlarged", told.clamp(-1, 1)), ("samples", made):
        error = (x - images).square().mean().sqrt()
        print(f"{name}: {reader.accuracy(x, classes):.1%} read right, error {error:.3f}")
    small, labels = real("train")
    few = [conditions.resized(x, (2, 2)).flatten(1).numpy() for x in (small, images)]
    fitted = SVC(C=10).fit(few[0], labels.numpy())
    share = (fitted.predict(few[1]) == classes.numpy()).mean()
    print(f"a classifier fitted to the 2 x 2 pixels themselves reads {share:.1%} right")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=["pairs", "super-resolution"])
    p.add_argument("checkpoint", help="a training (.pth) or inference (.safetensors) checkpoint")
    p.add_argument("-n", type=int, default=400, help="pictures of pairs, a multiple of 100")
    p.add_argument("--steps", type=int, default=30)
    p.add_argument("--cfg-scale", type=float, default=1.0)
    p.add_argument("--text-encoder", metavar="PATH", help="if not where the config says")
    args = p.parse_args()
    model = K.load(args.checkpoint, text_encoder=args.text_encoder)
    {"pairs": pairs, "super-resolution": super_resolution}[args.what](model, args)


if __name__ == "__main__":
    main()
