from types import SimpleNamespace

import pytest
import torch
from torch import nn

from k_diffusion.training.noise_scale import NoiseScale, make_noise_scale


def args(gns, accumulate):
    return SimpleNamespace(gns=gns, grad_accum_steps=accumulate)


def test_a_step_of_one_batch_has_nothing_to_compare():
    one, two = SimpleNamespace(num_processes=1), SimpleNamespace(num_processes=2)
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="pass --grad-accum-steps 2 with half the --batch-size"):
        make_noise_scale(args(True, 1), one, model)
    assert make_noise_scale(args(False, 1), one, model) is None
    assert isinstance(make_noise_scale(args(True, 2), one, model), NoiseScale)
    assert isinstance(make_noise_scale(args(True, 1), two, model), NoiseScale)


class Accelerator:
    def reduce(self, x, reduction):
        assert reduction == "mean"
        return x


def backward(model, x):
    model(x).sum().backward()


def test_scaled_losses_are_unscaled_and_overflows_left_out():
    """The loss times the scale of fp16, divided by the number of passes."""
    model = nn.Linear(2, 1, bias=False)
    found = []
    for scale in 1.0, 1024.0:
        measured = NoiseScale(model)
        batches = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
        for x in batches:
            (model(x).sum() * scale / 2).backward()
        norm = torch.tensor(((1 + 9) / 4) ** 0.5)  # of the mean of (1, 0) and (0, 3)
        measured.step(norm, accumulate=2, seen=8, processes=1, scale=scale)
        measured.read(Accelerator())
        found.append(measured.estimate.state_dict())
        # small 5, large 2.5, of 4 and 8 samples: |G|² = 0, S = 20
        assert measured.estimate.get_stats() == pytest.approx((0, 20))
        before = measured.estimate.state_dict()
        backward(model, batches[0])
        measured.step(torch.tensor(torch.inf), 2, 8, 1, scale)
        measured.read(Accelerator())
        assert measured.estimate.state_dict() == before
        measured.read(Accelerator())  # nothing pending
    assert found[0] == pytest.approx(found[1])
