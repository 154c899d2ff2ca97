from types import SimpleNamespace

import pytest
import torch

from k_diffusion.training.noise_levels import COLUMNS, EDGES, LossByLevel

ALONE = SimpleNamespace(reduce=lambda x, reduction: x)


def add(levels, sigma, loss):
    levels.watch(lambda shape: torch.tensor(sigma))([len(sigma)])
    levels.add(torch.tensor(loss))


def test_means_by_range():
    levels = LossByLevel()
    add(levels, [0.01, 0.02, 0.5, 100.0], [1.0, 3.0, 5.0, 7.0])
    add(levels, [0.5, 0.5, 2.0, 0.02], [1.0, 3.0, 4.0, 2.0])
    levels.read(ALONE)
    means = levels.take()
    assert list(means) == COLUMNS
    assert means["loss_sigma_below_0.03"] == 2
    assert means["loss_sigma_0.3_to_1"] == 3
    assert means["loss_sigma_1_to_3"] == 4
    assert means["loss_sigma_above_30"] == 7
    assert [means[c] for c in COLUMNS].count("") == len(EDGES) + 1 - 4
    assert set(levels.take().values()) == {""}


def test_reading_early_and_resuming_change_no_bit():
    torch.manual_seed(0)
    steps = [(torch.rand(5).mul(8).exp() / 30, torch.rand(5)) for _ in range(20)]
    late, early = LossByLevel(), LossByLevel()
    for i, (sigma, loss) in enumerate(steps):
        add(late, sigma.tolist(), loss.tolist())
        add(early, sigma.tolist(), loss.tolist())
        if i % 3 == 0:
            early.read(ALONE)
            resumed = LossByLevel()
            resumed.load_state_dict(early.state_dict())
            early = resumed
    for levels in late, early:
        levels.read(ALONE)
    assert late.take() == early.take()


def test_a_batch_that_is_lost_is_left_out():
    levels = LossByLevel()
    add(levels, [0.5, 2.0], [1.0, float("nan")])
    add(levels, [0.5, 2.0], [float("inf"), 1.0])
    add(levels, [0.5, 2.0], [3.0, 4.0])
    levels.read(ALONE)
    means = levels.take()
    assert (means["loss_sigma_0.3_to_1"], means["loss_sigma_1_to_3"]) == (3, 4)


def test_the_mean_over_processes_weighs_by_images():
    """The other process drew one sample of a range, of loss 9, where this one drew three."""
    levels = LossByLevel()
    add(levels, [0.5, 0.5, 0.5], [1.0, 2.0, 3.0])
    other = torch.zeros(1, 2, len(COLUMNS))
    other[0, :, 3] = torch.tensor([9.0, 1.0])
    levels.read(SimpleNamespace(reduce=lambda x, reduction: (x + other) / 2))
    assert levels.take()["loss_sigma_0.3_to_1"] == pytest.approx(15 / 4)


def test_losses_without_a_draw_and_other_ranges_are_passed_over():
    levels = LossByLevel()
    levels.add(torch.tensor([1.0]))
    levels.load_state_dict({"sums": [1.0], "counts": [1.0]})
    levels.read(ALONE)
    assert set(levels.take().values()) == {""}
