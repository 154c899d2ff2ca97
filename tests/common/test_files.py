import os
from pathlib import Path

import pytest

from k_diffusion.common import files


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut must not leave the name with an empty file."""
    path, events = tmp_path / "x.bin", []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(handle):
        fsync(handle)
        events.append(("synced", os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def record_replace(self, target):
        events.append(("named", self.stat().st_ino, self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    files.write_atomically(path, lambda file: file.write(b"x" * 1000))
    inode = path.stat().st_ino
    assert events[:2] == [("synced", inode, 1000), ("named", inode, 1000)]


def test_a_folder_gets_files_once_all_are_written(tmp_path):
    folder = tmp_path / "made"
    (folder / "below").mkdir(parents=True)
    (folder / "a").write_text("old")
    (folder / "own").write_text("own")
    (folder / "model-00001-of-00001.safetensors").write_text("a part")
    (folder / "model.safetensors.index.json").write_text("of a")
    old = (folder / "a").open()

    def write(part):
        (part / "below").mkdir()
        for name in "a", "below/b":
            (part / name).write_text("new")
        assert (folder / "a").read_text() == "old"

    assert files.write_folder(folder, write) == ["a", "below/b"]
    assert old.read() == "old"
    texts = [(folder / name).read_text() for name in ("a", "below/b", "own")]
    assert texts == ["new", "new", "own"]
    assert not list(folder.glob("model*"))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_that_could_not_be_written_stays(tmp_path):
    def write(part):
        (part / "a").write_text("new")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        files.write_folder(tmp_path / "made", write)
    assert not list(tmp_path.iterdir())


def test_a_location_is_found_by_its_name_last(tmp_path):
    for place in "one/x", "two/far/x":
        (tmp_path / place).mkdir(parents=True)
    folders = tmp_path / "one", tmp_path / "two"
    assert files.find_in(folders, "far/x") == tmp_path / "two/far/x"
    assert files.find_in(folders, "gone/x") == tmp_path / "one/x"
    assert files.find_in(folders, tmp_path / "two/far/x") == tmp_path / "two/far/x"
    assert files.find_in(folders, "y") is None
