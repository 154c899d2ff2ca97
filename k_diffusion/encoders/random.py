"""A convolutional network with random weights: features without a download, for tests."""

import torch
from torch import Tensor, nn

from ..common.files import PathLike
from .base import Encoder


class RandomNetwork(Encoder):
    """Three convolutions with fixed random weights; features are their means and deviations.

    It takes images of any size as they are. Its distances tell sets of images apart, but not as
    people see them.
    """

    def __init__(self, width: int = 64, seed: int = 0):
        if width < 2 or width % 2:
            raise ValueError(f"the encoder random has an even width of at least 2, got {width}")
        super().__init__("random", width)
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(((3, 16), (16, 32), (32, width // 2))):
            conv = nn.Conv2d(fan_in, fan_out, 3, stride=1 if i == 0 else 2, padding=1)
            with torch.no_grad():
                std = (2 / (9 * fan_in)) ** 0.5
                conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * std)
                conv.bias.copy_(torch.randn(fan_out, generator=generator) * 0.1)  # type: ignore[union-attr]
            layers += [conv, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)

    def network(self, x: Tensor) -> Tensor:
        """The features (n, width) of images x (n, 3, h, w) in [-1, 1]."""
        y = self.layers(x).flatten(2)
        mean = y.mean(2)
        return torch.cat([mean, (y - mean[:, :, None]).square().mean(2).sqrt()], 1)


def make_random(
    weights: PathLike | None = None,
    device: torch.device | str = "cpu",
    width: int = 64,
    seed: int = 0,
) -> RandomNetwork:
    """The random network of a seed. Raises ValueError for weights: it has none."""
    if weights is not None:
        raise ValueError("the encoder random draws its weights from its seed; pass no weights")
    return RandomNetwork(width, seed).freeze(device)
