import pytest
import runs
import torch
from golden import normal

from k_diffusion.evaluation import FeatureStatistics, frechet_distance


def close(got, x):
    assert got.n == len(x)
    torch.testing.assert_close(got.mean, x.double().mean(0))
    torch.testing.assert_close(got.covariance, torch.cov(x.double().T))


@pytest.mark.parametrize("d", [3, 700])  # one block of columns, and two
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_are_the_whole(d, batch):
    x = normal(0, (130, d)) + 100.0
    stats = FeatureStatistics(d)
    for rows in x.split(batch):
        stats.update(rows)
    close(stats, x)


def test_a_large_batch_comes_in_parts():
    x = normal(1, (2500, 4))
    close(FeatureStatistics(4).update(x), x)


def test_a_mean_that_is_far_away_costs_no_digits():
    x = normal(2, (500, 3)).double() + 1e7
    stats = FeatureStatistics(3)
    for rows in x.split(50):
        stats.update(rows)
    torch.testing.assert_close(stats.covariance, torch.cov(x.T), rtol=1e-7, atol=1e-9)


def test_merging():
    x = normal(3, (50, 5))
    parts = [FeatureStatistics(5).update(rows) for rows in x.split([20, 1, 29])]
    merged = FeatureStatistics(5)
    for part in parts:
        merged.merge(part)
    close(merged, x)


def test_files(tmp_path):
    x = normal(4, (50, 5))
    stats = FeatureStatistics(5, "edm").update(x)
    stats.save(tmp_path / "a.npz")
    got = FeatureStatistics.load(tmp_path / "a.npz")
    assert (got.n, got.protocol, got.width) == (50, "edm", 5)
    assert torch.equal(got.mean, stats.mean)
    torch.testing.assert_close(got.covariance, stats.covariance, rtol=1e-15, atol=0)
    more = normal(5, (20, 5))
    close(got.update(more), torch.cat([x, more]))


def test_what_does_not_fit():
    stats = FeatureStatistics(5, "edm").update(normal(6, (9, 5)))
    with pytest.raises(ValueError, match="width 5 of the protocol edm, got features of width 4"):
        stats.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        stats.update(torch.full((2, 5), torch.nan))
    with pytest.raises(ValueError, match="protocol edm can't be compared .* protocol cmmd"):
        stats.merge(FeatureStatistics(5, "cmmd"))
    with pytest.raises(
        ValueError, match="width 5 of the protocol edm can't be compared .* width 6"
    ):
        frechet_distance(stats, FeatureStatistics(6))
    unknown = FeatureStatistics.from_moments(torch.zeros(5), torch.eye(5))
    torch.testing.assert_close(unknown.covariance, torch.eye(5).double())
    frechet_distance(stats, unknown)
    for change in (lambda: unknown.update(torch.zeros(1, 5)), lambda: stats.merge(unknown)):
        with pytest.raises(ValueError, match="doesn't say their n"):
            change()
    with pytest.raises(ValueError, match=r"got shapes \(5,\) and \(4, 4\)"):
        FeatureStatistics.from_moments(torch.zeros(5), torch.eye(4))
    with pytest.raises(ValueError, match="NaN or infinity; compute them again"):
        FeatureStatistics.from_moments(torch.zeros(2), torch.full((2, 2), torch.nan))


def in_each_process(rank, folder):
    from accelerate import Accelerator

    from k_diffusion.evaluation import compute_features

    accelerator = Accelerator(cpu=True)
    x = normal(7, (31, 6))
    stats = FeatureStatistics(6, "random").update(x[rank::2]).merged(accelerator)
    stats.save(folder / f"{rank}.npz")
    # the second has no samples
    empty = FeatureStatistics(6)
    if rank == 0:
        empty.update(x)
    empty.merged(accelerator).save(folder / f"empty {rank}.npz")
    samples = iter(x[rank::2].split(4))
    gathered = compute_features(accelerator, lambda n: next(samples), lambda x: 2 * x, 13, 4)
    torch.save(gathered, folder / f"{rank}.pt")
    accelerator.end_training()


def test_two_processes(tmp_path):
    runs.in_two_processes(in_each_process, tmp_path)
    x = normal(7, (31, 6))
    for rank in range(2):
        close(FeatureStatistics.load(tmp_path / f"{rank}.npz"), x)
        close(FeatureStatistics.load(tmp_path / f"empty {rank}.npz"), x)
        gathered = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(gathered, torch.cat([2 * x[0::2][:7], 2 * x[1::2][:6]]))
