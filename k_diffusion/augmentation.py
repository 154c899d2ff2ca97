"""Non-leaking geometric augmentation (EDM, arXiv:2206.00364, appendix F.2).

The network is told how each training image was augmented, so its samples need not look augmented:
at sampling time the augmentation conditioning is zero.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

from .common import splines
from .common.images import from_pil_image

COND_DIM = 9


def _coin(x: torch.Tensor) -> None:
    x.random_(2)


# The random numbers of an image, in the order in which they are drawn. "..._on" switches on.
_DRAWS: dict[str, Callable[[torch.Tensor], object]] = {
    "flip_x": _coin,
    "flip_y_on": torch.Tensor.uniform_,
    "flip_y": _coin,
    "scale_on": torch.Tensor.uniform_,
    "scale": torch.Tensor.normal_,
    "theta_on": torch.Tensor.uniform_,
    "theta": torch.Tensor.uniform_,
    "aniso_on": torch.Tensor.uniform_,
    "aniso_theta": torch.Tensor.uniform_,
    "aniso": torch.Tensor.normal_,
    "shift_on": torch.Tensor.uniform_,
    "shift_x": torch.Tensor.normal_,
    "shift_y": torch.Tensor.normal_,
}


def translate2d(tx: float | torch.Tensor, ty: float | torch.Tensor) -> torch.Tensor:
    """The 3 x 3 matrix that moves (x, y, 1) by (tx, ty). tx, ty: () or floats, in pixels."""
    return torch.tensor([[1, 0, tx], [0, 1, ty], [0, 0, 1]], dtype=torch.float32)


def scale2d(sx: float | torch.Tensor, sy: float | torch.Tensor) -> torch.Tensor:
    """The 3 x 3 matrix that scales (x, y, 1) by sx and sy. sx, sy: () or floats."""
    return torch.tensor([[sx, 0, 0], [0, sy, 0], [0, 0, 1]], dtype=torch.float32)


def rotate2d(theta: float | torch.Tensor) -> torch.Tensor:
    """The 3 x 3 matrix that rotates (x, y, 1) by theta radians, the x axis towards the y axis.

    theta: () or a float.
    """
    c, s = math.cos(theta), math.sin(theta)
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float32)


def warp(image: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Move what is at p to matrix p: pixel coordinates (x, y, 1) with their origin in the centre.

    image: (c, h, w), matrix: 3 x 3. Cubic splines between pixels, mirrored beyond the edges.
    """
    h, w = image.shape[1:]
    centre = np.array([h - 1, w - 1]) / 2
    # scipy asks where each new pixel came from, in (y, x).
    inverse = np.linalg.inv(matrix.double().numpy())
    linear = inverse[1::-1, 1::-1]
    offset = inverse[1::-1, 2] + centre - linear @ centre
    channels = [
        ndimage.affine_transform(channel, linear, offset, order=3, mode="mirror")
        for channel in image.numpy()
    ]
    return torch.from_numpy(np.stack(channels))


def warp_one_by_one(images: Sequence[torch.Tensor], matrices: torch.Tensor) -> list[torch.Tensor]:
    """What `splines.warp` computes together. images: n of (c, h, w). matrices: (n, 3, 3)."""
    return [warp(image, matrix) for image, matrix in zip(images, matrices)]


class KarrasAugmentationPipeline:
    """Flips, scaling, rotation, anisotropic scaling and translation of training images.

    The x flip has probability 1/2, the others are switched on with probability a_prob each (and
    the y flip then has probability 1/2). a_scale and a_aniso are the factors at one standard
    deviation, a_trans is the standard deviation of the shift as a fraction of the image.

    Called with a PIL image, it returns (augmented, original, cond): two tensors (c, h, w) in
    [-1, 1] and the conditioning vector (9,), which is zero where nothing was done. Random numbers
    come from torch's global generator. disable_all: leave images as they are; the same numbers are
    drawn.
    """

    def __init__(
        self,
        a_prob: float = 0.12,
        a_scale: float = 2**0.2,
        a_aniso: float = 2**0.2,
        a_trans: float = 1 / 8,
        disable_all: bool = False,
    ):
        if not 0 <= a_prob <= 1:
            raise ValueError(f"a_prob must be between 0 and 1, got {a_prob}")
        self.a_prob = a_prob
        self.a_scale = a_scale
        self.a_aniso = a_aniso
        self.a_trans = a_trans
        self.disable_all = disable_all

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        original = from_pil_image(image)
        (augmented,), (cond,) = self.augment([original], self.draw()[None], warp_one_by_one)
        return augmented, original, cond

    @staticmethod
    def draw() -> torch.Tensor:
        """The random numbers of one image: (13,). Also those are drawn that aren't used."""
        out = torch.empty(len(_DRAWS))
        for number, fill in zip(out.unbind(), _DRAWS.values()):
            fill(number)
        return out

    def augment(
        self,
        originals: Sequence[torch.Tensor],
        numbers: torch.Tensor,
        warp_all: Callable[
            [Sequence[torch.Tensor], torch.Tensor], list[torch.Tensor]
        ] = splines.warp,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The augmented images, each (c, h, w), and their conditioning vectors, (n, 9).

        originals: n images (c, h, w) of one size. numbers: (n, 13), of `draw`, on which alone it
        depends what is done to an image. warp_all: warps some together, as `splines.warp` does.
        """
        if self.disable_all:
            return list(originals), torch.zeros(len(numbers), COND_DIM)
        cond, matrices = self._plan(numbers, *originals[0].shape[1:])
        augmented = list(originals)
        turned = cond[:, 2:].any(1).nonzero().flatten().tolist()
        if turned:
            warped = warp_all([originals[i] for i in turned], matrices[turned])
            for i, image in zip(turned, warped):
                augmented[i] = image
        for i, (flip_x, flip_y) in enumerate(cond[:, :2].tolist()):
            if flip_x or flip_y:
                augmented[i] = augmented[i].flip([1] * bool(flip_y) + [2] * bool(flip_x))
        return augmented, cond

    def _plan(self, numbers: torch.Tensor, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditioning vectors, (n, 9), and matrices, (n, 3, 3), but for the flips."""
        columns = dict(zip(_DRAWS, numbers.unbind(1)))

        def switched(switch: str, *names: str) -> list[torch.Tensor]:
            on = (columns[switch] < self.a_prob).float()
            return [on * columns[name] for name in names]

        for name in "theta", "aniso_theta":
            columns[name] = columns[name] * 2 * math.pi - math.pi
        (flip_y,) = switched("flip_y_on", "flip_y")
        (scale,), (theta,) = switched("scale_on", "scale"), switched("theta_on", "theta")
        aniso_theta, aniso = switched("aniso_on", "aniso_theta", "aniso")
        shift_x, shift_y = switched("shift_on", "shift_x", "shift_y")
        turn, tilt = (theta.cos() - 1, theta.sin()), (aniso_theta.cos(), aniso_theta.sin())
        shifts = [shift_x, shift_y]
        along = [aniso * part for part in tilt]
        cond = torch.stack([columns["flip_x"], flip_y, scale, *turn, *along, *shifts], 1)
        # scaled, turned and stretched, after it was shifted
        s, a = self.a_scale ** scale.double(), self.a_aniso ** aniso.double()
        axis = _rotations(aniso_theta)
        stretch = axis @ torch.stack([a, 1 / a], 1).diag_embed() @ axis.mT
        linear = s[:, None, None] * (_rotations(-theta) @ stretch)
        pixels = self.a_trans * torch.tensor([w, h]) * torch.stack(shifts, 1).double()
        matrices = torch.eye(3, dtype=torch.float64).repeat(len(numbers), 1, 1)
        matrices[:, :2, :2], matrices[:, :2, 2:] = linear, linear @ pixels[:, :, None]
        return cond, matrices


def _rotations(theta: torch.Tensor) -> torch.Tensor:
    """As the upper part of rotate2d: (n, 2, 2), in float64. theta: (n,)."""
    c, s = theta.double().cos(), theta.double().sin()
    return torch.stack([c, -s, s, c], 1).view(-1, 2, 2)


class KarrasAugmentWrapper(nn.Module):
    """Feeds the augmentation conditioning to a model through its `mapping_cond`."""

    takes_aug_cond = True

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner_model: Any = model

    def forward(
        self,
        input: torch.Tensor,
        sigma: torch.Tensor,
        aug_cond: torch.Tensor | None = None,
        mapping_cond: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """aug_cond: (n, 9), None for no augmentation; mapping_cond: (n, ...), None for none.

        input: (n, c, h, w). sigma: (n,). The model gets both, side by side in this order, as its
        mapping_cond.
        """
        if aug_cond is None:
            aug_cond = input.new_zeros(input.shape[0], COND_DIM)
        if aug_cond.shape != (input.shape[0], COND_DIM):
            raise ValueError(
                f"aug_cond must have shape {(input.shape[0], COND_DIM)}, "
                f"got {tuple(aug_cond.shape)}"
            )
        if mapping_cond is not None:
            aug_cond = torch.cat([aug_cond, mapping_cond], dim=1)
        return self.inner_model(input, sigma, mapping_cond=aug_cond, **kwargs)

    def describe_levels(self, h: int, w: int) -> Any:
        """The levels of the model."""
        return self.inner_model.describe_levels(h, w)

    def param_groups(self, *args: Any, **kwargs: Any) -> Any:
        """The parameter groups of the model."""
        return self.inner_model.param_groups(*args, **kwargs)

    def set_patch_size(self, patch_size: Any) -> Any:
        """Change the patch size of the model."""
        return self.inner_model.set_patch_size(patch_size)

    def set_skip_stages(self, skip_stages: int) -> Any:
        """Skip the outermost stages of the model."""
        return self.inner_model.set_skip_stages(skip_stages)
