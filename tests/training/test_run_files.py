import json

import pytest
import torch

from k_diffusion import checkpoints
from k_diffusion.common import options
from k_diffusion.training import run_files


def test_a_crash_while_saving_leaves_the_state_file_at_the_checkpoint_before(tmp_path, monkeypatch):
    name = str(tmp_path / "run")
    first = run_files.save_checkpoint(name, 1, {"config": {}, "model": {}})

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        run_files.save_checkpoint(name, 2, {"config": {}, "model": {}})
    state = json.loads(run_files.state_path(name).read_text())
    assert state == {"latest_checkpoint": first.as_posix()}
    assert run_files.find_checkpoints(name) == [first]
    assert checkpoints.read_checkpoint(first) == {"config": {}, "model": {}}


def test_a_folder_of_its_own(tmp_path):
    name = str(tmp_path / "runs/a")
    run_files.check_own_folder(name)  # of a folder that is still to be made
    run_files.save_checkpoint(name, 1, {"config": {}, "model": {}})
    run_files.check_own_folder(name)
    for other in "b_state.json", "a_b_metrics.csv", ".b.lock":
        path = tmp_path / "runs" / other
        path.touch()
        with pytest.raises(options.UsageError, match="holds another run, (b|a_b); pass another"):
            run_files.check_own_folder(name)
        path.unlink()
    (tmp_path / "runs/index.html").touch()
    with pytest.raises(options.UsageError, match=r"an index\.html of something else"):
        run_files.check_own_folder(name)
    (tmp_path / "runs/a_run.json").touch()
    run_files.check_own_folder(name)


def test_a_half_written_page_is_the_runs_where_it_has_a_folder(tmp_path):
    page = tmp_path / ".index.html.0123456789abcdef.part"
    name = str(tmp_path / "a")
    page.touch()
    run_files.remove_temporaries(name)
    assert page.exists()
    (tmp_path / "a_run.json").touch()
    run_files.remove_temporaries(name)
    assert not page.exists()
