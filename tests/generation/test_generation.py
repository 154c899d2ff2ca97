import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import runs
import torch
from torch import nn

import k_diffusion as K
from k_diffusion import checkpoints, generation, guidance
from k_diffusion.loading import load_denoiser
from k_diffusion.scripts.sample import parse_classes
from k_diffusion.training import run_files

SIGMAS = K.sampling.get_sigmas_karras(4, 0.05, 10.0)
SAMPLERS = [name for name, row in K.sampling.SAMPLERS.items() if row.takes_sigmas]


class Elementwise(nn.Module):
    """A denoiser of N(class / 10, 1), free of sums whose order could depend on the batch."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, x, sigma, class_cond=None):
        assert not self.training
        self.shapes.append(len(x))
        mean = 0 if class_cond is None else class_cond[:, None, None, None] / 10
        sigma = sigma[:, None, None, None]
        return (sigma**2 * mean + x) / (sigma**2 + 1)


def images(seeds, batch_size=64, **kwargs):
    batches = generation.generate(
        Elementwise(), (1, 4, 3), seeds, SIGMAS, batch_size=batch_size, disable=True, **kwargs
    )
    return torch.cat(list(batches))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_seed_alone(sampler):
    """Bitwise: whatever the batch size and the images beside it, noise included."""
    whole = images(range(5, 13), sampler=sampler)
    for batch_size in 1, 3:
        assert torch.equal(images(range(5, 13), batch_size, sampler=sampler), whole)
    assert torch.equal(images(range(5, 13, 2), sampler=sampler), whole[::2])  # one of 2 processes
    assert len(whole.unique(dim=0)) == 8
    assert whole.isfinite().all()


@pytest.mark.parametrize(("n", "seen"), [(8, {3}), (2, {2}), (0, set())])
def test_a_compiled_model_sees_one_size_of_batch(n, seen):
    model = Elementwise()
    batches = generation.generate(
        model,
        (1, 4, 3),
        range(5, 5 + n),
        SIGMAS,
        classes=[i % 2 for i in range(n)],
        num_classes=2,
        batch_size=3,
        disable=True,
        static=True,
    )
    got = torch.cat([torch.empty(0, 1, 4, 3), *batches])
    assert set(model.shapes) == seen
    classes = [i % 2 for i in range(n)]
    want = images(range(5, 5 + n), classes=classes, num_classes=2) if n else got
    assert torch.equal(got, want)


def test_classes_follow_their_seeds():
    classes = [0, 9, 4, 0, 9]
    whole = images(range(5), classes=classes, num_classes=10)
    assert torch.equal(images(range(5), 2, classes=classes, num_classes=10), whole)
    assert not torch.equal(images(range(5), classes=[0] * 5, num_classes=10), whole)


def test_guidance_moves_the_means_in_one_batched_call():
    """Of Gaussians it gives the denoiser of another mean: here 1 + 3 (c / 10 - 1)."""
    model = Elementwise()
    kwargs = {"num_classes": 10, "disable": True}
    seeds, shape = range(3), (1, 4, 3)
    guided = guidance.CFGDenoiser(model, 3.0, class_cond=torch.tensor([10]))
    (got,) = generation.generate(guided, shape, seeds, SIGMAS, classes=[7, 8, 9], **kwargs)
    assert set(model.shapes) == {6}
    moved = images(seeds, classes=[1, 4, 7], num_classes=10)
    torch.testing.assert_close(got, moved, atol=1e-5, rtol=0)


def test_the_model_is_left_in_its_mode():
    model = Elementwise().train()
    list(generation.generate(model, (1, 2, 2), [0], SIGMAS, disable=True))
    assert model.training


def test_one_progress_bar_for_all_batches(capsys):
    for disable in False, True:
        list(
            generation.generate(
                Elementwise(), (1, 2, 2), range(5), SIGMAS, batch_size=2, disable=disable
            )
        )
        text = capsys.readouterr().err
        assert ("12/12" in text) != disable
        assert text.count("\n") <= 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown sampler 'eular'"):
        images([0], sampler="eular")
    with pytest.raises(ValueError, match=r"takes no schedule; these do: .*heun"):
        images([0], sampler="dpm_adaptive")
    with pytest.raises(ValueError, match="has 3 classes: say which"):
        images([0], num_classes=3)
    with pytest.raises(ValueError, match="class 3 is out of range; classes are 0 to 2"):
        images([0], classes=[3], num_classes=3)
    with pytest.raises(ValueError, match="one class for each of 2 seeds, got 1"):
        images([0, 1], classes=[2], num_classes=3)
    with pytest.raises(ValueError, match="unconditional"):
        images([0], classes=[0])


def test_classes_of_the_command_line():
    assert parse_classes(["all"], 3) == [0, 1, 2]
    assert parse_classes(["2", "0"], 3) == [2, 0]
    assert parse_classes(["all"], 0) is None
    for names, n in (["3"], 3), (["-1"], 3), (["0"], 0):
        with pytest.raises(ValueError, match="class"):
            parse_classes(names, n)


# ------------------------------------------------------------------------- loading


@pytest.fixture
def files(tmp_path):
    config = runs.tiny_config()
    torch.manual_seed(0)
    model, averaged = (K.config.make_model(config).state_dict() for _ in range(2))
    state = {"config": config, "model": model, "model_ema": averaged}
    path = run_files.save_checkpoint(str(tmp_path / "a"), 1, state)
    checkpoints.write_inference(tmp_path / "a.safetensors", config, averaged, "fp32")
    checkpoints.write_inference(tmp_path / "half.safetensors", config, averaged, "fp16")
    return path, tmp_path / "a.safetensors", tmp_path / "half.safetensors", averaged


def test_both_kinds_of_checkpoint_load(files):
    training, inference, half, averaged = files
    for path in training, inference:
        denoiser, config = load_denoiser(path)
        assert runs.differences(dict(denoiser.inner_model.state_dict()), dict(averaged)) == []
        assert not denoiser.training
        assert not any(p.requires_grad for p in denoiser.parameters())
        assert denoiser.sigma_data == config["model"]["sigma_data"] == 0.75
    denoiser, _ = load_denoiser(half)
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}


def test_another_config(files, tmp_path):
    path = tmp_path / "c.json"
    other = {**runs.TINY, "model": {**runs.TINY["model"], "sigma_max": 7}}
    path.write_text(json.dumps(other))
    assert load_denoiser(files[1], path)[1]["model"]["sigma_max"] == 7
    path.write_text(json.dumps({**runs.TINY, "model": {**runs.TINY["model"], "mapping_width": 24}}))
    with pytest.raises(checkpoints.CheckpointError, match="another architecture"):
        load_denoiser(files[1], path)


def test_a_class_conditional_model_with_fewer_images_of_other_sizes(files):
    """Non-native and non-square sizes; only those that patches and levels divide."""
    denoiser, _ = load_denoiser(files[1])
    kwargs = {"classes": [3, 4], "num_classes": 10, "disable": True}
    (batch,) = generation.generate(denoiser, (1, 12, 16), [0, 1], SIGMAS, **kwargs)
    assert batch.shape == (2, 1, 12, 16)
    assert batch.isfinite().all()
    with pytest.raises(ValueError, match=r"multiples of 4 and 4 .* got 10 x 16"):
        next(generation.generate(denoiser, (1, 10, 16), [0, 1], SIGMAS, **kwargs))


def test_images_start_from_noise_at_the_schedules_first_level():
    """Pure noise stays pure noise where nothing is denoised: Euler's step divides it by as much."""
    seen = []

    class Nothing(nn.Module):
        def forward(self, x, sigma):
            seen.append((x, sigma))
            return torch.zeros_like(x)

    sigmas = torch.tensor([8.0, 3.0, 0.5])
    (got,) = generation.generate(
        Nothing(), (1, 4, 3), [5, 6], sigmas, sampler="euler", disable=True
    )
    noise = K.sampling.randn_per_seed([5, 6], (1, 4, 3))
    assert torch.equal(seen[0][0], 8 * noise)
    assert seen[0][1].tolist() == [8.0, 8.0]
    torch.testing.assert_close(got, 0.5 * noise)


@pytest.mark.parametrize("num_classes", [0, 10])
def test_processes_share_seeds_and_classes_out_in_turn(num_classes, monkeypatch):
    """Image i is the same on any number of processes."""

    def share(index, processes):
        accelerator = SimpleNamespace(
            process_index=index,
            num_processes=processes,
            is_main_process=index == 0,
            device=torch.device("cpu"),
            autocast=nullcontext,
            gather=lambda x: x,
        )
        return generation.sample_share(accelerator, Elementwise(), config, seeds, batch_size=4)

    monkeypatch.setattr(generation, "gather_shares", lambda accelerator, mine, n: mine)
    monkeypatch.setattr(generation, "STEPS", 3)
    config = runs.tiny_config(dataset={"num_classes": num_classes})
    seeds = [3, 1, 4, 15, 9, 2, 6]
    whole = share(0, 1)
    assert len(whole.unique(dim=0)) == 7
    for i in range(3):
        assert torch.equal(share(i, 3), whole[i::3])


@pytest.mark.parametrize(("n", "asks"), [(4, [1, 1]), (5, [2, 2]), (1, [1, 1]), (0, [0, 0])])
def test_processes_agree_equally_often_whatever_their_share(n, asks, monkeypatch):
    """Of batches of two: the shares of 5 images on two processes are 3 and 2."""
    monkeypatch.setattr(generation, "STEPS", 1)

    def count(index):
        asked = []
        accelerator = SimpleNamespace(
            process_index=index,
            num_processes=2,
            is_main_process=True,
            device=torch.device("cpu"),
            autocast=nullcontext,
            gather=lambda x: asked.append(x) or x,
        )
        config = runs.tiny_config(dataset={"num_classes": 0})
        list(generation.sample_batches(accelerator, Elementwise(), config, range(n), batch_size=2))
        return len(asked)

    assert [count(0), count(1)] == asks


@pytest.mark.parametrize("who", ["this process", "another"])
def test_a_stop_of_one_process_is_everybodys(who, monkeypatch):
    monkeypatch.setattr(generation, "STEPS", 5)
    mine = who == "this process"
    accelerator = SimpleNamespace(
        process_index=0,
        num_processes=2,
        is_main_process=True,
        device=torch.device("cpu"),
        autocast=nullcontext,
        gather=lambda x: torch.cat([x, torch.tensor([int(not mine)])]),
    )
    asked = []

    def stop():
        asked.append(1)
        return mine and len(asked) == 2

    config = runs.tiny_config(dataset={"num_classes": 0})
    with pytest.raises(generation.SamplingStopped):
        generation.sample_share(
            accelerator, Elementwise(), config, range(6), batch_size=2, stop=stop
        )
    assert len(asked) == (2 if mine else 5)  # of the first of two batches
