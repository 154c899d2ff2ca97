import shutil
import threading
from types import SimpleNamespace

import pytest
import torch

from k_diffusion.training import run_files, saving
from k_diffusion.training.state import TrainState


class State(SimpleNamespace):
    """Of a run with one weight, whose value is the step."""

    skipped = TrainState.skipped

    def state_dict(self):
        return {"config": {}, "model": {"w": self.weight}, "step": self.step}

    def go(self, steps=1):
        self.step += steps
        self.weight.fill_(self.step)


@pytest.fixture
def state():
    return State(step=0, weight=torch.zeros(3), bad_steps=0, bad_at=0, trouble=0)


@pytest.fixture
def clock(monkeypatch):
    """Of the process, in seconds."""
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(saving.time, "monotonic", lambda: now.time)
    monkeypatch.setattr(saving, "broadcast", lambda value: value)
    return now


def make(state, folder, main=True, **options):
    options = {"every": 10**6, "minutes": 1e6, **options}
    process = SimpleNamespace(is_main_process=main)
    said, told = [], []
    saver = saving.Saver(process, str(folder / "a"), state, said.append, told.append, **options)
    saver.said, saver.told = said, told
    return saver


def weights(path):
    return torch.load(path, weights_only=True)["model"]["w"].tolist()


def test_training_goes_on_while_the_state_of_that_moment_is_written(tmp_path, state, monkeypatch):
    go_on, write = threading.Event(), run_files.write_checkpoint

    def slow(path, values):
        assert go_on.wait(30)
        write(path, values)

    monkeypatch.setattr(run_files, "write_checkpoint", slow)
    with make(state, tmp_path, every=2) as saver:
        state.go(2)
        saver.save(state)
        state.go()
        assert not saver.due(state)
        assert saver.said == []
        go_on.set()
    (path,) = saver.said
    assert weights(path) == [2, 2, 2]
    assert run_files.find_checkpoints(str(tmp_path / "a")) == [path]


def test_an_error_of_the_writer_comes_at_the_next_step_and_nothing_is_saved_after_it(
    tmp_path, state
):
    with make(state, tmp_path) as saver:
        state.go()
        saver.save(state)
        saver.finish()
        (tmp_path / "a_00000002.pth").mkdir()
        state.go()
        saver.save(state)
        saver.writing.exception()
        with pytest.raises(IsADirectoryError):
            saver.due(state)
        state.go()
        saver.save(state)
    assert [p.name for p in saver.said] == ["a_00000001.pth"]
    assert not (tmp_path / "a_00000003.pth").exists()


def test_an_error_of_the_last_writing_comes_on_leaving(tmp_path, state):
    shutil.rmtree(tmp_path)
    tmp_path.touch()
    saver = make(state, tmp_path)
    state.go()
    with pytest.raises(OSError), saver:
        saver.save(state)


def test_nothing_is_saved_before_a_step_nor_twice(tmp_path, state):
    with make(state, tmp_path) as saver:
        saver.save(state)
        state.go()
        saver.save(state)
        saver.save(state)
    assert len(saver.said) == 1


def test_only_the_main_process_writes(tmp_path, state):
    with make(state, tmp_path, main=False) as saver:
        state.go()
        saver.save(state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", [0.5, 7.0, 100.0])
def test_a_run_loses_at_most_so_many_minutes(tmp_path, state, clock, seconds, monkeypatch):
    """By few looks at the clock, each of which several processes have to agree on."""
    looks = []
    monkeypatch.setattr(saving, "broadcast", lambda value: looks.append(value) or value)
    saved = [0.0]
    with make(state, tmp_path, minutes=10) as saver:
        while clock.time < 3600:
            clock.time += seconds
            state.go()
            if saver.due(state):
                saver.save(state)
                saved.append(clock.time)
            assert clock.time - saved[-1] <= 600
    assert len(saved) - 1 == 3600 // (600 // seconds * seconds)
    assert len(looks) <= 12 * len(saved)


def test_trouble_ends_with_a_checkpoint_that_nothing_was_skipped_before(tmp_path, state):
    with make(state, tmp_path, keep=1) as saver:
        for step in range(1, 7):
            state.go()
            if step in (3, 4):
                state.skipped(step)
            saver.save(state)
            saver.finish()
            left = sorted(int(p.stem[2:]) for p in tmp_path.glob("*.pth"))
            assert left == {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [5], 6: [6]}[step]


def no_memory(values):
    raise MemoryError


def torch_has_none(values):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize("copy", [None, no_memory, torch_has_none])
def test_without_memory_for_a_copy_training_waits(tmp_path, state, monkeypatch, copy):
    """Whether it is known before, or comes out in the middle."""
    if copy is None:
        monkeypatch.setattr(saving.memory, "available", lambda: 11)  # of the weight's 12 bytes
    else:
        monkeypatch.setattr(saving, "copy_to_host", copy)
    with make(state, tmp_path) as saver:
        for step in 1, 2:
            state.go()
            saver.save(state)
            assert [p.name for p in saver.said][step - 1 :] == [f"a_{step:08}.pth"]
    assert weights(saver.said[-1]) == [2, 2, 2]
    assert len(saver.told) == 1
    assert "no memory for a copy" in saver.told[0]


def test_a_copy_that_fails_is_no_save(tmp_path, state, monkeypatch):
    def fail(values):
        raise RuntimeError("CUDA error: unspecified launch failure")

    with make(state, tmp_path) as saver:
        state.go()
        with monkeypatch.context() as patch:
            patch.setattr(saving, "copy_to_host", fail)
            with pytest.raises(RuntimeError, match="CUDA error"):
                saver.save(state)
        saver.save(state)
    assert [p.name for p in saver.said] == ["a_00000001.pth"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_said(tmp_path, state, monkeypatch):
    with make(state, tmp_path, keep=1) as saver:
        state.go()
        saver.save(state)
        saver.finish()
        (tmp_path / "a_00000000.pth").mkdir()  # which unlink can't remove
        state.go()
        saver.save(state)
        saver.finish()
        state.go()
        saver.save(state)
    assert [p.name for p in saver.said] == [f"a_0000000{step}.pth" for step in (1, 2, 3)]
    assert len(saver.told) == 2
    assert saver.told[0].startswith("can't delete old checkpoints (")
    assert run_files.find_checkpoints(str(tmp_path / "a"))[0] == saver.said[-1]
