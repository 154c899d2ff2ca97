import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from k_diffusion.augmentation import warp_one_by_one
from k_diffusion.common import splines


def images(n, *shape, seed=0):
    pixels = np.random.default_rng(seed).uniform(-1, 1, (n, *shape)).astype("float32")
    return torch.from_numpy(pixels)


def matrices(n, reach, seed=0):
    """Turned, sheared, scaled by a half to twice, some mirrored, and shifted by about reach."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.eye(3, dtype=torch.float64).repeat(n, 1, 1)
    turned = torch.randn(n, 2, 2, generator=generator, dtype=torch.float64)
    u, _, v = torch.linalg.svd(turned)
    scale = 2 ** (torch.rand(n, 2, generator=generator) * 2 - 1)
    out[:, :2, :2] = u @ scale.double().diag_embed() @ v
    out[:, :2, 2] = torch.randn(n, 2, generator=generator) * reach
    return out


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 6), (2, 3), (9, 1), (8, 8), (13, 6), (40, 33), (100, 70), (150, 130)]
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_coefficients_and_warps_are_scipys(size, channels):
    x = images(3, channels, *size)
    found = splines.spline_coefficients(x).numpy()
    for axes, name in ((2, 3), "coefficients"), ((3, 2), "in the other order"):
        want = x.numpy().astype(np.float64)
        for axis in axes:
            want = ndimage.spline_filter1d(want, 3, axis, mode="mirror")
        np.testing.assert_allclose(found, want, atol=3e-6, err_msg=name)
    for reach in 2, 3 * max(size):
        moved = matrices(3, reach)
        straight = moved.clone()
        straight[:, 0, 1] = straight[:, 1, 0] = 0
        # of noise, whose slopes are steep, a place off by so little is seen
        off = 4e-6 + 2e-6 * max(size)
        mixed = torch.stack([moved[0], straight[1], straight[2]])
        for m, atol in (straight, 2e-6), (moved, off), (mixed, off):
            torch.testing.assert_close(splines.warp(x, m), warp_one_by_one(x, m), rtol=0, atol=atol)


def test_an_image_is_warped_as_in_any_other_batch():
    x, m = images(9, 3, 20, 24), matrices(9, 4)
    m[4:, 0, 1] = m[4:, 1, 0] = 0
    alone = [splines.warp(x[i : i + 1], m[i : i + 1])[0] for i in range(9)]
    torch.testing.assert_close(splines.warp(x, m), alone, rtol=0, atol=1e-6)


def test_polynomials_that_splines_reproduce_are_moved_exactly():
    """Inside, where no mirror is seen, a linear image stays one."""
    y, x = torch.meshgrid(torch.arange(32.0) - 15.5, torch.arange(40.0) - 19.5, indexing="ij")
    c, s = math.cos(0.3), math.sin(0.3)
    turn = torch.tensor([[c, -s, 0.7], [s, c, -0.2], [0, 0, 1]])
    image = (0.02 * x - 0.01 * y)[None, None]
    back = torch.linalg.inv(turn)
    want = 0.02 * (back[0, 0] * x + back[0, 1] * y + back[0, 2])
    want -= 0.01 * (back[1, 0] * x + back[1, 1] * y + back[1, 2])
    inner = (slice(12, -12), slice(16, -16))
    torch.testing.assert_close(
        splines.warp(image, turn[None])[0][0][inner], want[inner], rtol=0, atol=2e-5
    )
