"""One optimizer step, alone and by two processes, against sums done by hand."""

import contextlib
import copy
import io
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch

import k_diffusion as K
from k_diffusion import distributed
from k_diffusion.training import log, optim, step
from k_diffusion.training.noise_scale import NoiseScale
from k_diffusion.training.power_ema import PowerEMA
from k_diffusion.training.signals import StopSignal
from k_diffusion.training.state import TrainState

FULL = {"dataset": {"cond_dropout_rate": 0.0}, "optimizer": {"max_grad_norm": None}}


def make(**sections):
    """A state and its accelerator. Weights that start at 0 get values: all gradients count."""
    from accelerate import Accelerator

    config = runs.tiny_config(**sections)
    torch.manual_seed(0)
    model = K.config.make_model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    opt = optim.make_optimizer(config, model)
    state = TrainState(
        config=config,
        model=model,
        model_ema=copy.deepcopy(model),
        opt=opt,
        sched=optim.make_lr_sched(config, opt),
        ema_sched=optim.make_ema_sched(config),
        seed=4,
        dataset_length=100,
    )
    accelerator = Accelerator(cpu=True)
    prepared, opt = accelerator.prepare(model, opt)
    denoiser = K.config.make_denoiser_wrapper(config)(prepared)
    return state, accelerator, denoiser, opt


def images(n, start=0):
    generator = torch.Generator().manual_seed(9)
    image = torch.randn(start + n, 1, 8, 8, generator=generator).clamp(-1, 1)[start:]
    classes = (torch.arange(start, start + n) * 3) % 10
    return {"image": image, "class": classes, "aug_cond": torch.zeros(n, 9)}


def train(accelerator, state, denoiser, opt, batches, **kwargs):
    density = K.config.make_sample_density(state.config["model"])
    return step.train_step(accelerator, denoiser, opt, state, iter(batches), density, **kwargs)


@pytest.fixture(autouse=True)
def one_accelerator():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def fixed_noise(monkeypatch):
    fix_noise(monkeypatch.setattr)


def fix_noise(setattr):
    """Noise and its level as functions of the image: the same whoever draws, in whatever batch."""

    def batch_loss(denoiser, batch, density, config, device):
        noise = (batch["image"] * 1000).sin()
        sigma = batch["image"].abs().mean((1, 2, 3))
        return denoiser.loss(batch["image"], noise, sigma, class_cond=batch["class"])

    setattr(step, "batch_loss", batch_loss)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-7, msg=name)


def test_accumulated_halves_are_the_whole_batch(fixed_noise):
    whole, parts = make(**FULL), make(**FULL)
    accelerator = whole[1]
    loss, norm = train(accelerator, whole[0], *whole[2:], [images(8)])
    halves = [images(4), images(4, 4)]
    loss_parts, _ = train(accelerator, parts[0], *parts[2:], halves, accumulate=2)
    squares = sum(p.grad.square().sum() for p in whole[0].model.parameters())
    assert norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-5)  # which nobody clipped
    assert loss_parts.item() == pytest.approx(loss.item(), rel=1e-5)
    close(gradients(whole[0].model), gradients(parts[0].model))
    # however many batches make up a step: one step of the optimizer, the schedules and the counters
    for state in whole[0], parts[0]:
        assert (state.step, state.samples, state.sched.last_epoch) == (1, 8, 1)
        assert state.ema_sched.last_epoch == 1
        assert state.opt.state_dict()["state"][0]["step"] == 1


def test_clipping():
    state, accelerator, denoiser, opt = make(optimizer={"max_grad_norm": 0.01})
    _, norm = train(accelerator, state, denoiser, opt, [images(4)])
    assert norm > 0.01
    squares = sum(p.grad.square().sum() for p in state.model.parameters())
    assert squares.sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_the_average_follows_the_weights():
    state, accelerator, denoiser, opt = make()
    before = copy.deepcopy(state.model_ema.state_dict())
    for _ in range(2):
        decay = state.ema_sched.get_value()
        train(accelerator, state, denoiser, opt, [images(4)])
        now = dict(state.model.named_parameters())
        for name, p in state.model_ema.named_parameters():
            torch.testing.assert_close(p, torch.lerp(before[name], now[name], 1 - decay))
        before = copy.deepcopy(state.model_ema.state_dict())


def test_random_numbers_follow_from_seed_step_and_nothing_else():
    a, b, c = make(), make(), make()
    torch.manual_seed(123)
    loss, _ = train(a[1], a[0], *a[2:], [images(4)])
    torch.manual_seed(456)
    assert torch.equal(train(b[1], b[0], *b[2:], [images(4)])[0], loss)
    c[0].step = 1
    assert not torch.equal(train(c[1], c[0], *c[2:], [images(4)])[0], loss)


def test_checkpointing_changes_no_bit():
    plain, saving = make(), make()
    train(plain[1], plain[0], *plain[2:], [images(4)])
    train(saving[1], saving[0], *saving[2:], [images(4)], checkpointing="full")
    weights = (dict(state[0].model.state_dict()) for state in (plain, saving))
    assert runs.differences(*weights) == []


def test_a_step_skipped_in_fp16_moves_neither_schedule_nor_average():
    state, accelerator, denoiser, _ = make()
    opt = SimpleNamespace(
        zero_grad=lambda set_to_none: None, step=lambda: None, step_was_skipped=True
    )
    ema = copy.deepcopy(state.model_ema.state_dict())
    train(accelerator, state, denoiser, opt, [images(4)])
    assert (state.step, state.samples) == (1, 4)
    assert (state.sched.last_epoch, state.ema_sched.last_epoch) == (0, 0)
    assert runs.differences(dict(ema), dict(state.model_ema.state_dict())) == []


SGD = {"type": "sgd", "lr": 1e-2, "momentum": 0.9}


def snapshot(state):
    return copy.deepcopy((state.model.state_dict(), state.opt.state_dict()["state"]))


@pytest.mark.parametrize(
    "options", [{}, SGD, {"max_grad_norm": None}], ids=["adamw", "sgd", "free"]
)
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_lost_step_leaves_the_weights_and_the_optimizer(monkeypatch, options, what, fused):
    """Also the first step of a run, and of a state that the optimizer has only then."""
    state, accelerator, denoiser, opt = make(optimizer=options)
    for group in (state.opt.defaults, *state.opt.param_groups):
        group["fused"] = fused
    batch_loss, lost = step.batch_loss, [True, False, True, False]

    def lose(*args):
        loss = batch_loss(*args)
        if not lost.pop(0):
            return loss
        if what == "loss":  # finite gradient, or it would be
            return loss + torch.tensor([0.0, math.inf, 0.0, 0.0])
        return torch.where(torch.arange(4) == 1, (loss * 0).sqrt(), loss)

    def train_on():
        return train(accelerator, state, denoiser, opt, [images(4)])

    monkeypatch.setattr(step, "batch_loss", lose)
    same = copy.deepcopy(state.model.state_dict())
    loss, norm = train_on()
    assert not norm.isfinite()
    assert loss.isfinite() == (what == "gradient")
    assert runs.differences(dict(state.model.state_dict()), dict(same)) == []
    train_on()
    before, at = snapshot(state), state.step
    train_on()
    assert runs.differences(snapshot(state), before) == []
    assert (state.step, state.samples, state.sched.last_epoch) == (at + 1, 12, at + 1)
    train_on()
    assert runs.differences(snapshot(state)[0], before[0]) != []
    assert all(x.isfinite().all() for x in snapshot(state)[0].values())


@pytest.mark.parametrize("options", [{}, SGD], ids=["adamw", "sgd"])
def test_a_lost_first_step_is_as_if_it_had_not_been(monkeypatch, options):
    lucky, unlucky = make(optimizer=options), make(optimizer=options)
    batch_loss = step.batch_loss
    with monkeypatch.context() as patch:
        patch.setattr(step, "batch_loss", lambda *args: batch_loss(*args) * math.nan)
        train(unlucky[1], unlucky[0], *unlucky[2:], [images(4)])
    for state, accelerator, *rest in lucky, unlucky:
        state.step = 1
        for group in state.opt.param_groups:
            group["lr"] = 1e-3
        train(accelerator, state, *rest, [images(4)])
    assert runs.differences(snapshot(unlucky[0]), snapshot(lucky[0])) == []


def test_data_that_fails_leaves_the_state_as_it_was():
    state, accelerator, denoiser, opt = make()
    before = copy.deepcopy(state.model.state_dict())

    def batches():
        yield images(4)
        raise OSError

    with pytest.raises(OSError):
        train(accelerator, state, denoiser, opt, batches(), accumulate=2)
    assert state.whole
    assert (state.step, state.samples) == (0, 0)
    assert runs.differences(dict(before), dict(state.model.state_dict())) == []


# ------------------------------------------------------------------------- the batch's loss


def test_class_dropout():
    torch.manual_seed(0)
    classes = torch.arange(10).repeat(1000)
    assert torch.equal(step.drop_classes(classes, 10, 0.0), classes)
    assert torch.equal(step.drop_classes(classes, 10, 1.0), torch.full_like(classes, 10))
    dropped = step.drop_classes(classes, 10, 0.25)
    share = (dropped == 10).float().mean().item()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 10000) ** 0.5
    kept = dropped != 10
    assert torch.equal(dropped[kept], classes[kept])


class Recorder:
    inner_model = SimpleNamespace(takes_aug_cond=True)

    def loss(self, image, noise, sigma, **cond):
        self.seen = image, noise, sigma, cond
        return torch.zeros(len(image))


@pytest.mark.parametrize("augment_prob", [0.0, 0.5])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_conditions_that_the_model_gets(augment_prob, num_classes):
    config = runs.tiny_config(
        model={"augment_prob": augment_prob}, dataset={"num_classes": num_classes}
    )
    density = K.config.make_sample_density(config["model"])
    denoiser = Recorder()
    step.batch_loss(denoiser, images(5), density, config, torch.device("cpu"))
    image, noise, sigma, cond = denoiser.seen
    assert image.shape == noise.shape == (5, 1, 8, 8)
    assert sigma.shape == (5,)
    assert ("aug_cond" in cond) == (augment_prob > 0)
    assert ("class_cond" in cond) == (num_classes > 0)


# ------------------------------------------------------------------------- two processes


def in_each_process(rank, folder):
    result = {}

    # noise levels of two accumulated batches
    state, accelerator, denoiser, opt = make(**FULL)
    uniforms, draw = [], K.densities.stratified_with_settings

    def record(*args, **kwargs):
        uniforms.append(draw(*args, **kwargs))
        return uniforms[-1]

    K.densities.stratified_with_settings = record
    train(accelerator, state, denoiser, opt, [images(3), images(3)], accumulate=2)
    K.densities.stratified_with_settings = draw
    result["uniforms"] = torch.cat(uniforms)
    result["samples"] = state.samples
    result["averaged"] = type(state.model_ema).__name__

    # the gradient of each process's half of a batch
    fix_noise(setattr)
    state, _, denoiser, opt = make(**FULL)
    result["wrapped"] = type(denoiser.inner_model).__name__
    train(accelerator, state, denoiser, opt, [images(4, 4 * rank)])
    result["gradients"] = gradients(state.model)
    state, _, denoiser, opt = make(**FULL)
    parts = [images(2, 4 * rank), images(2, 4 * rank + 2)]
    train(accelerator, state, denoiser, opt, parts, accumulate=2)
    result["accumulated"] = gradients(state.model)

    # the noise scale, by micro-batches of both, and by the hook that is published
    state, _, denoiser, opt = make(**FULL)
    hook = K.gns.DDPGradientStatsHook(denoiser.inner_model)
    state.noise_scale = NoiseScale(state.model)
    train(accelerator, state, denoiser, opt, parts, accumulate=2)
    result["hook"] = hook.get_stats()
    state.noise_scale.read(accelerator)
    result["noise scale"] = state.noise_scale.estimate.get_stats()

    # how often gradients travel, and the averages that come of them
    state, _, denoiser, opt = make(**FULL)
    state.power_ema = PowerEMA(state.model, [0.1])
    hook = K.gns.DDPGradientStatsHook(denoiser.inner_model)
    sent = []
    for accumulate in 1, 2:
        train(accelerator, state, denoiser, opt, parts, accumulate=accumulate)
        sent.append(len(hook.small))
        hook.get_stats()
    result["sent"] = sent
    result["averages"] = dict(state.model_ema.state_dict()), state.power_ema.state_dict()

    # images shared out unevenly, and more processes than images
    for n in 7, 1:
        mine = torch.arange(rank, n, 2.0)[:, None]
        result[f"gathered {n}"] = distributed.gather_shares(accelerator, mine, n)

    # the second process has a lost image
    state, _, denoiser, opt = make(**FULL)
    before = copy.deepcopy(state.model.state_dict())
    batch = images(4, 4 * rank)
    batch["image"][0] *= math.nan if rank else 1
    loss, norm = train(accelerator, state, denoiser, opt, [batch])
    result["lost"] = loss.item(), norm.item()
    result["changed by it"] = runs.differences(dict(before), dict(state.model.state_dict()))

    # corrupt images, one of each process and one of both
    logger = log.Log(accelerator, os.path.join(folder, "a"), state, None)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for names in f"{rank}.png\nboth.png", "0.png", "":
            logger.skip({"skipped": [names], "index": torch.tensor([0])})
            logger.step(state, torch.tensor(1.0), torch.tensor(1.0))
            logger.read(state)
    result["named"] = [line for line in said.getvalue().splitlines() if "corrupt" in line]

    # only the second process is told to stop
    stop = StopSignal()
    answers = []
    for i in range(4):
        stop.number = 15 if rank == 1 and i >= 1 else 0
        answers.append(stop.agreed(accelerator))
    result["answers"] = answers
    torch.save(result, os.path.join(folder, f"{rank}.pt"))
    accelerator.end_training()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two gloo processes found."""
    folder = tmp_path_factory.mktemp("two")
    runs.in_two_processes(in_each_process, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def squared_norm(gradients):
    return sum(g.square().sum().item() for g in gradients.values())


def mean_gradient(parts):
    state, accelerator, denoiser, opt = make(**FULL)
    train(accelerator, state, denoiser, opt, parts, accumulate=len(parts))
    return gradients(state.model)


def test_noise_scale_of_two_processes_is_that_of_one(two, fixed_noise):
    """Squared norms by hand, of four micro-batches of 2."""
    parts = [images(2, start) for start in (0, 2, 4, 6)]
    small = sum(squared_norm(mean_gradient([part])) for part in parts) / 4
    large = squared_norm(mean_gradient(parts))
    want = (8 * large - 2 * small) / 6, (small - large) / (1 / 2 - 1 / 8)
    state, accelerator, denoiser, opt = make(optimizer={"max_grad_norm": 0.01})
    state.noise_scale = NoiseScale(state.model)
    _, norm = train(accelerator, state, denoiser, opt, parts, accumulate=4)
    state.noise_scale.read(accelerator)
    for got in state.noise_scale.estimate.get_stats(), *(result["noise scale"] for result in two):
        assert got == pytest.approx(want, rel=1e-4)
    assert norm.item() ** 2 == pytest.approx(large, rel=1e-4)  # before clipping
    # what a process accumulates before it communicates is the published hook's small batch
    halves = [squared_norm(mean_gradient(half)) for half in (parts[:2], parts[2:])]
    for result in two:
        assert result["hook"] == pytest.approx((sum(halves) / 2, large), rel=1e-4)


def test_noise_levels_are_independent_where_the_noise_scale_is_measured(monkeypatch):
    state, accelerator, denoiser, opt = make(**FULL)
    state.noise_scale = NoiseScale(state.model)
    strata, draw = [], step.enable_stratified_accelerate

    def record(accelerator, disable, *args):
        strata.append(disable)
        return draw(accelerator, disable, *args)

    monkeypatch.setattr(step, "enable_stratified_accelerate", record)
    train(accelerator, state, denoiser, opt, [images(3), images(3)], accumulate=2)
    state.noise_scale = None
    train(accelerator, state, denoiser, opt, [images(3), images(3)], accumulate=2)
    assert strata == [True, True, False, False]


def test_accumulated_gradients_travel_once(two):
    for result in two:
        assert result["sent"][0] == result["sent"][1] > 0


def test_all_processes_have_the_same_averages(two):
    """Bit by bit, though each has images of its own and averages by itself."""
    assert runs.differences(two[0]["averages"], two[1]["averages"]) == []
    assert two[0]["averages"][1][0.1]["images"] > 0


@pytest.mark.parametrize("key", ["gradients", "accumulated"])
def test_two_processes_have_the_gradient_of_the_whole_batch(two, fixed_noise, key):
    state, accelerator, denoiser, opt = make(**FULL)
    train(accelerator, state, denoiser, opt, [images(8)])
    for result in two:
        close(result[key], gradients(state.model))


def test_the_average_is_not_wrapped(two):
    assert two[0]["wrapped"] == "DistributedDataParallel"
    assert two[0]["averaged"] == "ImageTransformerDenoiserModelV2"
    assert [result["samples"] for result in two] == [12, 12]


def test_noise_levels_of_all_processes_and_batches_are_stratified(two):
    uniforms = torch.cat([result["uniforms"] for result in two])
    assert sorted(np.floor(12 * uniforms.numpy()).tolist()) == list(range(12))


def test_uneven_shares_are_gathered_in_order(two):
    for n in 7, 1:
        assert two[0][f"gathered {n}"].flatten().tolist() == list(range(n))
        assert two[1][f"gathered {n}"] is None


def test_a_lost_loss_of_one_process_is_a_lost_step_of_all(two):
    assert [math.isfinite(result["lost"][0]) for result in two] == [True, False]
    assert [math.isfinite(result["lost"][1]) for result in two] == [False, False]
    assert [result["changed by it"] for result in two] == [[], []]


def test_corrupt_images_of_all_processes_are_named_once_by_the_first(two):
    names = "0.png", "both.png", "1.png"
    assert two[0]["named"] == [
        f"skipped a corrupt image ({n} so far): {name}" for n, name in enumerate(names, 1)
    ]
    assert two[1]["named"] == []


def test_all_processes_stop_at_the_same_step(two):
    assert two[0]["answers"] == two[1]["answers"] == [False, False, True, True]


def test_batches_of_a_step_have_noise_of_their_own(monkeypatch):
    state, accelerator, denoiser, opt = make(**FULL)
    loss, noises = denoiser.loss, []

    def record(image, noise, sigma, **cond):
        noises.append(noise)
        return loss(image, noise, sigma, **cond)

    monkeypatch.setattr(denoiser, "loss", record)
    train(accelerator, state, denoiser, opt, [images(3)] * 3, accumulate=3)
    train(accelerator, state, denoiser, opt, [images(3)] * 3, accumulate=3)
    assert len(torch.stack(noises).flatten(0, 1).unique(dim=0)) == 6 * 3
