"""u(sigma), the learned weighting of the loss, and the models that have it."""

import math

import pytest
import runs
import torch

import k_diffusion as K
from k_diffusion.models.embeddings import Uncertainty
from k_diffusion.training import optim

SIGMA = torch.tensor([0.05, 1.3])


def test_it_is_a_sum_of_waves_of_log_sigma():
    torch.manual_seed(0)
    module = Uncertainty(8)
    assert module(SIGMA).equal(torch.zeros(2))
    module.weight.data.normal_()
    angles = 2 * math.pi * SIGMA.log()[:, None] / 4 * module.features.weight[:, 0]
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    wanted = waves @ module.weight
    torch.testing.assert_close(module(SIGMA), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(SIGMA), wanted)


def test_it_learns_the_loss_of_each_noise_level():
    """By gradient descent on L / e^u + u, with losses L = sigma^2 / (1 + sigma^2)."""
    torch.manual_seed(0)
    module = Uncertainty()
    sigma = torch.logspace(-1, 1, 60)
    loss = sigma**2 / (1 + sigma**2)
    opt = torch.optim.LBFGS(module.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        u = module(sigma)
        value = (loss * torch.exp(-u) + u).mean()
        value.backward()
        return value

    opt.step(closure)
    assert (module(sigma) - loss.log()).abs().max() < 0.05


V1 = {
    "type": "image_transformer_v1",
    "input_channels": 1,
    "input_size": 8,
    "patch_size": 2,
    "width": 64,
    "depth": 1,
    "sigma_sample_density": {"type": "lognormal", "mean": 0.0, "std": 1.0},
}


@pytest.mark.parametrize("section", [V1, {}], ids=["v1", "v2"])
@pytest.mark.parametrize("prediction", ["karras", "x"])
def test_a_model_learns_it(section, prediction):
    learned = {"learned_weighting": True, "prediction": prediction}
    config = runs.tiny_config(model=section | learned, dataset={"type": "none"})
    torch.manual_seed(0)
    inner = K.config.make_model(config)
    torch.manual_seed(0)
    plain = K.config.make_model(runs.tiny_config(model=section, dataset={"type": "none"}))
    new = {"uncertainty.weight", "uncertainty.features.weight"}
    assert inner.state_dict().keys() - plain.state_dict().keys() == new
    assert (
        runs.differences(
            {k: x for k, x in inner.state_dict().items() if k not in new}, dict(plain.state_dict())
        )
        == []
    )
    opt = optim.make_optimizer(config, inner)
    (group,) = [
        g for g in opt.param_groups if any(p is inner.uncertainty.weight for p in g["params"])
    ]
    assert group["weight_decay"] == 0
    denoiser = K.config.make_denoiser_wrapper(config)(inner)
    x, noise = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    assert denoiser(x, SIGMA).shape == x.shape
    before = denoiser.loss(x, noise, SIGMA).mean()
    before.backward()
    opt.step()
    assert denoiser.loss(x, noise, SIGMA).mean() < before
    assert inner.uncertainty.weight.any()
    with pytest.raises(ValueError, match="needs a model built with learned_weighting"):
        plain(x, SIGMA, return_uncertainty=True)


def test_what_it_does_not_go_with():
    for change in ({"loss_config": "simple"}, {"has_variance": True}):
        with pytest.raises(K.config.ConfigError, match="learned_weighting needs"):
            runs.tiny_config(model={"learned_weighting": True} | change)
