import math
import pickle
import warnings
from functools import partial

import golden
import pytest
import torch
from torch import nn, optim

from k_diffusion import utils
from k_diffusion.training.lr_schedules import CosineLR, InverseSqrtLR


def lrs(make, n=12, lr=0.5):
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule, values = make(optimizer), []
    for _ in range(n):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return values


def test_inverse_lr_is_its_closed_form():
    values = lrs(partial(utils.InverseLR, inv_gamma=3.0, power=0.7, warmup=0.9))
    expected = [(1 - 0.9 ** (k + 1)) * 0.5 * (1 + k / 3) ** -0.7 for k in range(12)]
    assert values == pytest.approx(expected)


def test_exponential_lr_halves_every_num_steps():
    values = lrs(partial(utils.ExponentialLR, num_steps=4))
    assert values[::4] == pytest.approx([0.5, 0.25, 0.125])
    assert values[1] / values[0] == pytest.approx(values[9] / values[8])


def test_constant_lr_with_warmup():
    assert lrs(utils.ConstantLRWithWarmup) == [0.5] * 12
    values = lrs(partial(utils.ConstantLRWithWarmup, warmup=0.99), n=400)
    assert values[99] == pytest.approx(0.5 * (1 - 0.99**100))
    assert values[-1] == pytest.approx(0.5, rel=0.02)


def test_cosine_lr_is_its_closed_form():
    values = lrs(partial(CosineLR, num_steps=10, warmup_steps=4, min_lr=0.1), n=14)
    assert values[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    expected = [0.1 + 0.4 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(7)]
    assert values[4:11] == pytest.approx(expected)
    assert values[10:] == pytest.approx([0.1] * 4)
    # a group whose rate is below min_lr doesn't rise
    assert lrs(partial(CosineLR, num_steps=3, min_lr=0.7)) == pytest.approx([0.5] * 12)
    with pytest.raises(ValueError, match="num_steps 4 must be above warmup_steps 4"):
        lrs(partial(CosineLR, num_steps=4, warmup_steps=4))


def test_inverse_sqrt_lr_is_its_closed_form():
    values = lrs(partial(InverseSqrtLR, decay_start=4, warmup_steps=2, min_lr=0.32), n=16)
    assert values[:5] == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5])
    assert values[5:9] == pytest.approx([0.5 * (k / 4) ** -0.5 for k in range(5, 9)])
    assert values[10:] == pytest.approx([0.32] * 6)
    assert lrs(partial(InverseSqrtLR, decay_start=1, min_lr=0.7)) == pytest.approx([0.5] * 12)
    with pytest.raises(ValueError, match="decay_start must be"):
        lrs(partial(InverseSqrtLR, decay_start=0))


def test_min_lr_bounds_the_decay_and_not_the_warmup():
    values = lrs(partial(utils.ExponentialLR, num_steps=1, warmup=0.5, min_lr=0.2))
    assert values[0] == pytest.approx(0.25)
    assert values[5:] == pytest.approx([0.2 * (1 - 0.5 ** (k + 1)) for k in range(5, 12)])


def test_a_published_state_of_exponential_lr_goes_on():
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = utils.ExponentialLR(optimizer, num_steps=10)
    schedule.load_state_dict({"decay": 0.25, "last_epoch": 4, "base_lrs": [1.0]})
    optimizer.step()
    schedule.step()
    assert schedule.decay == 0.25
    assert schedule.get_last_lr() == pytest.approx([0.5])


LR_SCHEDULES = [
    partial(utils.InverseLR, inv_gamma=3.0, power=0.7, warmup=0.9, min_lr=0.1),
    partial(utils.ExponentialLR, num_steps=4, decay=0.6, warmup=0.5),
    partial(utils.ConstantLRWithWarmup, warmup=0.8),
]


@pytest.mark.parametrize("make", LR_SCHEDULES)
def test_lr_schedules_resume_from_their_state(make):
    def stepped(optimizer, schedule, n):
        for _ in range(n):
            optimizer.step()
            schedule.step()
        return schedule.get_last_lr()

    def fresh():
        params = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.5, 0.1)]
        optimizer = optim.SGD(params)
        return optimizer, make(optimizer)

    once = stepped(*fresh(), 9)
    first, second = fresh(), fresh()
    stepped(*first, 4)
    for new, old in zip(second, first):
        new.load_state_dict(pickle.loads(pickle.dumps(old.state_dict())))
    assert stepped(*second, 5) == once
    assert once[0] == pytest.approx(5 * once[1]) or make is LR_SCHEDULES[0]  # which has a min_lr


@pytest.mark.parametrize("make", LR_SCHEDULES)
def test_verbose_is_accepted_and_silent(make, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lrs(partial(make, verbose=True)) == lrs(make)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "make",
    [
        partial(utils.InverseLR, inv_gamma=0.0),
        partial(utils.InverseLR, warmup=1.0),
        partial(utils.ExponentialLR, num_steps=0),
        partial(utils.ConstantLRWithWarmup, warmup=-0.1),
    ],
)
def test_lr_options_out_of_range_are_errors(make):
    with pytest.raises(ValueError, match="must be"):
        lrs(make)


@pytest.mark.parametrize(("name", "make"), [*zip(("inv", "exp", "const"), LR_SCHEDULES)])
def test_published_numbers(name, make):
    torch.testing.assert_close(torch.tensor(lrs(make)), golden.load("ema_and_lr")[0][name])
