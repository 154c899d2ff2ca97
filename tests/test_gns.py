"""The gradient noise scale against gradients whose law is known."""

import pytest
import torch
from golden import normal
from torch import nn

from k_diffusion.gns import DDPGradientStatsHook, GradientNoiseScale, MicroBatchNorms


def test_estimates_converge():
    """g = G + N(0, S / b): |G|² and tr S."""
    generator = torch.Generator().manual_seed(0)
    d, small, large = 20, 4, 32
    true = torch.linspace(-1, 1, d).double()
    deviations = torch.linspace(0.5, 3, d).double()
    scale, steps = GradientNoiseScale(beta=0.9995), 20000
    noise = torch.randn(steps, large // small, d, generator=generator, dtype=torch.float64)
    parts = true + deviations * noise / small**0.5
    norms = parts.square().sum(2).mean(1), parts.mean(1).square().sum(1)
    for a, b in zip(*(n.tolist() for n in norms)):
        scale.update(a, b, small, large)
    sq_norm, var = scale.get_stats()
    want = true.square().sum().item(), deviations.square().sum().item()
    assert sq_norm == pytest.approx(want[0], rel=0.03)
    assert var == pytest.approx(want[1], rel=0.03)
    assert scale.get_gns() == var / sq_norm == pytest.approx(want[1] / want[0], rel=0.05)


def test_averages_are_corrected_for_their_start():
    scale = GradientNoiseScale(beta=0.99)
    assert (scale.get_gns(), scale.get_stats()) == (0, (0, 0))
    # |g_b|² = |G|² + S / b exactly, with |G|² = 2 and S = 12
    for _ in range(3):
        assert scale.update(2 + 12 / 4, 2 + 12 / 8, 4, 8) == pytest.approx(6)
        assert scale.get_stats() == pytest.approx((2, 12))


def test_a_negative_estimate_is_divided_by_eps():
    scale = GradientNoiseScale(eps=0.5)
    assert scale.update(10, 1, 1, 2) == pytest.approx((10 - 1) / (1 - 1 / 2) / 0.5)


def test_state():
    a, b = GradientNoiseScale(beta=0.9), GradientNoiseScale()
    for i in range(3):
        a.update(5 + i, 3, 2, 4)
    b.load_state_dict(a.state_dict())
    assert b.update(7, 3, 2, 4) == a.update(7, 3, 2, 4)
    assert b.state_dict() == a.state_dict()
    with pytest.raises(ValueError, match="lacks beta_cumprod, ema_var"):
        b.load_state_dict({k: 0 for k in a.state_dict() if k not in ("beta_cumprod", "ema_var")})


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (0, 4)])
def test_batches_of_one_size(sizes):
    with pytest.raises(ValueError, match="a small and of a larger batch, got batches of"):
        GradientNoiseScale().update(1, 1, *sizes)


def test_norms_of_single_backward_passes():
    """Of each pass, though .grad sums them up; of weights that are used twice, of the sum."""
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    second.bias.requires_grad_(False)
    norms = MicroBatchNorms([*first.parameters(), *second.parameters()])
    want = 0.0
    for seed in range(3):
        x = normal(seed, (5, 3))
        loss = second(first(x)).sum() + first.weight.square().sum()
        grads = torch.autograd.grad(
            loss, [first.weight, first.bias, second.weight], retain_graph=True
        )
        want += sum(g.square().sum() for g in grads)
        norms.norms.clear()  # of autograd.grad
        loss.backward()
        want_now = sum(g.square().sum() for g in grads)
        torch.testing.assert_close(norms.take(), want_now)
    for seed in range(3):
        second(first(normal(seed, (5, 3)))).sum().backward()
    assert norms.take() > 0
    with pytest.raises(ValueError, match="leave out --gns with sharded models"):
        norms.take()


def test_the_hook_without_a_backward_pass():
    class DDP:
        process_group = None

        def register_comm_hook(self, group, hook):
            pass

    with pytest.raises(ValueError, match="no gradient since the last get_stats"):
        DDPGradientStatsHook(DDP()).get_stats()
