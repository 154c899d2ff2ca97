import os
from pathlib import Path

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
