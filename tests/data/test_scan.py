import os
import pickle
from pathlib import Path

import pytest

from k_diffusion.data import datasets, scan

EXTENSIONS = {".png", ".jpg"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("K_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "_WORTH_KEEPING", 1)
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    """Folders whose names sort otherwise as text than part by part, and more than images."""
    root = tmp_path / "data"
    for name in ("b.png", "a/2.png", "a/1.JPG", "a/deep/0.png", "a-b/3.png", "a/x.txt", "c/no.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "folder.png").mkdir()
    (root / "linked").symlink_to(root / "a")
    (root / "link.png").symlink_to(root / "b.png")
    settle(root)
    return root


def settle(root):
    """As if nothing had changed for a while."""
    for folder in [root, *(p for p in root.rglob("*") if p.is_dir() and not p.is_symlink())]:
        old = folder.stat().st_mtime_ns - 10**10
        os.utime(folder, ns=(old, old))


@pytest.fixture
def listed(monkeypatch):
    """The folders that are listed."""
    seen, listing = [], scan._listed
    monkeypatch.setattr(
        scan, "_listed", lambda path, *rest: seen.append(Path(path).name) or listing(path, *rest)
    )
    return seen


def test_images_are_found_in_the_order_of_paths_and_of_walks(root):
    paths = list(datasets.FolderOfImages(root).paths)
    wanted = [
        path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and not path.is_dir()
    ]
    assert paths == sorted(wanted)
    assert [str(p.relative_to(root)) for p in paths[:4]] == [
        "a/1.JPG", "a/2.png", "a/deep/0.png", "a-b/3.png",
    ]  # fmt: skip
    classes = datasets.FolderOfClasses(root)
    walked = [
        Path(parent, name)
        for folder in sorted(p for p in root.iterdir() if p.is_dir())
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if Path(name).suffix.lower() in EXTENSIONS
    ]
    assert list(classes.paths) == walked
    assert classes.counts == {"a": 3, "a-b": 1, "linked": 3}
    assert classes.empty == ["c", "folder.png"]


def test_paths_are_a_sequence_that_pickles_small(root):
    paths = datasets.FolderOfImages(root).paths
    assert isinstance(paths[0], Path)
    assert list(paths[1:3]) == list(paths)[1:3]
    assert list(paths.take([2, 0])) == [paths[2], paths[0]]
    assert list(pickle.loads(pickle.dumps(paths))) == list(paths)


def test_the_second_time_no_folder_is_listed_but_those_that_changed(root, listed):
    first = scan.images_below(root, EXTENSIONS)
    assert sorted(listed) == ["a", "a-b", "c", "data", "deep", "folder.png"]
    listed.clear()
    assert scan.images_below(root, EXTENSIONS) == first
    assert listed == []
    (root / "a/deep/new.png").write_bytes(b"x")
    (root / "a-b/3.png").rename(root / "a-b/4.png")
    changed = scan.images_below(root, EXTENSIONS)
    assert sorted(listed) == ["a-b", "deep"]
    assert changed == {**first, "a/deep": ["0.png", "new.png"], "a-b": ["4.png"]}
    listed.clear()
    # they changed a moment ago, and might again within the same tick of the clock
    assert scan.images_below(root, EXTENSIONS) == changed
    assert sorted(listed) == ["a-b", "deep"]
    (root / "a/deep/0.png").unlink()
    (root / "a/deep/new.png").unlink()
    (root / "a/deep").rmdir()
    assert "a/deep" not in scan.images_below(root, EXTENSIONS)


def test_links_to_folders_and_other_endings_are_other_scans(root, listed):
    scan.images_below(root, EXTENSIONS)
    listed.clear()
    assert "linked" in scan.images_below(root, EXTENSIONS, follow_links=True)
    assert scan.images_below(root, {".txt"})["a"] == ["x.txt"]
    assert listed.count("a") == 2


def test_a_link_to_a_folder_that_it_is_in_adds_nothing(root, listed):
    first = scan.images_below(root, EXTENSIONS, follow_links=True)
    for place in "a/up", "a/deep/top":
        (root / place).symlink_to(root)
    (root / "a/deep/above").symlink_to("..")
    assert scan.images_below(root, EXTENSIONS, follow_links=True) == first
    assert scan.images_below(root, EXTENSIONS, follow_links=True) == first  # as it was kept


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_memory_is_ignored(root, cache, damage):
    first = scan.images_below(root, EXTENSIONS)
    (kept,) = cache.rglob("*.json")
    content = bytearray(kept.read_bytes())
    if damage == "flipped":
        content[content.index(b"1.JPG")] ^= 1
    kept.write_bytes(
        {"cut": content[:-7], "empty": b"", "other": b"not\xff one"}.get(damage, content)
    )
    assert scan.images_below(root, EXTENSIONS) == first
    assert scan.recall("folders", "nothing") is None


def test_nothing_is_written_beside_the_images_nor_where_it_cannot(root, cache, monkeypatch):
    before = sorted(str(path) for path in root.rglob("*"))
    first = scan.images_below(root, EXTENSIONS)
    assert sorted(str(path) for path in root.rglob("*")) == before
    assert [path.suffix for path in cache.rglob("*.*")] == [".json"]
    (cache / "file").write_text("")
    monkeypatch.setenv("K_DIFFUSION_CACHE", str(cache / "file"))
    assert scan.images_below(root, EXTENSIONS) == first


def test_few_images_are_not_worth_keeping(root, cache, monkeypatch):
    monkeypatch.setattr(scan, "_WORTH_KEEPING", 100)
    scan.images_below(root, EXTENSIONS)
    assert not cache.exists()


def test_images_without_a_text_are_found_by_a_listing_of_each_folder(tmp_path, monkeypatch):
    names = "a.png", "b/a.png", "b/c.d.png", "b/e/a.png"
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").touch()
    data = scan.SizedFiles()
    data.paths = scan.Paths(tmp_path, names)
    assert data.without_caption("txt") == []
    (tmp_path / "b/c.d.txt").rename(tmp_path / "b/c.txt")
    (tmp_path / "a.txt").rename(tmp_path / "a.caption.txt")
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scandir(path))
    assert data.without_caption(".txt") == [str(tmp_path / name) for name in ("a.png", "b/c.d.png")]
    assert len(scanned) == 3
    assert data.without_caption("caption.txt") == [str(tmp_path / name) for name in names[1:]]


def test_a_folder_that_cannot_be_read_is_passed_over(root, monkeypatch):
    listing = scan._listed

    def refuse(path, *rest):
        if path.endswith("deep"):
            raise PermissionError(path)
        return listing(path, *rest)

    monkeypatch.setattr(scan, "_listed", refuse)
    found = scan.images_below(root, EXTENSIONS)
    assert "a/deep" not in found
    assert found["a"] == ["1.JPG", "2.png"]
