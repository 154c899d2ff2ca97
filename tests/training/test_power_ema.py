import json

import pytest
import runs
import torch
from torch import nn

import k_diffusion as K
from k_diffusion import checkpoints
from k_diffusion.checkpoints import snapshots
from k_diffusion.training import posthoc
from k_diffusion.training.power_ema import PowerEMA


def train(folder, monkeypatch, *args):
    monkeypatch.setattr("k_diffusion.generation.STEPS", 2)
    (folder / "tiny.json").write_text(json.dumps(runs.TINY))
    fast = "--seed", 1, "--batch-size", 6, "--sample-n", 1, "--num-workers", 0
    words = "--config", "tiny.json", *fast, *args
    runs.call("train", *words, folder=folder, monkeypatch=monkeypatch)


def test_the_average_is_the_integral_of_its_profile():
    """Whatever the number of images of each step, and free of the initial weights."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    model.register_buffer("seen", torch.tensor(0))
    averages = PowerEMA(model, [0.05, 0.1, snapshots.MAX_WIDTH], samples=40)
    times, weights = [0], []
    for images in (5, 5, 5, 30, 1, 2, 12, 5):
        model.weight.data.normal_()
        model.seen += 1
        times.append(times[-1] + images)
        weights.append(model.weight.detach().clone())
        averages.update(model, 40 + times[-1])
        if len(weights) == 1:
            for profile in averages.profiles.values():
                assert torch.equal(profile.model.weight, model.weight.float())
    for width, profile in averages.profiles.items():
        shares = (torch.tensor(times).double() / times[-1]) ** (snapshots.gamma_of(width) + 1)
        wanted = torch.einsum("n,nij->ij", shares.diff(), torch.stack(weights))
        assert profile.model.weight.dtype == torch.float32
        torch.testing.assert_close(profile.model.weight.double(), wanted, rtol=1e-6, atol=1e-6)
        assert profile.model.seen == 8
    # of width 0.2887 it is the mean over the images
    mean = sum(w * n for w, n in zip(weights, torch.tensor(times).diff())) / times[-1]
    torch.testing.assert_close(profile.model.weight.double(), mean, rtol=1e-6, atol=1e-6)


def test_a_width_that_a_checkpoint_lacks_begins_now():
    model = nn.Linear(2, 2)
    old = PowerEMA(model, [0.05])
    old.update(model, 10)
    new = PowerEMA(nn.Linear(2, 2), [0.05, 0.1])
    new.load_state_dict(old.state_dict(), 10)
    kept, begun = new.profiles[0.05], new.profiles[0.1]
    assert (kept.began, kept.images) == (0, 10)
    assert (begun.began, begun.images) == (10, 0)
    assert torch.equal(kept.model.weight, model.weight)
    with pytest.raises(checkpoints.CheckpointError, match="another architecture"):
        PowerEMA(nn.Linear(3, 2), [0.05]).check_state_dict(old.state_dict(), "x.pth")
    new.begin(12)
    new.update(model, 15)
    assert torch.equal(begun.model.weight, model.weight)


def test_a_run_its_snapshots_and_another_width(tmp_path, monkeypatch, capsys):
    widths = "--power-ema", 0.05, 0.1, "--save-every", 3, "--keep", 1
    train(tmp_path, monkeypatch, "--name", "whole", "--end-step", 6, *widths)
    for end in 4, 6:  # stopped between saves
        train(tmp_path, monkeypatch, "--name", "parts", "--end-step", end, *widths)
    states = [runs.read(tmp_path / f"{name}_00000006.pth") for name in ("whole", "parts")]
    assert [state.pop("elapsed") > 0 for state in states] == [True, True]
    assert runs.differences(*states) == []
    # one checkpoint is kept, and all snapshots
    assert len(list(tmp_path.glob("whole_*.pth"))) == 1
    assert sorted(p.name for p in tmp_path.glob("whole_*.safetensors")) == [
        f"whole_0000000{step}_ema{width}.safetensors" for step in (3, 6) for width in (0.05, 0.1)
    ]
    assert [s.step for s in snapshots.find_snapshots(tmp_path / "parts")] == [
        step for step in (3, 4, 6) for _ in range(2)
    ]
    power = states[0]["power_ema"]
    stored = checkpoints.read_weights(tmp_path / "whole_00000006_ema0.05.safetensors")
    assert runs.differences(stored, dict(power[0.05]["weights"])) == []
    assert power[0.05]["images"] == 36

    def reconstruct(width, *args):
        words = ["posthoc", str(tmp_path / "whole"), "--width", str(width), "-o", "out.safetensors"]
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr("sys.argv", [*words, *args])
            posthoc.main()
        assert f"width {width} at step" in capsys.readouterr().out
        return K.loading.load_denoiser(tmp_path / "out.safetensors")

    denoiser, config = reconstruct(0.1)
    assert config["model"]["type"] == runs.TINY["model"]["type"]
    weights = denoiser.inner_model.state_dict()
    assert runs.differences(dict(weights), dict(power[0.1]["weights"])) == []
    denoiser, _ = reconstruct(0.07, "--step", "3")
    assert runs.differences(dict(weights), dict(denoiser.inner_model.state_dict()))


def test_averages_begin_anew_with_the_weights(tmp_path, monkeypatch):
    train(tmp_path, monkeypatch, "--end-step", 1, "--power-ema", 0.1)
    train(tmp_path, monkeypatch, "--end-step", 2, "--power-ema", 0.1, "--reset-ema")
    state = runs.read(tmp_path / "model_00000002.pth")
    assert (state["power_ema"][0.1]["began"], state["power_ema"][0.1]["images"]) == (6, 6)
    assert {s.step for s in snapshots.find_snapshots(tmp_path)} == {2}
    # the run's model is its checkpoint, whatever snapshots lie beside it
    (tmp_path / "model_00000001.pth").unlink()
    weights = dict(K.loading.load(tmp_path).inner_model.state_dict())
    assert runs.differences(weights, dict(state["model_ema"])) == []


def test_the_averages_of_a_branch_that_was_left(tmp_path, monkeypatch):
    train(tmp_path, monkeypatch, "--end-step", 1, "--power-ema", 0.05, 0.1)
    # two branches of step 1, one of one width, which passes the last step of the other
    train(tmp_path, monkeypatch, "--end-step", 2, "--power-ema", 0.05, 0.1, "--lr", 5)
    back = "--resume", "model_00000001.pth", "--power-ema", 0.05
    train(tmp_path, monkeypatch, "--end-step", 3, *back)
    used = [(s.step, s.width) for s in snapshots.find_snapshots(tmp_path)]
    assert used == [(1, 0.05), (1, 0.1), (3, 0.05)]
    (first, second) = runs.read(tmp_path / "model_00000003.pth")["branch"]
    assert (first, second[1]) == (("", 0), 1)
    assert runs.read(tmp_path / "model_00000002.pth")["branch"] == [first]


def test_a_damaged_average_of_a_checkpoint_is_named(tmp_path):
    state = {"config": {}, "model": {}, "power_ema": {0.05: {"images": 1, "began": 0}}}
    checkpoints.write_checkpoint(tmp_path / "a.pth", state)
    with pytest.raises(checkpoints.CheckpointError, match="'power_ema' lacks values"):
        checkpoints.read_checkpoint(tmp_path / "a.pth")
