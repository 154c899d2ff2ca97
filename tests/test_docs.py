"""The documents keep their word: links resolve, commands are the ones that are run, no key is left
out."""

import re
import shlex
from pathlib import Path

import pytest

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
        ("sample.py", "k_diffusion/sample_cli.py"),
        ("convert_for_inference.py", "convert_for_inference.py"),
    ],
)
def test_readme_flags_exist(script, parser):
    readme = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    source = (ROOT / parser).read_text()
    commands = re.findall(rf"{script} (--?\w.*|\w+_\d+\.\w+.*)$", readme, re.M)
    assert commands
    flags = [w for c in commands for w in shlex.split(c, comments=True) if w.startswith("-")]
    assert not [flag for flag in flags if f'"{flag}"' not in source]
