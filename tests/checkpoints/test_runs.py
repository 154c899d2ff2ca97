import pytest

from k_diffusion import loading
from k_diffusion.checkpoints import CheckpointError, runs
from k_diffusion.training import run_files


@pytest.fixture
def saved(tmp_path):
    """Saves empty checkpoints of a run; returns the last one's path."""

    def saved(name, *steps):
        for step in steps:
            state = {"config": {}, "model": {}}
            path = run_files.save_checkpoint(str(tmp_path / name), step, state)
        return path

    return saved


def test_a_run_is_found_by_its_name_its_folder_and_its_checkpoints(tmp_path, saved):
    latest = saved("own/model", 5, 20)
    first = latest.with_name("model_00000005.pth")
    name = str(tmp_path / "own/model")
    for path in tmp_path / "own", tmp_path / "own/model", first, latest:
        assert runs.find_run(path) == name
    assert runs.find_checkpoint(tmp_path / "own") == latest
    assert runs.find_checkpoint(tmp_path / "own/model") == latest
    assert runs.find_checkpoint(first) == first  # a file is what it is
    flat = saved("own", 7)  # beside the folder, which goes before it
    assert runs.find_checkpoint(tmp_path / "own") == latest
    assert runs.find_run(flat) == str(tmp_path / "own")


def test_a_folder_of_several_runs(tmp_path, saved):
    saved("a", 1), saved("b", 1)
    with pytest.raises(CheckpointError, match="holds 2 runs; name one of .*a, .*b"):
        runs.find_checkpoint(tmp_path)
    assert runs.find_run(tmp_path / "b") == str(tmp_path / "b")


def test_what_is_no_run_stays_as_it_is(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in tmp_path / "empty", tmp_path / "missing", tmp_path / "x.safetensors":
        assert runs.find_checkpoint(path) == path
        assert runs.find_run(path) is None


def test_the_latest_is_what_the_state_file_names(tmp_path, saved):
    saved("a/model", 5, 20)
    back = saved("a/model", 10)
    assert runs.find_checkpoint(tmp_path / "a") == back
    for path in (tmp_path / "a").glob("*.pth"):
        path.unlink()
    with pytest.raises(CheckpointError, match="names a checkpoint that is gone"):
        loading.load_denoiser(tmp_path / "a")
