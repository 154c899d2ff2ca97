import json

import pytest
import torch

from k_diffusion import checkpoints
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
