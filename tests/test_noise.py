"""Brownian laws, torchsde's values, and noise that depends on an image's seed alone."""

import math
import warnings
from itertools import pairwise

import golden
import problems
import pytest
import runs
import torch
import torchsde
from scipy import stats
from torchsde._brownian import brownian_interval

from k_diffusion import noise, sampling as S
from k_diffusion.noise import BatchedBrownianTree, BrownianTreeNoiseSampler

# ------------------------------------------------------------------------------- Brownian paths


def test_published_numbers():
    want, _ = golden.load("brownian_tree")
    x = problems.normal(40, 4, 3, 5, 5)
    a = BrownianTreeNoiseSampler(x, 0.05, 12.0, seed=[1, 2, 3, 4])
    b = BrownianTreeNoiseSampler(x, 0.05, 12.0, seed=9)
    batched = [a(torch.tensor(12.0), torch.tensor(6.0)), a(torch.tensor(6.0), torch.tensor(0.5))]
    assert golden.error(torch.stack(batched), want["batched"]) < 3e-6
    single = torch.stack([b(12.0, 3.0), b(3.0, 0.05)])
    assert golden.error(single, want["single"]) < 3e-6


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_values_are_torchsdes_for_at_most_half_of_its_draws(schedule, monkeypatch):
    sigmas = S.make_sigmas(schedule, 50, 0.03, 15.0)[:-1].tolist()
    x = torch.zeros(1, 4, 8, 8)
    draws = {"theirs": 0, "ours": 0}
    their_randn, our_normal = brownian_interval._randn, BatchedBrownianTree._normal

    def counted_randn(*args):
        draws["theirs"] += 1
        return their_randn(*args)

    def counted_normal(self, **spawn):
        draws["ours"] += 1
        return our_normal(self, **spawn)

    monkeypatch.setattr(brownian_interval, "_randn", counted_randn)
    monkeypatch.setattr(BatchedBrownianTree, "_normal", counted_normal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs about float32 ends
        theirs = torchsde.BrownianTree(sigmas[-1], x, sigmas[0], entropy=5)
        want = [theirs(b, a) for a, b in pairwise(sigmas)]
    ours = BatchedBrownianTree(x, sigmas[-1], sigmas[0], seed=5)
    got = [ours(b, a) for a, b in pairwise(sigmas)]
    for w, g, a, b in zip(want, got, sigmas, sigmas[1:], strict=False):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-5 * math.sqrt(a - b))
    assert draws["ours"] <= draws["theirs"] / 2


def test_increments_add_up_in_any_order():
    x = torch.zeros(2, 3, dtype=torch.float64)
    tree = BatchedBrownianTree(x, 0.0, 10.0, seed=3)
    whole = tree(1.0, 9.0)
    torch.testing.assert_close(tree(1.0, 4.0) + tree(4.0, 9.0), whole)
    torch.testing.assert_close(tree(9.0, 1.0), -whole)
    again = BatchedBrownianTree(x, 0.0, 10.0, seed=3)
    torch.testing.assert_close(again(4.0, 9.0), tree(4.0, 9.0), rtol=0, atol=0)
    # running from t1 to t0 turns the increments round
    torch.testing.assert_close(BatchedBrownianTree(x, 10.0, 0.0, seed=3)(1.0, 9.0), -whole)


def test_increments_are_normal_and_independent():
    tree = BatchedBrownianTree(torch.zeros(4000), 0.01, 10.0, seed=1)
    times = [0.01, 0.4, 2.0, 2.1, 10.0]
    increments = [tree(a, b) / math.sqrt(b - a) for a, b in pairwise(times)]
    for z in increments:
        assert stats.kstest(z.numpy(), "norm").pvalue > 0.01
    correlations = torch.corrcoef(torch.stack(increments)) - torch.eye(4)
    assert correlations.abs().max() < 5 / math.sqrt(4000)


def test_the_noise_sampler_has_unit_variance_under_any_transform():
    x = torch.zeros(4000)
    for transform in (noise.identity, lambda s: s.log(), lambda s: -s):
        sampler = BrownianTreeNoiseSampler(x, 0.1, 10.0, 1, transform=transform)
        for z in (sampler(10.0, 2.0), sampler(torch.tensor(2.0), torch.tensor(1.9))):
            assert stats.kstest(z.numpy(), "norm").pvalue > 0.01


def test_a_list_of_seeds_equals_single_runs_bitwise():
    x = torch.zeros(3, 2, 8, 8)
    queries = [(12.0, 7.0), (7.0, 6.9), (6.9, 0.1)]
    together = BrownianTreeNoiseSampler(x, 0.1, 12.0, [5, 6, 7])
    alone = [BrownianTreeNoiseSampler(x[:1], 0.1, 12.0, [seed]) for seed in (5, 6, 7)]
    for query in queries:
        assert torch.equal(together(*query), torch.cat([a(*query) for a in alone]))
    assert not torch.equal(together(12.0, 7.0)[0], together(12.0, 7.0)[1])
    tensor = BrownianTreeNoiseSampler(x, 0.1, 12.0, torch.tensor([5, 6, 7]))
    assert torch.equal(tensor(12.0, 7.0), together(12.0, 7.0))


def test_a_few_ulps_outside_are_clamped_in_silence():
    x = torch.zeros(2, 3)
    sampler = BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outside = sampler(math.nextafter(10.0, 11.0) + 1e-14, 0.1 - 1e-12)
    torch.testing.assert_close(outside, sampler(10.0, 0.1))
    assert torch.equal(sampler(0.05, 0.01), torch.zeros(2, 3))


def test_noise_of_no_interval_is_0_not_nan():
    assert torch.equal(BrownianTreeNoiseSampler(torch.ones(2), 1, 2, 0)(1.5, 1.5), torch.zeros(2))
    assert torch.equal(BrownianTreeNoiseSampler(torch.ones(2), 1, 1, 0)(1.0, 1.0), torch.zeros(2))


def test_ends_of_the_path_can_be_given():
    x = torch.zeros(2, 3)
    w0, w1 = problems.normal(0, 2, 3), problems.normal(1, 2, 3)
    for seed in (4, [4, 5]):
        tree = BatchedBrownianTree(x, 0.0, 1.0, seed, w0=w0, w1=w1)
        torch.testing.assert_close(tree(0.0), w0)
        torch.testing.assert_close(tree(1.0), w1)
        torch.testing.assert_close(tree(0.0, 1.0), w1 - w0)
        plain = BatchedBrownianTree(x, 0.0, 1.0, seed, w0=w0)
        torch.testing.assert_close(
            plain(0.2, 0.7), BatchedBrownianTree(x, 0.0, 1.0, seed)(0.2, 0.7)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_has_the_samples_dtype(dtype):
    z = BrownianTreeNoiseSampler(torch.zeros(4000, dtype=dtype), 0.1, 10.0, 0)(5.0, 4.0)
    assert z.dtype == dtype
    assert z.float().std().item() == pytest.approx(1, abs=0.05)


def test_no_seed_draws_one_from_the_global_generator():
    x = torch.zeros(2, 3)
    torch.manual_seed(7)
    seed = torch.randint(0, 2**63 - 1, []).item()
    torch.manual_seed(7)
    drawn = BrownianTreeNoiseSampler(x, 0.1, 10.0)
    assert torch.equal(drawn(10.0, 1.0), BrownianTreeNoiseSampler(x, 0.1, 10.0, seed)(10.0, 1.0))


def test_bad_trees():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="one seed for each of the 3 images in x, got 2"):
        BrownianTreeNoiseSampler(x, 0.1, 1.0, [1, 2])
    with pytest.raises(ValueError, match=">= 0, got -1"):
        BrownianTreeNoiseSampler(x, 0.1, 1.0, -1)
    with pytest.raises(ValueError, match="finite interval"):
        BrownianTreeNoiseSampler(x, 0.1, math.nan, 1)
    with pytest.raises(ValueError, match="tol must be positive"):
        BatchedBrownianTree(x, 0.1, 1.0, 1, tol=0.0)
    with pytest.raises(TypeError, match="'tolerance'"):
        BatchedBrownianTree(x, 0.1, 1.0, 1, tolerance=0.1)


# ------------------------------------------------------------------------------ a seed an image


def test_initial_noise_is_each_seeds_own():
    got = noise.randn_per_seed([3, 1, 2**40], (2, 4, 4))
    for row, seed in zip(got, (3, 1, 2**40)):
        want = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(row, want)
    assert torch.equal(noise.randn_per_seed([1], (2, 4, 4))[0], got[1])
    half = noise.randn_per_seed([3], (2, 4, 4), dtype=torch.bfloat16)
    assert torch.equal(half[0], got[0].bfloat16())
    assert noise.randn_per_seed([], (2, 4)).shape == (0, 2, 4)


def test_streams_of_a_seed_differ():
    x = torch.zeros(1, 1000)
    draws = [noise.randn_per_seed([5], (1000,), stream=s)[0] for s in range(3)]
    draws.append(noise.SeededNoiseSampler(x, [5])(2.0, 1.0)[0])
    assert torch.equal(draws[3], draws[1])  # the sampler's noise is stream 1
    draws[3] = BrownianTreeNoiseSampler(x, 1.0, 2.0, [5])(2.0, 1.0)[0]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
    assert correlations.abs().max() < 5 / math.sqrt(1000)
    with pytest.raises(ValueError, match="stream 0"):
        noise.SeededNoiseSampler(x, [5], stream=0)


def test_seeded_noise_is_normal_and_fresh_every_call():
    sampler = noise.SeededNoiseSampler(torch.zeros(4, 4000, dtype=torch.float64), range(4))
    a, b = sampler(2.0, 1.0), sampler(2.0, 1.0)
    assert a.dtype == torch.float64
    assert stats.kstest(torch.cat([a, b]).flatten().numpy(), "norm").pvalue > 0.01
    assert abs((a * b).mean()) < 5 / math.sqrt(16000)


def test_a_wrong_number_of_seeds_is_an_error():
    with pytest.raises(ValueError, match="one seed for each of the 3 images"):
        noise.SeededNoiseSampler(torch.zeros(3, 2), [1])
    with pytest.raises(ValueError, match=">= 0, got -4"):
        noise.randn_per_seed([1, -4], (2,))
    for seeds in ([1.5], ["1"], 7, None):
        with pytest.raises(ValueError, match="integers >= 0, one for each image, got"):
            noise.randn_per_seed(seeds, (2,))


def model(x, sigma):
    """A nonlinear denoiser of exactly rounded operations: the same bits in any batch."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    return x / (1 + x * x + s)


SHAPE = (2, 8, 8)


def sample(name, seeds):
    """Images of some seeds, by any sampler that takes noise."""
    info = S.get_sampler(name)
    sigmas = S.get_sigmas_karras(5, 0.1, 8.0)
    x = noise.randn_per_seed(seeds, SHAPE) * sigmas[0]
    options = {"disable": True}
    if name in ("euler", "heun", "dpm_2", "heunpp2"):
        options["s_churn"] = 2.0
    if name == "ddim":
        options["eta"] = 1.0
    if not info.takes_sigmas:
        options |= {"eta": 1.0} | ({"n": 7} if name == "dpm_fast" else {"rtol": 0.5})
    return S.sample(model, x, sigmas, name, seeds, **options)


# The adaptive solver's steps are chosen by the whole batch, and it's the only one.
SEEDED = [name for name, info in S.SAMPLERS.items() if info.noise and name != "dpm_adaptive"]


@pytest.mark.parametrize("name", SEEDED)
def test_an_image_depends_on_its_seed_alone(name):
    seeds = [11, 3, 7, 100, 5, 6, 2**40, 0]
    whole = sample(name, seeds)
    assert len({image.sum().item() for image in whole}) == 8
    for size in (1, 3):
        parts = [sample(name, seeds[i : i + size]) for i in range(0, 8, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(sample(name, seeds[::-1]), whole.flip(0))


def sample_share(rank, folder):
    images = [sample(name, [4, 5, 6, 7][rank::2]) for name in SEEDED]
    alone = [sample("dpm_adaptive", [seed]) for seed in [4, 5, 6, 7][rank::2]]
    torch.save((torch.stack(images), torch.stack(alone)), f"{folder}/{rank}.pt")


def test_an_image_does_not_depend_on_the_number_of_processes(tmp_path):
    runs.in_two_processes(sample_share, str(tmp_path))
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    images, alone = (torch.stack(parts) for parts in zip(*shares))
    for i, name in enumerate(SEEDED):
        got = images[:, i].transpose(0, 1).flatten(0, 1)
        assert torch.equal(got, sample(name, [4, 5, 6, 7]))
    for i, seed in enumerate([4, 5, 6, 7]):
        assert torch.equal(alone[i % 2, i // 2], sample("dpm_adaptive", [seed]))


def test_dpm_adaptive_alone_lets_an_image_depend_on_its_batch():
    assert {n for n, info in S.SAMPLERS.items() if info.noise} - set(SEEDED) == {"dpm_adaptive"}
    whole = sample("dpm_adaptive", [11, 3, 7])
    assert torch.equal(sample("dpm_adaptive", [11, 3, 7]), whole)
    assert not torch.equal(sample("dpm_adaptive", [11])[0], whole[0])


def test_the_right_noise_sampler_for_each_sampler():
    x, sigmas = torch.zeros(2, 3), S.get_sigmas_karras(3, 0.1, 1.0)
    for name, info in S.SAMPLERS.items():
        got = S.make_noise_sampler(info.function, x, sigmas, [1, 2])
        kinds = {"brownian": BrownianTreeNoiseSampler, "independent": noise.SeededNoiseSampler}
        assert type(got) is kinds.get(info.noise, type(None)), name
        assert S.make_noise_sampler(name, x, sigmas, None) is None
    with pytest.raises(ValueError, match="one seed for each"):
        S.make_noise_sampler("dpmpp_2m_sde", x, sigmas, [1])
    assert S.make_noise_sampler("dpm_fast", x, None, [1, 2]) is not None
    with pytest.raises(ValueError, match="'dpmpp_sde' spans its schedule; pass sigmas"):
        S.make_noise_sampler("dpmpp_sde", x, None, [1, 2])


def test_others_noise_samplers_get_tensors_ours_get_floats():
    seen = []

    def theirs(sigma, sigma_next):
        seen.append((sigma, sigma_next))
        return torch.zeros(1)

    noise.ask(theirs, 2.0, 1.0, torch.zeros(1, dtype=torch.float64))
    assert all(s.shape == () and s.dtype == torch.float64 for s in seen[0])
    assert noise.SeededNoiseSampler.accepts_floats


def test_noise_beyond_the_interval_has_unit_variance():
    """It is that of the part within, over that part's length."""
    x = torch.zeros(4000)
    sampler = BrownianTreeNoiseSampler(x, 1.0, 4.0, seed=0)
    for outside, inside in (((9.0, 2.0), (4.0, 2.0)), ((2.0, 0.1), (2.0, 1.0))):
        z = sampler(*outside)
        assert torch.equal(z, sampler(*inside))
        assert z.std().item() == pytest.approx(1, abs=0.05)
