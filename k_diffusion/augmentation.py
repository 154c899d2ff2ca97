"""Non-leaking geometric augmentation (EDM, arXiv:2206.00364, appendix F.2).

The network is told how each training image was augmented, so its samples need not look augmented:
at sampling time the augmentation conditioning is zero.
"""

import math
from functools import reduce
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

from .common.images import from_pil_image

COND_DIM = 9


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
        h, w = original.shape[1:]

        def switch() -> torch.Tensor:
            return (torch.rand(()) < self.a_prob).float()

        def angle() -> torch.Tensor:
            return torch.rand(()) * 2 * math.pi - math.pi

        # Every number is drawn, also where it is switched off: seeds depend on it.
        flip_x = torch.randint(2, ()).float()
        flip_y = switch() * torch.randint(2, ())
        scale = switch() * torch.randn(())
        theta = switch() * angle()
        on = switch()
        aniso_theta, aniso = on * angle(), on * torch.randn(())
        on = switch()
        shift_x, shift_y = on * torch.randn(()), on * torch.randn(())

        if self.disable_all:
            return original, original, torch.zeros(COND_DIM)
        cond = torch.stack(
            [
                flip_x,
                flip_y,
                scale,
                theta.cos() - 1,
                theta.sin(),
                aniso * aniso_theta.cos(),
                aniso * aniso_theta.sin(),
                shift_x,
                shift_y,
            ]
        )
        augmented = original
        if cond[2:].any():
            s, a = self.a_scale**scale, self.a_aniso**aniso
            matrices = [
                scale2d(s, s),
                rotate2d(-theta),
                rotate2d(aniso_theta),
                scale2d(a, 1 / a),
                rotate2d(-aniso_theta),
                translate2d(self.a_trans * w * shift_x, self.a_trans * h * shift_y),
            ]
            augmented = warp(augmented, reduce(torch.matmul, matrices))
        flips = [dim for dim, flip in ((2, flip_x), (1, flip_y)) if flip]
        return augmented.flip(flips), original, cond


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
