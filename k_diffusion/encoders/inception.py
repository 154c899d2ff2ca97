"""Inception-v3 of the FID (arXiv:1706.08500), as TorchScript; torchvision's is another network."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.files import PathLike, cache_folder
from .base import Encoder
from .weights import find_weights

URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


class Inception(Encoder):
    """Inception-v3's 2,048 pooled features.

    model: the TorchScript of stylegan2-ada-pytorch, or a module of its signature:
    `model(pixels, return_features=True)` resizes pixels in [0, 255] to 299 x 299 as TensorFlow 1
    did, `model.layers(x)` takes them in that size, normalized as (pixels - 128) / 128, and
    `model(pixels, no_output_bias=True)` gives the probabilities of the inception score.
    """

    def __init__(self, model: nn.Module):
        super().__init__("inception", 2048, 299, (128 / 255,) * 3, (128 / 255,) * 3)
        self.model = model

    def embed(self, pixels: Tensor) -> Tensor:
        """The features (n, 2048) of pixels (n, 3, h, w) in [0, 255]; the network resizes them."""
        if pixels.shape[2:] != self.size:
            return self.model(pixels, return_features=True).flatten(1)
        return self.network((pixels - 128) / 128)

    def log_probs(self, pixels: Tensor) -> Tensor:
        """Log-probabilities of 1,008 classes of pixels (n, 3, h, w) in [0, 255].

        Without the bias of the output, as the published inception scores have it.
        """
        return self.model(pixels, no_output_bias=True).clamp(min=1e-30).log()

    def network(self, x: Tensor) -> Tensor:
        """The features (n, 2048) of normalized images x (n, 3, 299, 299)."""
        return self.model.layers(x).flatten(1)  # type: ignore[operator]


def cached() -> Path:
    """Where the weights are kept once they have been downloaded."""
    return cache_folder() / Path(URL).name


def make_inception(
    weights: PathLike | None = None, device: torch.device | str = "cpu"
) -> Inception:
    """Inception-v3 from a file (95 MB), the cache folder, or a download."""
    path = find_weights(weights, "the encoder inception", URL, SHA256)
    with warnings.catch_warnings():  # torch deprecates TorchScript, which this file is
        warnings.simplefilter("ignore", FutureWarning)
        model = torch.jit.load(str(path), map_location="cpu")
    return Inception(model).freeze(device)
