from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from torch import nn

from k_diffusion import generation
from k_diffusion.common.images import grid_columns, image_grid
from k_diffusion.training import demo


def test_grids_show_each_image_in_its_place():
    images = torch.linspace(-1, 0.6, 5)[:, None, None, None].expand(5, 1, 50, 60)
    grid = np.asarray(image_grid(images, columns=3, border=4))
    assert grid.shape == (2 * 54 + 4, 3 * 64 + 4)
    for i in range(5):
        y, x = i // 3 * 54 + 4, i % 3 * 64 + 4
        cell = grid[y : y + 50, x : x + 60]
        assert np.unique(cell).tolist() == [51 * i]
        gaps = grid[y - 4 : y, x : x + 60], grid[y : y + 50, x - 4 : x]
        assert {level for gap in gaps for level in gap.flat} == {230}
    assert set(grid[-54:, 2 * 64 + 4 :].flat) == {230}  # no images there
    assert set(grid[:, -4:].flat) == set(grid[-4:].flat) == {230}


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_small_images_are_enlarged_pixel_by_pixel(channels, mode):
    images = torch.rand(4, channels, 8, 6) * 2 - 1
    grid = image_grid(images, border=0)
    assert grid.mode == mode
    assert grid.size == (2 * 36, 2 * 48)
    pixels = np.asarray(grid).reshape(96, 72, -1)
    assert (pixels[::6, ::6].repeat(6, 0).repeat(6, 1) == pixels).all()


def test_columns():
    """One class to a column, if the grid is nearly square then; else nearly square without."""
    assert [grid_columns(10, n) for n in (9, 11, 20, 64, 100, 400, 1000)] == [
        3,
        3,
        4,
        10,
        10,
        20,
        30,
    ]
    assert grid_columns(1000, 2000) == 45
    assert grid_columns(0, 64) == grid_columns(1, 64) == 8
    assert grid_columns(0, 64, h=16, w=64) == 4
    assert grid_columns(0, 1) == grid_columns(0, 1, h=1, w=100) == 1
    image = image_grid(torch.zeros(10, 1, 48, 48), border=0)
    assert image.size == (3 * 48, 4 * 48)


def test_gaps_of_transparent_images_are_opaque():
    pixels = np.asarray(image_grid(torch.full((1, 4, 48, 48), -1.0), border=1))
    assert pixels[0, 0].tolist() == [230, 230, 230, 255]
    assert pixels[1, 1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_labels_stand_above_their_images(channels):
    images = torch.full((3, channels, 48, 60), 0.0)
    plain = image_grid(images, columns=2)
    labelled = image_grid(images, columns=2, labels=[7, "", 3])
    above = (labelled.height - plain.height) // 2
    assert labelled.width == plain.width
    assert above >= 12
    pixels = np.asarray(labelled.convert("L"))

    def ink(i):
        y, x = i // 2 * (50 + above) + 2, i % 2 * 62 + 2
        assert (pixels[y + above : y + above + 48, x : x + 60] == 128).all()
        return (pixels[y : y + above, x : x + 60] < 100).sum()

    assert ink(0) > 5
    assert ink(1) == 0
    assert ink(2) > 5


class ClassAsLevel(nn.Module):
    """Denoises to the image whose pixels are all class / 10."""

    def forward(self, x, sigma, class_cond):
        return torch.ones_like(x) * class_cond[:, None, None, None] / 10


def one_process():
    from contextlib import nullcontext

    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        is_main_process=True,
        device=torch.device("cpu"),
        autocast=nullcontext,
    )


def test_samples_have_the_classes_in_turn():
    images = generation.sample_share(
        one_process(), ClassAsLevel(), runs.tiny_config(), range(23), batch_size=4
    )
    assert images.shape == (23, 1, 8, 8)
    torch.testing.assert_close(images[:, 0, 0, 0], torch.arange(23) % 10 / 10)


def test_all_demos_of_a_run_start_from_the_same_noise(monkeypatch):
    seeds = []

    def sample(accelerator, denoiser, config, chosen, **options):
        seeds.append(list(chosen))
        return torch.zeros(len(chosen), 1, 8, 8)

    monkeypatch.setattr(demo, "sample_share", sample)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    args = one_process(), None, runs.tiny_config()
    for n in 5, 5, 12:
        assert demo.sample_demo(*args, n, generator).size[0] > 0
    assert torch.equal(generator.get_state(), before)
    assert seeds[0] == seeds[1] == seeds[2][:5]
    assert len(set(seeds[2])) == 12


def test_other_processes_have_no_grid(monkeypatch):
    monkeypatch.setattr(demo, "sample_share", lambda *args, **kwargs: None)
    args = one_process(), None, runs.tiny_config(), 3, torch.Generator()
    assert demo.sample_demo(*args) is None
