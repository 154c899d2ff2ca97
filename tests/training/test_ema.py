import golden
import pytest
import torch
from torch import nn

from k_diffusion import utils


class Net(nn.Module):
    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(3, 4).to(dtype)
        self.b = nn.Linear(4, 2, dtype=torch.float64)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("count", torch.tensor(seed))


def test_ema_update_averages_parameters_and_copies_buffers():
    model, average = Net(1), Net(2)
    before = {k: p.clone() for k, p in average.named_parameters()}
    utils.ema_update(model, average, 0.9)
    for name, p in average.named_parameters():
        expected = 0.9 * before[name] + 0.1 * dict(model.named_parameters())[name]
        torch.testing.assert_close(p, expected)
    assert torch.equal(average.mean, model.mean)
    assert average.count == 1


def test_ema_update_at_the_ends():
    model, average, old = Net(1), Net(2), Net(2)
    utils.ema_update(model, average, 1.0)
    assert all(map(torch.equal, average.parameters(), old.parameters()))
    utils.ema_update(model, average, 0.0)
    assert all(map(torch.equal, average.parameters(), model.parameters()))
    assert all(p.requires_grad for p in average.parameters())


def test_ema_update_of_another_dtype_keeps_the_average_in_its_own():
    model, average = Net(1, torch.bfloat16), Net(2)
    start = average.a.weight.detach().clone()
    utils.ema_update(model, average, 0.999)
    assert average.a.weight.dtype == torch.float32
    expected = torch.lerp(start, model.a.weight.float(), 0.001)
    torch.testing.assert_close(average.a.weight.detach(), expected.detach())


def test_ema_update_of_shared_parameters_counts_once():
    def tied():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = model[0].weight
        return model

    model, average = tied(), tied()
    expected = torch.lerp(average[0].weight, model[0].weight, 0.5).detach()
    utils.ema_update(model, average, 0.5)
    torch.testing.assert_close(average[1].weight.detach(), expected)


def test_ema_update_names_what_differs():
    model, average = Net(), Net()
    average.b = nn.Linear(5, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"differ in their parameters: b\.weight; unwrap"):
        utils.ema_update(model, average, 0.5)
    with pytest.raises(ValueError, match=r"0\.a\.bias, 0\.a\.weight, 0\.b\.bias and 5 more"):
        utils.ema_update(nn.Sequential(model), model, 0.5)
    del average.mean
    average.b = model.b
    with pytest.raises(ValueError, match="differ in their buffers: mean"):
        utils.ema_update(model, average, 0.5)


def test_ema_warmup_of_power_one_is_the_arithmetic_mean():
    schedule, average, values = utils.EMAWarmup(), 123.0, [3.0, -1.0, 4.0, 10.0]
    for n, value in enumerate(values, start=1):
        average = utils.ema_update_dict({"x": average}, {"x": value}, schedule.get_value())["x"]
        schedule.step()
        assert average == pytest.approx(sum(values[:n]) / n)


def test_ema_warmup_reaches():
    for steps, value in ((31_622, 0.999), (1_000_000, 0.9999)):
        assert utils.EMAWarmup(power=2 / 3, last_epoch=steps).get_value() == pytest.approx(
            value, abs=1e-7
        )


def test_ema_warmup_limits_and_start():
    schedule = utils.EMAWarmup(inv_gamma=2, min_value=0.1, max_value=0.6, start_at=3)
    values = []
    for _ in range(12):
        values.append(schedule.get_value())
        schedule.step()
    assert values[:4] == [0.1] * 4
    assert values[4:7] == pytest.approx([1 / 3, 1 / 2, 3 / 5])
    assert values[-1] == 0.6


def test_ema_warmup_state():
    schedule, other = utils.EMAWarmup(power=0.7, max_value=0.99, last_epoch=5), utils.EMAWarmup()
    state = schedule.state_dict()
    other.load_state_dict({**state, "from_a_later_version": 1})
    schedule.step()
    other.step()
    assert vars(other) == vars(schedule)
    assert state["last_epoch"] == 5
    del state["power"]
    with pytest.raises(ValueError, match="lacks power"):
        other.load_state_dict(state)


def test_ema_update_dict_is_in_place_and_starts_at_the_first_value():
    values = {"a": 1.0}
    assert utils.ema_update_dict(values, {"a": 2.0, "b": 5.0}, 0.75) is values
    assert values == {"a": 1.25, "b": 5.0}
    tensor = torch.tensor(1.0)
    utils.ema_update_dict({"a": tensor}, {"a": 2.0}, 0.75)
    assert tensor == 1.25


def test_published_numbers():
    schedule, values = utils.EMAWarmup(power=0.6667, max_value=0.9999), []
    for _ in range(12):
        values.append(schedule.get_value())
        schedule.step()
    torch.testing.assert_close(torch.tensor(values), golden.load("ema_and_lr")[0]["ema"])


def test_what_has_to_be_converted_is_converted_one_by_one(monkeypatch):
    model, average = nn.Linear(4, 4).double(), nn.Linear(4, 4)
    want = [
        torch.lerp(a, c.float(), 0.25) for a, c in zip(average.parameters(), model.parameters())
    ]
    sizes, lerp = [], torch._foreach_lerp_
    monkeypatch.setattr(
        torch, "_foreach_lerp_", lambda a, c, w: sizes.append(len(a)) or lerp(a, c, w)
    )
    utils.ema_update(model, average, 0.75)
    assert sizes == [1, 1]
    torch.testing.assert_close(list(average.parameters()), want)
