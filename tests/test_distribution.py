"""What the wheel and the source distribution hold, and what one finds who has only the wheel."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes

import pytest
import runs

SCRIPTS = {"train.py", "sample.py", "sample_clip_guided.py", "convert_for_inference.py"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The paths of a wheel and a source distribution of this tree."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    for target in "wheel", "sdist":
        build = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder]
        subprocess.run(build, cwd=runs.ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def tracked():
    """The files that git knows; skips the test outside of a checkout."""
    git = ["git", "ls-files"]
    listed = subprocess.run(git, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or "pyproject.toml" not in listed.stdout:
        pytest.skip("not a checkout of git")
    return set(listed.stdout.split("\n")) - {""}


def test_the_wheel_is_library_code_alone(built):
    names = zipfile.ZipFile(built[0]).namelist()
    package = {name for name in names if name.startswith("k_diffusion/")}
    rest = {name.split("/")[0].rsplit("-", 1)[0] for name in set(names) - package}
    assert len(rest) == 1  # the metadata's folder
    assert {"k_diffusion/py.typed", "k_diffusion/config/schema.json"} < package
    assert package == {name for name in tracked() if name.startswith("k_diffusion/")}


def test_the_sdist_holds_what_is_tracked_and_nothing_else(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        scripts = {m.name.partition("/")[2] for m in archive.getmembers() if m.mode & 0o100}
    assert scripts >= SCRIPTS  # can be run as ./train.py
    assert names - {"PKG-INFO"} == tracked()


def test_the_metadata_has_extras_by_purpose_and_no_relative_link(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        metadata = message_from_bytes(wheel.read(name))
    required = metadata.get_all("Requires-Dist")

    def extra(name):
        found = [r for r in required if re.search(rf"extra == ['\"]{name}['\"]", r)]
        return {re.match(r"[\w-]+", r)[0] for r in found}

    assert extra("train") == {"accelerate", "scikit-learn", "matplotlib"}
    assert not extra("train") & (extra("wandb") | extra("tensorboard") | extra("datasets"))
    for name in metadata.get_all("Provides-Extra"):
        assert extra(name), name
    assert all("://" in url for url in metadata.get_all("Project-URL"))


def test_the_root_scripts_can_be_executed():
    for name in SCRIPTS:
        assert os.access(runs.ROOT / name, os.X_OK), name
        assert (runs.ROOT / name).read_text().startswith("#!/usr/bin/env python3\n"), name
    code, text = runs.run("./train.py", "--help", folder=runs.ROOT, PATH=path_of_this_python())
    assert code == 0, text


def path_of_this_python():
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])


def test_the_package_says_where_the_scripts_are(tmp_path):
    code, text = runs.run(sys.executable, "-m", "k_diffusion", folder=tmp_path)
    assert code == 0
    assert "\n\n" not in text.strip()
    words = " ".join(text.split())
    assert "is a library" in words
    assert "source distribution" in words
    assert all(name in words for name in SCRIPTS)
