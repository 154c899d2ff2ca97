"""The docs: links resolve, every page runs, every config key is described."""

import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import runs
import torch

from k_diffusion import external, generation, guidance
from k_diffusion.config.schema import json_schema

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text()) + re.findall(
        r'src="([^"]+)"', page.read_text()
    )
    missing = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert not missing


def test_every_config_key_is_described():
    text = (ROOT / "docs" / "config.md").read_text()
    schema = json_schema()
    keys = {
        key
        for section in [schema, *schema["$defs"].values()]
        for key in section.get("properties", {})
    }
    assert len(keys) > 60
    assert not [key for key in keys if f"`{key}`" not in text and f'"{key}"' not in text]


def test_every_config_type_is_described():
    text = (ROOT / "docs" / "config.md").read_text()
    types = {
        name
        for section in json_schema()["$defs"].values()
        for spec in [section.get("properties", {}).get("type", {})]
        for name in [*spec.get("enum", []), *([spec["const"]] if "const" in spec else [])]
    }
    assert len(types) > 20
    assert not [name for name in types if name not in text]


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -e ".[dev]" && pytest' in readme
    assert 'pip install --quiet -e ".[dev]"' in ci
    assert re.search(r"^pytest$", ci, re.M)


@pytest.mark.parametrize(
    ("script", "parser"),
    [
        ("train.py", "k_diffusion/training/args.py"),
        ("sample.py", "k_diffusion/scripts/*.py"),
        ("convert_for_inference.py", "convert_for_inference.py"),
    ],
)
def test_readme_flags_exist(script, parser):
    readme = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    source = "".join(path.read_text() for path in ROOT.glob(parser))
    commands = re.findall(rf"{script} (--?\w.*|\w+_\d+\.\w+.*)$", readme, re.M)
    assert commands
    flags = [w for c in commands for w in shlex.split(c, comments=True) if w.startswith("-")]
    assert not [flag for flag in flags if f'"{flag}"' not in source]


def test_runs_that_differ_have_names_that_differ():
    """Else the second would resume the first."""
    pages = [*PAGES, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks").glob("*.md")]
    runs: dict[str, dict[tuple[str, ...], str]] = {}
    for page in pages:
        text = re.sub(r"\\+\n\s*", " ", page.read_text())  # lines that go on
        for command in re.findall(r"train\.py (--config .*?)(?:`|#|$)", text, re.M):
            words = shlex.split(command)
            flags = dict(itertools.pairwise(words))
            if flags["--config"] in {"...", "CHECKPOINT"} or "--dry-run" in words:
                continue
            sets = sorted(b for a, b in itertools.pairwise(words) if a == "--set")
            name = flags.get("--name", "model")
            runs.setdefault(name, {})[(flags["--config"], *sets)] = f"{page.name}: {command}"
    assert len(runs) > 2
    assert not [list(made.values()) for made in runs.values() if len(made) > 1]


# ------------------------------------------------------------------------------ pages that run

NOT_RUN = "<!-- not run by the tests:"  # the line before a block, with the reason
# Of train.py and sample.py, appended to the command that a page shows.
SMALL = {
    "train": ["--end-step=1", "--sample-n=2", "--batch-size=4", "--num-workers=0"],
    "sample": ["-n=2", "--steps=2", "--device=cpu"],
    "evaluate": ["-n=12", "--steps=2", "--device=cpu", "--resamples=2"],
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """The blocks of Python and shell that the tests run, in order."""
    found = re.findall(r"^([^\n]*)\n```(python|sh)\n(.*?)^```$", page.read_text(), re.S | re.M)
    return [(language, code) for before, language, code in found if not before.startswith(NOT_RUN)]


def run_command(words: list[str], folder: Path, monkeypatch) -> None:
    """Run a command of a page: the scripts in this process, with few steps and images."""
    script = words[1].removesuffix(".py")
    if not words[1].endswith(".py"):
        code, output = runs.run(sys.executable, *words[1:], folder=folder, PYTHONPATH=str(ROOT))
        assert code == 0, output
        return
    runs.call(script, *words[2:], *SMALL.get(script, []), folder=folder, monkeypatch=monkeypatch)
    if script == "train" and "--dry-run" not in words:
        # The page goes on with the files of the last step that it asked for.
        name, end = (words[words.index(flag) + 1] for flag in ("--name", "--end-step"))
        if "--output-dir" in words:
            name = f"{words[words.index('--output-dir') + 1]}/{name}"
        (folder / f"{name}_00000001.pth").rename(folder / f"{name}_{int(end):08}.pth")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small class-conditional model of 8 x 8 digits: what pages call digits_00000600.pth."""
    folder = tmp_path_factory.mktemp("digits")
    config = folder / "tiny.json"
    config.write_text(json.dumps(runs.TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "STEPS", 1)
        words = ["--config", config, "--name", "digits", "--seed", 0, *SMALL["train"]]
        runs.call("train", *words, folder=folder, monkeypatch=patch)
    return folder / "digits_00000001.pth"


PAGES_THAT_RUN = [
    page
    for page in PAGES
    if page.name not in ("CONTRIBUTING.md", "performance.md")  # their commands take minutes
    and blocks(page)
]


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda p: p.name)
def test_page_runs_from_top_to_bottom(page, checkpoint, tmp_path, monkeypatch):
    if page.name == "wrappers.md":
        pytest.importorskip("diffusers")
    if page.name == "conditioning.md":
        pytest.importorskip("transformers")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = "".join(code for language, code in blocks(page) if language == "sh")
    for step in (200, 600):
        if "--name digits " not in commands:  # else the page's run would resume from them
            shutil.copy(checkpoint, tmp_path / f"digits_{step:08}.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "STEPS", 1)
    torch.manual_seed(0)
    names = {"__name__": "page"}
    for i, (language, code) in enumerate(blocks(page)):
        if language == "sh":
            for line in code.replace("\\\n", " ").splitlines():
                run_command(shlex.split(line, comments=True), tmp_path, monkeypatch)
            continue
        exec(compile(code, f"{page.name}, block {i + 1}", "exec"), names)
        for name in ("images", "latents"):
            made = names.get(name)  # K.sample's are PIL images
            assert not isinstance(made, torch.Tensor) or made.isfinite().all(), code


def test_new_pages_are_found():
    names = {page.name for page in PAGES_THAT_RUN}
    assert {"README.md", "ten_minutes.md", "samplers.md", "extending.md", "sample.md"} <= names


@pytest.mark.parametrize(("module", "page"), [(guidance, "guidance.md"), (external, "wrappers.md")])
def test_every_wrapper_has_an_example(module, page):
    text = (ROOT / "docs" / page).read_text()
    public = [name for name in vars(module) if name.endswith("enoiser")]
    assert len(public) > 3
    assert not [name for name in public if f"{name}(" not in text]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [p.name for p in (ROOT / "docs").glob("*.md") if f": {p.name}\n" not in navigation]
