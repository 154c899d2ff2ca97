"""A classifier fitted to labelled real images: which class does it see in a sample?"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.files import PathLike
from ..common.text import need
from .base import Encoder, check_range

# A support vector machine's time grows with the square of the number of images.
MAX_IMAGES = 10_000


class Recognizer(Encoder):
    """scikit-learn's SVC of pixels, fitted to labelled images; features are its decision values.

    images: (n, c, h, w) in [-1, 1]. classes: (n,), integers. Of more than MAX_IMAGES, as many are
    used, evenly spaced. Samples must be as large as the images. The share of samples that it reads
    as their class, `accuracy`, compares models of small labelled data sets, where the encoders of
    photographs see little. Raises ValueError for fewer than two classes.
    """

    def __init__(self, images: Tensor, classes: Tensor):
        svm: Any = need("sklearn.svm", "the encoder digits")
        if len(images) != len(classes):
            raise ValueError(
                f"the encoder digits needs a class for each image, got {len(images)} images and "
                f"{len(classes)} classes"
            )
        ids = classes.unique()
        if len(ids) < 2:
            raise ValueError(
                "the encoder digits needs images of two or more classes, got those of "
                f"{len(ids)}; use it with a labelled data set"
            )
        super().__init__("digits", len(ids), (images.shape[2], images.shape[3]))
        self.shape = tuple(images.shape[1:])
        step = max(1.0, len(images) / MAX_IMAGES)
        kept = (torch.arange(min(len(images), MAX_IMAGES)) * step).long()
        x = self._rows(images[kept.to(images.device)])
        # gamma is the 0.001 that is usual for digits of 64 pixels between 0 and 16
        self.svc = svm.SVC(C=10, gamma=4.096 / x.shape[1])
        self.svc.fit(x, classes[kept.to(classes.device)].cpu().numpy())

    def _rows(self, images: Tensor) -> np.ndarray:
        check_range(images)
        if images.shape[1:] != self.shape:
            raise ValueError(
                f"the encoder digits was fitted to images of {self.shape}, got "
                f"{tuple(images.shape[1:])}"
            )
        return images.detach().clamp(-1, 1).flatten(1).double().cpu().numpy()

    def forward(self, images: Tensor) -> Tensor:
        """The decision values (n, width) of images (n, c, h, w) in [-1, 1]; no gradient."""
        values = self.svc.decision_function(self._rows(images))
        if values.ndim == 1:  # two classes have one value
            values = np.stack([-values, values], 1)
        return torch.from_numpy(values).float().to(images.device)

    def embed(self, pixels: Tensor) -> Tensor:
        """The decision values (n, width) of pixels (n, c, h, w) in [0, 255]."""
        return self(pixels[:, : self.shape[0]] / 127.5 - 1)

    def classify(self, images: Tensor) -> Tensor:
        """The class ids (n,) that it reads in images (n, c, h, w) in [-1, 1]."""
        return torch.from_numpy(self.svc.predict(self._rows(images))).to(images.device)

    def accuracy(self, images: Tensor, classes: Tensor) -> float:
        """The share of images (n, c, h, w) in [-1, 1] that are read as their class, of (n,)."""
        return (self.classify(images) == classes.to(images.device)).double().mean().item()


def make_digits(
    weights: PathLike | None = None,
    device: torch.device | str = "cpu",
    *,
    images: Tensor | None = None,
    classes: Tensor | None = None,
) -> Recognizer:
    """A classifier fitted to images (n, c, h, w) in [-1, 1] and their classes (n,).

    Raises ValueError without them, or for weights: it has none.
    """
    if weights is not None or images is None or classes is None:
        raise ValueError(
            "the encoder digits is fitted to the data set: pass images and classes, not weights"
        )
    return Recognizer(images, classes).freeze(device)
