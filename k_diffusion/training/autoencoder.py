"""What train_autoencoder.py tells: the loss of an autoencoder, and a grid of reconstructions."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..common.images import grid_columns, image_grid
from ..common.text import need
from ..config import ConfigError
from ..data.training_data import TrainingData
from ..encoders import as_rgb

# Flags of train.py that have no meaning here.
UNUSED = (
    *("dry_run", "checkpointing", "compile", "fsdp", "save_sharded", "gns", "power_ema"),
    *("validate_every", "validate_n"),
    *("evaluate_every", "evaluate_n", "evaluate_only", "evaluate_with", "evaluate_weights"),
    *("evaluate_split", "clip_model", "dinov2_model"),
)


class AutoencoderLoss(nn.Module):
    """The loss around an autoencoder: reconstruction, KL and, if asked for, LPIPS.

    |x - x'| on average + kl_weight KL / D + lpips_weight LPIPS(x, x'), with the KL divergence of
    the latents from N(0, 1) in nats and the image's D numbers (arXiv:2112.10752, without its
    adversarial part). Raises ImportError where LPIPS is asked for and its package is missing,
    OSError where its weights can't be loaded.
    """

    def __init__(self, inner_model: nn.Module, kl_weight: float, lpips_weight: float = 0.0):
        super().__init__()
        self.inner_model = inner_model
        self.kl_weight, self.lpips_weight = kl_weight, lpips_weight
        self.lpips: Any = None
        if lpips_weight:
            self.lpips = _load_lpips().to(next(inner_model.parameters()).device)

    def parameters(self, recurse: bool = True) -> Any:
        """Those that learn."""
        return self.inner_model.parameters(recurse)

    def loss(self, images: Tensor) -> Tensor:
        """The loss of each image, (n,). images: (n, c, h, w) in [-1, 1]."""
        made, mean, log_variance = self.inner_model(images)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        loss = (made - images).abs().flatten(1).mean(1)
        loss = loss + self.kl_weight * kl.flatten(1).sum(1) / images[0].numel()
        if self.lpips is not None:
            loss = loss + self.lpips_weight * self.lpips(as_rgb(made), as_rgb(images)).flatten()
        return loss


def _load_lpips() -> nn.Module:
    package = need("lpips", "model.lpips_weight", "lpips")
    try:
        return package.LPIPS(net="vgg").eval().requires_grad_(False)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        from torchvision.models import VGG16_Weights

        url = VGG16_Weights.IMAGENET1K_V1.url
        file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        said = " ".join(str(error).split())
        raise OSError(
            f"can't load VGG-16's weights, which model.lpips_weight needs ({said}): connect to the "
            f"network, put {url} at {file}, or set it to 0"
        ) from error


def make_loss(config: Mapping[str, Any]) -> Callable[[nn.Module], AutoencoderLoss]:
    """A function that puts the loss of a config around its network.

    Raises ConfigError for a config of another model.
    """
    model = config["model"]
    if model["type"] != "kl_autoencoder":
        raise ConfigError(
            f"model.type: train_autoencoder.py trains a kl_autoencoder, got {model['type']}; train "
            "it with train.py"
        )
    return lambda inner: AutoencoderLoss(inner, model["kl_weight"], model["lpips_weight"])


def batch_loss(
    loss: AutoencoderLoss, batch: dict[str, Any], density: Any, config: Any, device: torch.device
) -> Tensor:
    """The loss per image, (n,), of a batch: `step.batch_loss` of an autoencoder."""
    return loss.loss(batch["image"].to(device, non_blocking=True))


@torch.no_grad()
def reconstructions(
    accelerator: Any, network: Any, data: TrainingData, n: int
) -> tuple[Image.Image, float]:
    """A grid of n images of the data set, evenly spaced, each above its reconstruction.

    Returns it with the peak signal-to-noise ratio of these images, in dB.
    """
    n = min(n, len(data))
    images = torch.stack([data[i * len(data) // n, 0]["original"] for i in range(n)])
    images = images.to(accelerator.device)
    with accelerator.autocast():
        made = network.decode(network.encode(images)[0]).float()
    error = (made.clamp(-1, 1) - images).square().mean().item()
    columns = min(n, grid_columns(0, 2 * n, *images.shape[2:]))
    n = n // columns * columns  # whole rows
    pairs = torch.stack([x[:n].unflatten(0, (-1, columns)) for x in (images, made)], 1)
    grid = image_grid(pairs.flatten(0, 2), columns)
    return grid, 10 * math.log10(4 / max(error, 1e-12))
