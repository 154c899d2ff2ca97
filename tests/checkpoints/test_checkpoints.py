import json
import os
import pickle
import resource
import shutil
import signal
import stat
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import k_diffusion as K
from k_diffusion import checkpoints
from k_diffusion.checkpoints import CheckpointError
from k_diffusion.common import files
from k_diffusion.common.tensors import DTYPES
from k_diffusion.training import run_files


def save(folder, *steps, name="run"):
    state = {"config": {}, "model": {}}
    return [run_files.save_checkpoint(str(folder / name), step, state) for step in steps]


@pytest.mark.parametrize("at", [0, 1, 5000])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, at):
    path = tmp_path / "x.pth"
    files.write_atomically(path, lambda file: file.write(b"old"))

    def crash(file):
        file.write(b"n" * at)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, crash)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    (path,) = save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        files.write_atomically(path, lambda file: (file.write(b"n"), file.flush(), os._exit(9)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert checkpoints.read_checkpoint(path) == {"config": {}, "model": {}}
    assert run_files.find_checkpoints(str(tmp_path / "run")) == [path]
    assert len(list(tmp_path.glob(".*.part"))) == 1
    # as those of older versions were called, and those of a run that goes on
    (tmp_path / ".run_state.json.part").touch()
    (tmp_path / f".run_b_00000001.pth.{'0' * 16}.part").touch()
    run_files.remove_temporaries(str(tmp_path / "run"))
    assert [p.name[:7] for p in tmp_path.glob(".*.part")] == [".run_b_"]
    assert save(tmp_path, 1) == [path]


def test_temporary_files_are_made_never_taken_over(tmp_path, monkeypatch):
    """Whoever guesses their names can't have anything else written into."""
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 16)
    (tmp_path / "precious").write_text("kept")
    part = tmp_path / f".x.{'0' * 16}.part"
    for make in part.symlink_to, part.hardlink_to:
        make(tmp_path / "precious")
        with pytest.raises(FileExistsError):
            files.write_atomically(tmp_path / "x", lambda file: file.write(b"new"))
        assert (tmp_path / "precious").read_text() == "kept"
        part.unlink()


def test_a_file_is_on_disk_before_its_name_and_its_name_before_all_goes_on(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(stat.S_ISDIR(os.fstat(fd).st_mode)), fsync(fd))
    )
    monkeypatch.setattr(
        Path, "replace", lambda path, new: (done.append("named"), replace(path, new))
    )
    files.write_atomically(tmp_path / "x", lambda file: file.write(b"new"))
    assert done == [False, "named", True]


def test_files_get_the_usual_permissions(tmp_path):
    files.write_atomically(tmp_path / "x", lambda file: file.write(b"new"))
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_disk_too_full_is_known_before_writing(tmp_path, monkeypatch):
    (first,) = save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    state = {"config": {}, "model": {"w": torch.zeros(1000), "more": [torch.zeros(1)]}}
    monkeypatch.setattr(torch, "save", None)
    message = r"run_00000002.pth: it takes 4,004 bytes, .* 1,000 free; make space for 3,004 more"
    with pytest.raises(files.DiskFullError, match=message):
        run_files.save_checkpoint(str(tmp_path / "run"), 2, state)
    assert run_files.find_checkpoints(str(tmp_path / "run")) == [first]


def test_a_disk_that_fills_up_while_writing(tmp_path):
    (first,) = save(tmp_path, 1)
    state = {"config": {}, "model": {"w": torch.zeros(100_000)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        message = r"run_00000002.pth: File too large after [\d,]+ bytes of 400,000; make space"
        with pytest.raises(files.DiskFullError, match=message):
            run_files.save_checkpoint(str(tmp_path / "run"), 2, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert run_files.find_checkpoints(str(tmp_path / "run")) == [first]
    assert checkpoints.read_checkpoint(first) == {"config": {}, "model": {}}
    assert list(tmp_path.glob(".*")) == []


def test_no_flipped_bit_is_read_as_if_nothing_were(tmp_path):
    state = {"config": {"a": [1, 2]}, "model": {"w": torch.arange(300.0)}}
    path = tmp_path / "x.pth"
    checkpoints.write_checkpoint(path, state)
    whole, found = path.read_bytes(), 0
    for at in range(0, len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            read = checkpoints.read_checkpoint(path)
        except CheckpointError:
            found += 1
        else:
            assert runs.differences(read, state) == []
    assert found > 0.5 * len(range(0, len(whole), 11))  # the rest is padding


def test_a_flipped_bit_of_a_weight_is_found(tmp_path):
    weights = {"w": torch.arange(3000.0), "scalar": torch.ones(())}
    pth, inference = tmp_path / "x.pth", tmp_path / "x.safetensors"
    checkpoints.write_checkpoint(pth, {"config": {}, "model": weights})
    checkpoints.write_inference(inference, {"a": 1}, weights, "fp32")
    assert runs.differences(checkpoints.read_weights(inference), weights) == []
    for path, read in (pth, checkpoints.read_checkpoint), (inference, checkpoints.read_weights):
        whole = path.read_bytes()
        at = whole.index(torch.arange(3000.0).numpy().tobytes()) + 5001
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
            read(path)
    # and one of the config
    inference.write_bytes(whole.replace(b'\\"a\\": 1', b'\\"a\\": 2'))
    with pytest.raises(CheckpointError, match="have SHA-256"):
        checkpoints.read_weights(inference)


def test_files_of_others_have_no_checksum(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    assert checkpoints.read_weights(tmp_path / "x.safetensors")["w"].sum() == 2


def test_which_checkpoints_are_kept(tmp_path):
    name = str(tmp_path / "run")
    save(tmp_path, 1, 2, 3, 4, 5, 9)
    run_files.prune(name, 5, keep=2, trouble=3)
    # 9 is of a run that was left for an earlier checkpoint
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        f"run_{step:08}.pth" for step in (2, 4, 5, 9)
    ]
    run_files.prune(name, 5, keep=1)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "run_00000005.pth",
        "run_00000009.pth",
    ]


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run_files.save_checkpoint(str(tmp_path / "file" / "run"), 1, {})


def test_reading_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*gone.pth"):
        checkpoints.read_checkpoint(tmp_path / "gone.pth")
    (path,) = save(tmp_path, 3)
    whole = path.read_bytes()
    for n in 0, 1, 100, len(whole) - 1:
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match=r"run_00000003.pth is damaged or truncated"):
            checkpoints.read_checkpoint(path)
    for other in [1, 2], {"model": {}}:
        torch.save(other, path)
        with pytest.raises(CheckpointError, match="no training checkpoint"):
            checkpoints.read_checkpoint(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_checkpoint",)


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": {}, "model": Evil()}, "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil.pth"):
        checkpoints.read_checkpoint("evil.pth")
    (tmp_path / "evil2.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"evil2.pth"):
        checkpoints.read_checkpoint("evil2.pth")
    assert not (tmp_path / "made_by_a_checkpoint").exists()


def test_the_state_file_holds_the_path(tmp_path):
    (path,) = save(tmp_path, 12, name="runs/a")
    assert path == tmp_path / "runs/a_00000012.pth"
    text = (tmp_path / "runs/a_state.json").read_text()
    assert json.loads(text) == {"latest_checkpoint": path.as_posix()}


def test_which_checkpoints_are_tried(tmp_path):
    name = str(tmp_path / "run")
    assert run_files.find_checkpoints(name) == []
    one, two, three = save(tmp_path, 1, 200000000, 3)
    save(tmp_path, 2, name="run_b")
    # the state file names 3: what came after it was left for it
    assert run_files.find_checkpoints(name) == [three, one]
    three.unlink()
    assert run_files.find_checkpoints(name) == [two, one]
    # a path from the working directory, as other versions wrote it
    state = tmp_path / "run_state.json"
    state.write_text(json.dumps({"latest_checkpoint": str(one)}))
    assert run_files.find_checkpoints(name) == [one]
    for text in "", "{}", "[1]":
        state.write_text(text)
        assert run_files.find_checkpoints(name) == [two, one]
    one.unlink(), two.unlink()
    with pytest.raises(CheckpointError, match="names a checkpoint that is gone"):
        run_files.find_checkpoints(name)
    state.unlink()
    assert run_files.find_checkpoints(name) == []


def test_without_the_state_file_all_checkpoints_are_tried(tmp_path):
    name = str(tmp_path / "run")
    one, two = save(tmp_path, 1, 2)
    save(tmp_path, 9, name="run_b")
    (tmp_path / "run_state.json").unlink()
    (tmp_path / "run_b_state.json").unlink()
    assert run_files.find_checkpoints(name) == [two, one]


def test_a_moved_run_is_found(tmp_path):
    save(tmp_path / "a", 1, 2)
    (tmp_path / "a").rename(tmp_path / "b")
    found = run_files.find_checkpoints(str(tmp_path / "b" / "run"))
    assert [p.name for p in found] == ["run_00000002.pth", "run_00000001.pth"]


def test_weights_of_another_architecture():
    model = nn.Linear(3, 2)
    checkpoints.load_weights(model, nn.Linear(3, 2).state_dict(), "x")
    before = model.weight.clone()
    wrong = {"weight": torch.zeros(2, 4), **{f"more.{i}": torch.zeros(1) for i in range(6)}}
    with pytest.raises(CheckpointError) as error:
        checkpoints.load_weights(model, wrong, "x.pth")
    text = str(error.value)
    assert text.startswith("x.pth is of another architecture")
    assert "missing from it: bias" in text
    assert "not in this model: more.0, more.1, more.2, more.3 and 2 more" in text
    assert "of another shape: weight (2, 4) instead of (2, 3)" in text
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_inference_checkpoints(tmp_path, dtype):
    config = runs.tiny_config()
    weights = K.config.make_model(config).state_dict()
    path = tmp_path / "x.safetensors"
    checkpoints.write_inference(path, config, weights, dtype)
    assert json.loads(K.utils.get_safetensors_metadata(path)["config"]) == config
    assert K.config.load_config(path) == config
    read = load_file(path)
    assert read.keys() == weights.keys()
    kept = [k for k in weights if read[k].dtype == torch.float32]
    if dtype == "fp32":
        assert runs.differences(read, dict(weights)) == []
    else:
        # frequencies are constants that angles of thousands of radians come from
        assert {k.rpartition(".")[2] for k in kept} <= {"freqs", "weight"}
        assert {"time_emb.weight", "aug_emb.weight"} <= set(kept)
        want = {k: v if k in kept else v.to(DTYPES[dtype]) for k, v in weights.items()}
        assert runs.differences(read, want) == []


def test_damaged_inference_checkpoints(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.read_weights(path)
    checkpoints.write_inference(path, {}, {"a": torch.zeros(100)}, "fp32")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"x.safetensors is damaged"):
        checkpoints.read_weights(path)


def test_a_transposed_weight_is_of_another_shape():
    model = nn.Linear(3, 2)
    wrong = {"weight": model.weight.detach().T, "bias": model.bias.detach()}
    with pytest.raises(CheckpointError, match=r"shape: weight \(3, 2\) instead of \(2, 3\)"):
        checkpoints.check_weights(model, wrong, "x.pth")
