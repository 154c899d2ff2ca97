import math
import pickle

import golden
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from k_diffusion.augmentation import (
    KarrasAugmentationPipeline,
    KarrasAugmentWrapper,
    rotate2d,
    scale2d,
    translate2d,
    warp,
)
from k_diffusion.utils import from_pil_image, to_pil_image


def waves(h, w, period=16):
    """A smooth (1, h, w) image without symmetries."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return (torch.sin(2 * math.pi * x / period) + torch.cos(4 * y / period + x / 20))[None] / 2


def noise(c, h, w, seed=0):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.uniform(-1, 1, (c, h, w)).astype("float32"))


SIZES = pytest.mark.parametrize("size", [(9, 9), (8, 12), (13, 6)])


# ---------------------------------------------------------------- geometry


def test_matrices():
    p = torch.tensor([2.0, 3.0, 1.0])
    assert (translate2d(5, -1) @ p).tolist() == [7, 2, 1]
    assert (scale2d(5, -1) @ p).tolist() == [10, -3, 1]
    torch.testing.assert_close(rotate2d(math.pi / 2) @ p, torch.tensor([-3.0, 2.0, 1.0]))
    torch.testing.assert_close(rotate2d(0.3) @ rotate2d(-0.3), torch.eye(3))
    torch.testing.assert_close(rotate2d(torch.tensor(0.3)), rotate2d(0.3))


@SIZES
def test_warping_by_nothing_flips_and_half_turns_is_exact(size):
    image = noise(2, *size)
    for matrix, expected in (
        (torch.eye(3), image),
        (scale2d(-1, 1), image.flip(2)),
        (scale2d(1, -1), image.flip(1)),
        (rotate2d(math.pi), image.flip(1, 2)),
    ):
        torch.testing.assert_close(warp(image, matrix), expected, rtol=0, atol=1e-5)


def test_warping_by_a_quarter_turn_is_exact():
    """The x axis turns towards the y axis, which points down: clockwise."""
    image = noise(2, 9, 9)
    turned = warp(image, rotate2d(math.pi / 2))
    torch.testing.assert_close(turned, image.rot90(-1, (1, 2)), rtol=0, atol=1e-5)


@SIZES
def test_warping_by_whole_pixels_shifts_and_mirrors(size):
    image = noise(1, *size)
    moved = warp(image, translate2d(3, -2))
    torch.testing.assert_close(moved[:, :-2, 3:], image[:, 2:, :-3], rtol=0, atol=1e-5)
    left = image[:, 2:, 1:4].flip(2)  # the edge itself isn't repeated
    torch.testing.assert_close(moved[:, :-2, :3], left, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 48), (40, 64)])
def test_warping_back_restores_a_smooth_image(size):
    image = waves(*size)
    matrix = rotate2d(0.4) @ scale2d(1.2, 0.9) @ translate2d(1.3, -2.4)
    there = warp(image, matrix)
    back = warp(there, torch.linalg.inv(matrix))
    inner = (slice(None), slice(14, -14), slice(14, -14))
    assert (there - image)[inner].abs().max() > 0.3
    torch.testing.assert_close(back[inner], image[inner], rtol=0, atol=0.01)


def test_warping_by_a_scale_is_the_image_at_other_coordinates():
    """On a non-square image, against the function that the pixels sample."""
    h, w, sx, sy = 40, 64, 1.3, 0.8

    def f(x, y):
        return torch.sin(x / 5) + torch.cos(y / 4 + x / 9)

    y, x = torch.meshgrid(
        torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2, indexing="ij"
    )
    warped = warp(f(x, y)[None], scale2d(sx, sy))[0]
    inner = (slice(8, -8), slice(4, -4))
    torch.testing.assert_close(warped[inner], f(x / sx, y / sy)[inner], rtol=0, atol=2e-3)


# ---------------------------------------------------------------- the pipeline


def run(image, seed, **options):
    torch.manual_seed(seed)
    return KarrasAugmentationPipeline(**options)(image)


@pytest.mark.parametrize("channels", [1, 3])
def test_off_is_the_identity(channels):
    image = to_pil_image(noise(channels, 6, 9))
    for seed in range(4):
        augmented, original, cond = run(image, seed, disable_all=True)
        assert torch.equal(augmented, from_pil_image(image))
        assert torch.equal(original, augmented)
        assert torch.equal(cond, torch.zeros(9))


def test_x_flips_alone_at_probability_zero():
    image = to_pil_image(noise(3, 6, 9))
    flips = []
    for seed in range(200):
        augmented, original, cond = run(image, seed, a_prob=0.0)
        assert torch.equal(augmented, original.flip(2) if cond[0] else original)
        assert not cond[1:].any()
        flips.append(cond[0].item())
    assert 70 < sum(flips) < 130  # 4 standard deviations


def test_conditioning_statistics():
    """Probabilities and distributions of arXiv:2206.00364, appendix F.2."""
    n, p = 4000, 0.4
    torch.manual_seed(0)
    pipeline = KarrasAugmentationPipeline(p)
    numbers = torch.stack([pipeline.draw() for _ in range(n)])
    cond = pipeline.augment([torch.zeros(1, 2, 2)] * n, numbers)[1]
    on = (cond != 0).float().mean(0)
    assert on.tolist() == pytest.approx([1 / 2, p / 2] + [p] * 7, abs=4 * 0.5 / math.sqrt(n))
    for column in (2, 7, 8):  # standard normal where on
        values = cond[:, column][cond[:, column] != 0]
        assert values.mean().abs() < 4 / math.sqrt(len(values))
        assert values.var() == pytest.approx(1, abs=0.15)
    aniso = cond[:, 5:7].norm(dim=1)
    assert aniso[aniso > 0].pow(2).mean() == pytest.approx(1, abs=0.15)
    turned = cond[cond[:, 4] != 0]
    radius = (turned[:, 3] + 1) ** 2 + turned[:, 4] ** 2
    torch.testing.assert_close(radius, torch.ones_like(radius))
    angle = torch.atan2(turned[:, 4], turned[:, 3] + 1)
    assert angle.var() == pytest.approx(math.pi**2 / 3, rel=0.1)  # uniform on (-pi, pi)


STRENGTHS = {"a_scale": 1.1, "a_aniso": 1.15, "a_trans": 0.05}


def moved(at, cond, size, sign):
    """Where `at`: (x, y, 1) goes. The conditioning doesn't tell the sign of the anisotropy."""
    flip_x, flip_y, scale, cos, sin, aniso_cos, aniso_sin, shift_x, shift_y = cond.tolist()
    s = STRENGTHS["a_scale"] ** scale
    a = STRENGTHS["a_aniso"] ** (sign * math.hypot(aniso_cos, aniso_sin))
    axis = math.atan2(aniso_sin, aniso_cos)
    shift = [STRENGTHS["a_trans"] * n * d for n, d in zip(size, (shift_y, shift_x))]
    at = translate2d(shift[1], shift[0]) @ at
    at = rotate2d(axis) @ scale2d(a, 1 / a) @ rotate2d(-axis) @ at
    at = scale2d(s, s) @ rotate2d(-math.atan2(sin, cos + 1)) @ at
    return (scale2d(1 - 2 * flip_x, 1 - 2 * flip_y) @ at)[:2].tolist()


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_conditioning_describes_the_augmentation(size, channels):
    """A bright spot moves as the conditioning says, on images of any shape."""
    y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in size), indexing="ij")
    at = torch.tensor([4.0, -3.0, 1.0])
    spot = 2 * torch.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 18) - 1
    image = to_pil_image(spot.expand(channels, *size))
    for seed in range(8):
        augmented, _, cond = run(image, seed, a_prob=1.0, **STRENGTHS)
        assert augmented.shape == (channels, *size)
        brightest = augmented[0].masked_fill(x.hypot(y) > 24, -1).argmax()  # not a mirror image
        found = [coords.flatten()[brightest].item() for coords in (x, y)]
        expected = [pytest.approx(moved(at, cond, size, sign), abs=0.6) for sign in (1, -1)]
        assert found in expected


def test_flipped_pixels_are_exact_at_any_size():
    image = to_pil_image(noise(3, 5, 8))
    pipeline = KarrasAugmentationPipeline(1.0, a_scale=1.0, a_aniso=1.0, a_trans=0.0)
    for seed in range(20):
        torch.manual_seed(seed)
        augmented, original, cond = pipeline(image)
        theta = math.atan2(cond[4], cond[3] + 1)
        turned = warp(original, rotate2d(-theta))
        dims = [dim for dim, flip in ((2, cond[0]), (1, cond[1])) if flip]
        torch.testing.assert_close(augmented, turned.flip(dims), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (20, 33))])
def test_many_images_are_augmented_as_one_by_one(channels, size):
    pictures = [to_pil_image(noise(channels, *size, seed)) for seed in range(24)]
    pipeline = KarrasAugmentationPipeline(0.3)
    alone, originals, numbers = [], [], []
    for seed, picture in enumerate(pictures):
        torch.manual_seed(seed)
        alone.append(pipeline(picture))
        after = torch.rand(())
        torch.manual_seed(seed)
        originals.append(from_pil_image(picture))
        numbers.append(pipeline.draw())
        assert torch.rand(()) == after
    augmented, conds = pipeline.augment(originals, torch.stack(numbers))
    moved = sum(bool(cond[2:].any()) for cond in conds)
    assert 10 < moved < 24
    for (image, _, cond), together, plan in zip(alone, augmented, conds, strict=True):
        assert torch.equal(cond, plan)
        torch.testing.assert_close(together, image, rtol=0, atol=4e-5)
        if not cond[2:].any():
            assert torch.equal(together, image)


def test_probability_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="a_prob must be between 0 and 1"):
        KarrasAugmentationPipeline(12)


class Images(Dataset):
    def __init__(self):
        self.transform = KarrasAugmentationPipeline(0.5)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.transform(Image.new("RGB", (6, 4), (i, 0, 0)))


def test_workers_draw_from_their_own_seeded_generators():
    pickle.loads(pickle.dumps(Images()))

    def conds():
        torch.manual_seed(0)
        return torch.cat([batch[2] for batch in DataLoader(Images(), 2, num_workers=2)])

    first = conds()
    assert torch.equal(first, conds())
    assert not torch.equal(first[:2], first[2:])


def test_published_numbers():
    ramp = np.indices((24, 24)).sum(0)[..., None] * np.array([3, 4, 5]) % 256
    image, want = Image.fromarray(ramp.astype("uint8")), golden.load("augmentation")[0]
    for seed in range(6):
        augmented, original, cond = run(image, seed, a_prob=0.8)
        assert torch.equal(cond, want[f"cond{seed}"])
        assert torch.equal(original, want[f"orig{seed}"])
        assert (augmented - want[f"img{seed}"]).abs().mean() < 1e-3


# ---------------------------------------------------------------- the wrapper


class Model(nn.Module):
    def forward(self, input, sigma, mapping_cond=None, **kwargs):
        return mapping_cond, kwargs

    def param_groups(self, base_lr, *, wd):
        return [base_lr, wd]

    def set_patch_size(self, patch_size):
        self.patch_size = patch_size

    def set_skip_stages(self, skip_stages):
        self.skip_stages = skip_stages
        return self


def test_wrapper_puts_the_augmentation_before_the_mapping_conditioning():
    model, x, sigma = KarrasAugmentWrapper(Model()), torch.zeros(2, 3, 4, 4), torch.ones(2)
    aug, mapping = torch.randn(2, 9), torch.randn(2, 5)
    assert torch.equal(model(x, sigma)[0], torch.zeros(2, 9))
    assert torch.equal(model(x, sigma, aug)[0], aug)
    assert torch.equal(model(x, sigma, aug, mapping)[0], torch.cat([aug, mapping], 1))
    cond, kwargs = model(x, sigma, mapping_cond=mapping, class_cond=3)
    assert torch.equal(cond, torch.cat([torch.zeros(2, 9), mapping], 1))
    assert kwargs == {"class_cond": 3}
    with pytest.raises(ValueError, match=r"aug_cond must have shape \(2, 9\), got \(2, 8\)"):
        model(x, sigma, torch.zeros(2, 8))


def test_wrapper_passes_the_rest_on():
    model = KarrasAugmentWrapper(nn.Linear(1, 1))
    assert list(model.state_dict()) == ["inner_model.weight", "inner_model.bias"]
    model = KarrasAugmentWrapper(Model())
    assert model.param_groups(0.1, wd=2) == [0.1, 2]
    model.set_patch_size(4)
    model.set_skip_stages(1)
    assert (model.inner_model.patch_size, model.inner_model.skip_stages) == (4, 1)
