import json

import numpy as np
import pytest
import torch
from torch import nn

from k_diffusion import checkpoints
from k_diffusion.checkpoints import snapshots
from k_diffusion.checkpoints.snapshots import coefficients, gamma_of, width_of


def test_widths_and_gammas():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)
    assert gamma_of(snapshots.MAX_WIDTH) == pytest.approx(0, abs=1e-9)
    for width in (0.001, 0.01, 0.05, 0.1, 0.2, 0.28):
        gamma = gamma_of(width)
        assert width_of(gamma) == pytest.approx(width, rel=1e-9)
        # the standard deviation of the profile (gamma + 1) tau^gamma over [0, 1]
        mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
        assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=1e-6)

    # the plain mean, as texts write it
    assert snapshots.parse_width("0.2887") == snapshots.MAX_WIDTH


@pytest.mark.parametrize("width", [0, -1, 0.2888, 0.3, float("nan")])
def test_a_width_without_a_profile_that_grows(width):
    with pytest.raises(ValueError, match="must be from 0.001 to 0.2887"):
        gamma_of(width)


def test_products_are_the_integrals():
    a, b, x = (300.0, 16.97), (200.0, 6.94), np.linspace(0, 300, 300_001)
    p, q = (np.where(x <= t, (g + 1) * (x / t) ** g / t, 0) for t, g in (a, b))
    for first, second, values in ((a, b, p * q), (b, a, q * p), (a, a, p * p)):
        got = snapshots._products([first], [second])[0, 0]
        assert got == pytest.approx(np.trapezoid(values, x), rel=1e-4)


def test_a_stored_profile_is_itself():
    stored = [(t, gamma_of(w)) for t in (100.0, 200.0, 300.0) for w in (0.05, 0.1)]
    for i, profile in enumerate(stored):
        found, error = coefficients(stored, profile)
        assert found.tolist() == np.eye(6)[i].tolist()
        assert error == 0
        # and by the solution, for one as good as stored
        found, error = coefficients(stored, (profile[0], profile[1] * (1 + 1e-12)))
        np.testing.assert_allclose(found, np.eye(6)[i], atol=1e-9)
        assert error < 1e-6


def test_coefficients_sum_to_one_and_their_error_is_the_distance():
    stored = [(t, gamma_of(w)) for t in (50.0, 100.0) for w in (0.05, 0.1)]
    target = 100.0, gamma_of(0.15)
    found, error = coefficients(stored, target)
    assert found.sum() == pytest.approx(1)
    x = np.linspace(0, 100, 200_001)

    def profile(t, g):
        return np.where(x <= t, (g + 1) * (x / t) ** g / t, 0)

    wanted = profile(*target)
    made = sum(c * profile(*p) for c, p in zip(found, stored))
    norm = np.trapezoid((made - wanted) ** 2, x) / np.trapezoid(wanted**2, x)
    assert error == pytest.approx(norm**0.5, rel=1e-2)


# ------------------------------------------------------------------------------- files


class Walk:
    """Weights that wander, and their averages of any width, directly, in float64."""

    def __init__(self, steps=2000, images=7):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(steps, 5, dtype=torch.float64, generator=generator)
        self.weights = noise.cumsum(0) / steps**0.5 + 3
        self.times = images * torch.arange(1, steps + 1, dtype=torch.float64)

    def average(self, width, step):
        end = self.times[step - 1]
        edges = torch.cat([torch.zeros(1), self.times[:step]]) / end
        return (edges ** (gamma_of(width) + 1)).diff() @ self.weights[:step]


def test_dense_snapshots_give_any_width():
    walk = Walk()
    stored = [(step, width) for step in range(20, 2001, 20) for width in (0.05, 0.1)]
    profiles = [(float(walk.times[step - 1]), gamma_of(width)) for step, width in stored]
    averages = torch.stack([walk.average(width, step) for step, width in stored])
    for width, tolerance in ((0.03, 2e-5), (0.04, 5e-6), (0.07, 2e-6), (0.15, 2e-6), (0.2, 1e-4)):
        found, _ = coefficients(profiles, (float(walk.times[-1]), gamma_of(width)))
        error = torch.from_numpy(found) @ averages - walk.average(width, 2000)
        assert error.abs().max() / walk.weights.std() < tolerance, width
        assert abs(found).sum() < 20  # so that rounding isn't enlarged by more


def write(folder, name, step, width, weight, images, *, branch=(), began=0, buffer=0, since=None):
    model = nn.BatchNorm1d(5)
    model.weight.data = weight.float()
    model.num_batches_tracked.fill_(buffer)
    names = [name for name, _ in model.named_buffers()]
    profile = {"images": images, "began": began, "buffers": names, "weights": model.state_dict()}
    path = folder / f"{name}_{snapshots.snapshot_suffix(step, width)}"
    rest = {"step": step, "width": width}
    if since is None:
        snapshots.write_snapshot(path, {"a": name}, profile, **rest, branch=branch)
    else:  # as older versions did
        weights = profile.pop("weights")
        facts = json.dumps({**profile, **rest, "since": since})
        checkpoints.write_inference(path, {"a": name}, weights, "fp32", facts)


def test_any_width_of_a_trajectory_is_its_average(tmp_path):
    walk = Walk()
    for step in range(100, 2001, 100):
        for width in (0.05, 0.1):
            average = walk.average(width, step)
            write(tmp_path, "run", step, width, average, int(walk.times[step - 1]), buffer=step)
    for width in (0.04, 0.07, 0.1, 0.15):
        for step in (1000, 2000):
            made = snapshots.reconstruct(tmp_path / "run", width, step)
            error = (made.weights["weight"] - walk.average(width, step)).abs().max()
            assert error / walk.weights.std() < 3e-3, (width, step)
            assert made.error < 0.03
            assert made.step == step
            assert made.weights["num_batches_tracked"] == step  # copied
    assert snapshots.reconstruct(tmp_path, 0.07).step == 2000
    assert made.config == {"a": "run"}


def test_a_stored_width_comes_back_bitwise(tmp_path):
    for step in (1, 2):
        write(tmp_path, "run", step, 0.05, torch.full((5,), step / 3), step)
    made = snapshots.reconstruct(tmp_path / "run_00000001.pth", 0.05)
    assert torch.equal(made.weights["weight"], torch.full((5,), 1 / 3))
    assert made.weights["weight"].dtype == torch.float32
    assert [s.step for s in made.snapshots] == [1]
    assert made.digest != snapshots.reconstruct(tmp_path, 0.05).digest


def test_a_width_that_was_added_later_has_its_own_time(tmp_path):
    def mean(width, began, step):  # of weights that are the number of images so far
        gamma = gamma_of(width)
        return began + (gamma + 1) / (gamma + 2) * (step - began)

    for step in range(100, 2001, 100):
        for width, began in ((0.05, 0), (0.1, 1000)):
            if step > began:
                weight = torch.full((5,), mean(width, began, step))
                write(tmp_path, "run", step, width, weight, step - began, began=began)
    for width, began in ((0.05, 0), (0.1, 1000)):
        made = snapshots.reconstruct(tmp_path / "run", width)
        assert torch.equal(made.weights["weight"], torch.full((5,), mean(width, began, 2000)))
        assert [(s.width, s.step) for s in made.snapshots] == [(width, 2000)]
    # others are of the whole run
    for width, step in ((0.07, 2000), (0.1, 1000)):
        made = snapshots.reconstruct(tmp_path / "run", width, step)
        assert {s.width for s in made.snapshots} == {0.05}
        assert made.weights["weight"][0] == pytest.approx(mean(width, 0, step), rel=0.02)


def test_snapshots_of_a_run_that_was_left_are_not_on_the_way(tmp_path):
    # a run that saved at 5, 10 and 15; one that went on from 5 and saved at 7, 10 and 17
    since = {5: 0, 7: 5, 10: 5, 15: 0, 17: 5}
    assert snapshots.lineage(since, 17) == [5, 7, 10, 17]
    assert snapshots.lineage(since, 15) == [5, 15]
    assert snapshots.lineage({**since, 20: 15}, 20) == [5, 15, 20]
    for step, start in since.items():
        write(tmp_path, "run", step, 0.05, torch.zeros(5), step, since=start, began=int(step == 5))
    # averaging began anew after step 5
    assert [s.step for s in snapshots.find_snapshots(tmp_path)] == [7, 10, 17]


def test_a_run_that_went_back_ends_at_its_latest_checkpoint(tmp_path):
    for step, start, value in ((10, 0, 1), (50, 0, 5), (15, 10, 3)):
        write(tmp_path, "run", step, 0.05, torch.full((5,), value), step, since=start)
    state = tmp_path / "run_state.json"
    state.write_text(json.dumps({"latest_checkpoint": "run_00000015.pth"}))
    made = snapshots.reconstruct(tmp_path, 0.05)
    assert (made.step, made.weights["weight"][0]) == (15, 3)
    assert [s.step for s in snapshots.find_snapshots(tmp_path / "run")] == [10, 15]
    assert snapshots.reconstruct(tmp_path / "run", 0.05, 50).weights["weight"][0] == 5
    # it went on without averages, or from before them
    state.write_text(json.dumps({"latest_checkpoint": "run_00000020.pth"}))
    assert snapshots.reconstruct(tmp_path, 0.05).step == 15
    state.write_text(json.dumps({"latest_checkpoint": "run_00000004.pth"}))
    with pytest.raises(checkpoints.CheckpointError, match="no snapshot of step 4; there are 10"):
        snapshots.reconstruct(tmp_path, 0.05)
    state.unlink()
    assert snapshots.reconstruct(tmp_path, 0.05).step == 50


FIRST, A, B = ("", 0), ("a", 2), ("b", 3)


def test_a_width_that_was_left_out_on_resuming_is_not_taken_from_the_branch_that_was_left(tmp_path):
    # a run of two widths, which went on from step 2 with one of them, and then from 6 with both
    for step in 2, 4, 6:
        for width in 0.05, 0.1:
            write(tmp_path, "run", step, width, torch.zeros(5), step, branch=[FIRST])
    for step in 4, 6:
        write(tmp_path, "run", step, 0.05, torch.ones(5), step, branch=[FIRST, A])
    made = snapshots.reconstruct(tmp_path, 0.1)
    assert made.error > 0
    kept = [(2, 0.05), (2, 0.1), (4, 0.05), (6, 0.05)]
    assert [(s.step, s.width) for s in snapshots.find_snapshots(tmp_path)] == kept
    # also of the checkpoint itself, whichever file was written last
    checkpoint = tmp_path / "run_00000006.pth"
    (tmp_path / "run_00000006_ema0.1.safetensors").touch()
    torch.save({"branch": [FIRST, A]}, checkpoint)
    assert [(s.step, s.width) for s in snapshots.find_snapshots(checkpoint)] == kept
    # it left the averages altogether
    torch.save({"branch": [FIRST, ("c", 2)]}, checkpoint)
    with pytest.raises(checkpoints.CheckpointError, match="no snapshot of step 6; there are 2, 4"):
        snapshots.reconstruct(checkpoint, 0.1)
    (tmp_path / "run_state.json").write_text(json.dumps({"latest_checkpoint": checkpoint.name}))
    assert snapshots.reconstruct(tmp_path, 0.1).step == 2
    # a branch is known where its checkpoint is gone
    write(tmp_path, "run", 8, 0.1, torch.ones(5), 8, branch=[FIRST, A])
    (tmp_path / "run_state.json").unlink()
    assert [s.step for s in snapshots.find_snapshots(tmp_path)] == [2, 2, 4, 6, 8]


def test_a_run_that_went_back_twice_to_one_step(tmp_path):
    for step, branch in ((3, [FIRST]), (5, [FIRST]), (4, [FIRST, B]), (8, [FIRST, B])):
        write(tmp_path, "run", step, 0.05, torch.zeros(5), step, branch=branch)
    assert [s.step for s in snapshots.find_snapshots(tmp_path)] == [3, 4, 8]
    assert [s.step for s in snapshots.find_snapshots(tmp_path, 5)] == [3, 5]
    # a later version goes on where an older one has come by 4 and left 7
    for step, since in ((4, 0), (7, 4), (5, 4)):
        write(tmp_path, "old", step, 0.05, torch.zeros(5), step, since=since)
    write(tmp_path, "old", 9, 0.05, torch.zeros(5), 9, branch=[("c", 5)])
    assert [s.step for s in snapshots.find_snapshots(tmp_path / "old")] == [4, 5, 9]


def test_a_branch_begins_where_snapshots_are_left_behind(tmp_path):
    name = str(tmp_path / "run")
    assert snapshots.branch_of(name, 0, (), resumed=False) == [FIRST]
    assert snapshots.branch_of(name, 100, [FIRST], resumed=False) == [FIRST]
    for step in 3, 5:
        write(tmp_path, "run", step, 0.05, torch.zeros(5), step)
        write(tmp_path, "other", 9, 0.05, torch.zeros(5), step)
    assert snapshots.branch_of(name, 5, [FIRST]) == [FIRST]
    first, second = (snapshots.branch_of(name, 3, [FIRST]) for _ in range(2))
    assert first[0] == second[0] == FIRST
    assert first[1][1] == second[1][1] == 3
    assert first[1][0] != second[1][0]
    assert snapshots.branch_of(name, 5, ()) == [("", 5)]  # from a checkpoint of an older version
    # the snapshots are of another run: it began anew, or goes on from elsewhere
    for step in 0, 100:
        ((token, since),) = snapshots.branch_of(name, step, [FIRST], resumed=False)
        assert token
        assert since == step


def test_what_has_no_snapshots_says_so(tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="no snapshots of averages; train.py"):
        snapshots.find_snapshots(tmp_path / "run")
    for name in "ab":
        write(tmp_path, name, 3, 0.05, torch.zeros(5), 3)
    with pytest.raises(checkpoints.CheckpointError, match="snapshots of a, b; name one"):
        snapshots.find_snapshots(tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match="no snapshot of step 4; there are 3"):
        snapshots.find_snapshots(tmp_path / "a_00000004.pth")
    path = tmp_path / "c_00000003_ema0.05.safetensors"
    checkpoints.write_inference(path, {}, {"w": torch.zeros(2)}, "fp32")
    with pytest.raises(checkpoints.CheckpointError, match="is no snapshot of an average"):
        snapshots.find_snapshots(tmp_path / "c")
    checkpoints.write_inference(path, {}, {"w": torch.zeros(2)}, "fp32", json.dumps({"step": 3}))
    with pytest.raises(checkpoints.CheckpointError, match="is no snapshot of an average"):
        snapshots.find_snapshots(tmp_path / "c")
