"""Checkpoints of shards, in a group of one process; tests/training/test_sharding.py has two."""

import errno
import os
import pickle
import shutil
import zipfile
import zlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from k_diffusion import checkpoints
from k_diffusion.common.files import DiskFullError, temporary
from k_diffusion.training import run_files, saving


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.DeviceMesh.from_group(dist.new_group(backend="gloo"), "cpu")
    dist.destroy_process_group()


def weight(mesh, shape=(5, 3), value=0.0):
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(torch.full(shape, value), mesh, [Shard(0)])


@pytest.fixture
def save(tmp_path, mesh):
    """Saves a state of two split weights of a value, and one that isn't; returns its path."""

    def save(step, value):
        split = {"w": weight(mesh, (5, 3), value), "b": weight(mesh, (4,), value)}
        weights = {**split, "steps": torch.tensor(step)}
        state = {"config": {"some": 1}, "model": weights, "model_ema": weights, "step": step}
        return run_files.save_checkpoint(str(tmp_path / "a"), step, state, mesh.get_group())

    return save


def weights(path):
    state = checkpoints.read_checkpoint(path)
    assert state.keys() == {"config", "model", "model_ema", "step"}
    assert state["model"]["w"].shape == (5, 3)
    values = {float(x) for k in ("w", "b") for x in state["model"][k].flatten()}
    assert state["model"]["steps"] == state["step"]
    (value,) = values
    return value


def test_what_is_read_is_what_was_written(save, mesh):
    path = save(1, 2.0)
    assert weights(path) == 2
    assert checkpoints.read_averaged(path)[1]["w"].tolist() == [[2.0] * 3] * 5
    state = checkpoints.read_checkpoint(path, only=("model",))
    assert [state[k]["w"].is_meta for k in ("model", "model_ema")] == [False, True]
    moved = path.rename(path.with_name("best.pth"))
    assert weights(moved) == 2


def test_members_of_enums_by_their_names(save, monkeypatch):
    """As Python 3.11.0 to 3.11.3 pickle them."""

    def by_name(member, protocol):
        return getattr, (type(member), member.name)

    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    path = save(1, 3.0)
    shards = next(path.parent.glob("*.dcp"))
    assert b"getattr" in (shards / ".metadata").read_bytes()
    assert weights(path) == 3


def test_a_step_that_is_saved_again(save, tmp_path):
    """The old shards stay until the new checkpoint is in their checkpoint's place."""
    path = save(1, 1.0)
    again = save(1, 2.0)
    assert again == path
    assert weights(path) == 2
    assert [p.name for p in tmp_path.glob("*.dcp")] == ["a_00000001.2.dcp"]
    run_files.save_checkpoint(str(tmp_path / "a"), 1, {"config": {}, "model": {}})
    assert not list(tmp_path.glob("*.dcp"))


def test_old_checkpoints_go_with_their_shards(save, tmp_path):
    for step in range(1, 4):
        save(step, float(step))
    run_files.prune(str(tmp_path / "a"), 3, keep=1, trouble=2)
    left = {p.name for p in tmp_path.glob("*_0*")}
    assert left == {f"a_0000000{step}.{kind}" for step in (1, 3) for kind in ("pth", "dcp")}


def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(*args, **options):
    raise RuntimeError("unexpected pos")


@pytest.mark.parametrize(
    ("method", "function", "kind", "message"),
    [
        ("write_data", full, DiskFullError, "a_00000001.dcp: No space left on device; make space"),
        ("finish", broken, OSError, "can't write .*a_00000001.dcp: unexpected pos"),
    ],
)
def test_a_save_that_fails_leaves_the_one_before(
    save, tmp_path, monkeypatch, method, function, kind, message
):
    path = save(1, 1.0)
    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, method, function)
        with pytest.raises(kind, match=message):
            save(1, 2.0)
    assert set(tmp_path.iterdir()) == before
    assert weights(path) == 1
    assert run_files.find_checkpoints(str(tmp_path / "a")) == [path]


def test_a_killed_save_is_never_taken_and_is_removed(save, tmp_path):
    path = save(1, 1.0)
    killed = temporary(tmp_path / "a_00000002.dcp")
    shutil.copytree(path.with_suffix(".dcp"), killed)
    shutil.copytree(killed, tmp_path / "a_00000003.dcp")  # before its .pth was written
    name = str(tmp_path / "a")
    assert run_files.find_checkpoints(name) == [path]
    run_files.remove_temporaries(name)
    assert not killed.exists()
    assert weights(path) == 1
    assert weights(save(3, 3.0)) == 3


def cut(folder):
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])


def flip(folder):
    file = folder / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def lose(folder):
    (folder / ".metadata").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "its weights in the folder a_00000001.dcp, which isn't beside it; keep"),
        (cut, "__0_0.distcp is missing, damaged or truncated"),
        (flip, "__0_0.distcp is missing, damaged or truncated"),
        (lose, r"\.metadata is missing, damaged or truncated"),
    ],
)
def test_damage_is_named(save, harm, message):
    path = save(1, 1.0)
    harm(path.with_suffix(".dcp"))
    with pytest.raises(checkpoints.CheckpointError, match=message):
        checkpoints.read_checkpoint(path)


@pytest.mark.parametrize("free", [1, 10**9])
def test_training_waits_where_there_is_no_memory_for_a_copy(
    save, mesh, tmp_path, monkeypatch, free
):
    state = checkpoints.read_checkpoint(save(1, 1.0), like=weight(mesh))
    run = SimpleNamespace(step=0, bad_at=0, trouble=0, state_dict=lambda: state)
    process = SimpleNamespace(is_main_process=True, num_processes=1)
    said, told = [], []
    rest = {"every": 10, "minutes": 1e6, "mesh": mesh}
    monkeypatch.setattr(saving.memory, "available", lambda: free)
    state["power_ema"] = None
    with saving.Saver(process, str(tmp_path / "b"), run, said.append, told.append, **rest) as saver:
        run.step = 1
        saver.save(run)
        assert (saver.writing is None) == (free == 1)
    assert [path.name for path in said] == ["b_00000001.pth"]
    assert ["no memory for a copy" in text for text in told] == ([True] if free == 1 else [])
    assert checkpoints.read_checkpoint(said[0])["model"]["b"].tolist() == [1.0] * 4


class Code:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def of_stranger(path, change):
    """The checkpoint as a stranger may have made it: of a consistent, evil content."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_code_in_the_metadata_is_not_run(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(1, 1.0)
    data = pickle.dumps(Code())
    (path.with_suffix(".dcp") / ".metadata").write_bytes(data)

    def change(state):
        state["shards"]["files"][".metadata"] = len(data), zlib.crc32(data)

    of_stranger(path, change)
    with pytest.raises(checkpoints.CheckpointError, match=r"code \(posix.system\), which isn't"):
        checkpoints.read_checkpoint(path)
    assert not (tmp_path / "harmed").exists()


def test_compressed_shards_are_not_expanded(save):
    path = save(1, 1.0)
    file = path.with_suffix(".dcp") / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    for at in (i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"):
        data[at + 10] = zipfile.ZIP_DEFLATED
    file.write_bytes(data)

    def change(state):
        state["shards"]["files"][file.name] = len(data), zlib.crc32(data)

    of_stranger(path, change)
    with pytest.raises(checkpoints.CheckpointError, match=r"__0_0\.distcp has compressed parts"):
        checkpoints.read_checkpoint(path)


def grow(state):
    state["model"]["w"] = torch.empty(10**9, 10**9, device="meta")


def reshape(state):
    state["model"]["w"] = torch.empty(3, 5, device="meta")


def forget(state):
    del state["shards"]


def climb(state):
    state["shards"]["folder"] = "../a_00000001.dcp"


def drop(state):
    del state["model_ema"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow, "says that it holds more than the files of a_00000001.dcp do"),
        (reshape, r"a_00000001.dcp has no tensor model/w of shape \(3, 5\)"),
        (forget, "doesn't say where their shards are"),
        (climb, "doesn't say where their shards are"),
        (drop, r"is no training checkpoint: it has no \['model_ema'\]"),
    ],
)
def test_a_checkpoint_that_lies(save, change, message):
    path = save(1, 1.0)
    of_stranger(path, change)
    with pytest.raises(checkpoints.CheckpointError, match=message):
        checkpoints.read_checkpoint(path)


def test_pytorchs_own_command_reads_the_folder(save, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = save(1, 2.0)
    dcp_to_torch_save(path.with_suffix(".dcp"), tmp_path / "whole.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert state["model/b"].tolist() == [2.0] * 4
