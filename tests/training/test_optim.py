import math
import sys

import pytest
import runs
import torch

import k_diffusion as K
from k_diffusion.training import optim


def test_groups_and_hyperparameters():
    section = {"type": "adamw", "lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.02}
    config = runs.tiny_config(optimizer=section)
    model = K.config.make_model(config)
    opt = optim.make_optimizer(config, model)
    assert type(opt) is torch.optim.AdamW
    assert sum(len(g["params"]) for g in opt.param_groups) == len(list(model.parameters()))
    for group in opt.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-7)
        # the mapping network learns at a third; norms and biases don't decay
        assert group["lr"] in (pytest.approx(3e-4), pytest.approx(1e-4))
        assert group["weight_decay"] in (0.02, 0.0)


def test_sgd():
    section = {"type": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    config = runs.tiny_config(optimizer=section)
    opt = optim.make_optimizer(config, K.config.make_model(config))
    assert type(opt) is torch.optim.SGD
    assert all(g["momentum"] == 0.9 and g["nesterov"] for g in opt.param_groups)


def test_adam8bit_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = runs.tiny_config(optimizer={"type": "adam8bit"})
    with pytest.raises(ImportError, match=r"adam8bit needs bitsandbytes; .* pip install"):
        optim.make_optimizer(config, K.config.make_model(config))


@pytest.mark.parametrize(
    ("section", "factor"),
    [
        ({"type": "constant", "warmup": 0.5}, lambda k: 1 - 0.5 ** (k + 1)),
        ({"type": "inverse", "inv_gamma": 4.0, "power": 0.5}, lambda k: (1 + k / 4) ** -0.5),
        ({"type": "exponential", "num_steps": 5.0}, lambda k: 0.5 ** (k / 5)),
        ({"type": "cosine", "num_steps": 4}, lambda k: (1 + math.cos(math.pi * min(k, 4) / 4)) / 2),
        ({"type": "inverse-sqrt", "decay_start": 2.0}, lambda k: max(1, k / 2) ** -0.5),
    ],
)
def test_schedules(section, factor):
    config = runs.tiny_config(lr_sched=section)
    opt = optim.make_optimizer(config, K.config.make_model(config))
    sched = optim.make_lr_sched(config, opt)
    for k in range(6):
        assert sched.get_last_lr()[0] == pytest.approx(config["optimizer"]["lr"] * factor(k))
        opt.step()
        sched.step()


def test_ema_warm_up():
    sched = optim.make_ema_sched(runs.tiny_config(ema_sched={"power": 1.0, "max_value": 0.75}))
    values = []
    for _ in range(6):
        values.append(sched.get_value())
        sched.step()
    assert values == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4, 3 / 4, 3 / 4])
