"""The documents keep their word: links resolve, commands are the ones that are run, no key is left
out."""

import itertools
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from k_diffusion import external, guidance
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
        ("sample.py", "k_diffusion/scripts/sample.py"),
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


def test_runs_that_differ_have_names_that_differ():
    """Else the second would resume the first."""
    pages = [*PAGES, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks").glob("*.md")]
    runs: dict[str, dict[tuple[str, ...], str]] = {}
    for page in pages:
        text = re.sub(r"\\+\n\s*", " ", page.read_text())  # lines that go on
        for command in re.findall(r"train\.py (--config .*?)(?:`|#|$)", text, re.M):
            words = shlex.split(command)
            flags = dict(itertools.pairwise(words))
            if flags["--config"] == "..." or "--dry-run" in words:
                continue
            sets = sorted(b for a, b in itertools.pairwise(words) if a == "--set")
            name = flags.get("--name", "model")
            runs.setdefault(name, {})[(flags["--config"], *sets)] = f"{page.name}: {command}"
    assert len(runs) > 2
    assert not [list(made.values()) for made in runs.values() if len(made) > 1]


# ------------------------------------------------------------------------------ examples that run


def run_examples(page: str, **names) -> dict:
    """Runs a page's Python blocks one after the other, with these names given."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    assert blocks
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {i + 1}", "exec"), names)
        for name in ("images", "latents"):
            assert name not in names or names[name].isfinite().all(), block
    return names


class Digits(nn.Module):
    """A stand-in for a class-conditional denoiser: its estimate is nearly its class."""

    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    def forward(self, x, sigma, class_cond):
        assert class_cond.shape == sigma.shape == x.shape[:1]
        sigma2 = sigma[:, None, None, None] ** 2
        mean = self.strength * (class_cond[:, None, None, None] / 10 - 0.5)
        return (0.04 * x + sigma2 * mean) / (0.04 + sigma2)


def test_examples_of_guidance():
    torch.manual_seed(0)
    names = run_examples(
        "guidance.md", model=Digits(0.5), weak=Digits(0.3), classes=torch.tensor([3, 7])
    )
    public = {
        name
        for name, kind in vars(guidance).items()
        if isinstance(kind, type) and kind.__module__ == guidance.__name__
    }
    text = (ROOT / "docs" / "guidance.md").read_text()
    assert not [name for name in public - {"Guidance"} if f"{name}(" not in text]
    assert names["images"].abs().max() <= 1  # the last one is thresholded


class Network(nn.Module):
    """A stand-in for a network of x and t, which checks what it gets."""

    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def __init__(self, channels: int = 1, **conditions: tuple[int, ...]):
        super().__init__()
        self.channels, self.conditions = channels, conditions

    def forward(self, x, t, **kwargs):
        assert t.shape == x.shape[:1]
        got = {name: tuple(value.shape[1:]) for name, value in kwargs.items()}
        assert got == self.conditions
        return torch.tanh(x).repeat(1, self.channels, 1, 1)

    def apply_model(self, x, t, cond):
        return self(x, t, cond=cond)


def test_examples_of_wrappers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=10,
    ).eval()
    embeddings = {"encoder_hidden_states": (7, 12)}
    names = run_examples(
        "wrappers.md",
        net=Network(),
        alphas_cumprod=Network.alphas_cumprod,
        ldm=Network(cond=(7, 12)),
        text=torch.randn(2, 7, 12),
        no_text=torch.zeros(1, 7, 12),
        guided_net=Network(2, y=()),
        diffusion=SimpleNamespace(alphas_cumprod=Network.alphas_cumprod.numpy()),
        labels=torch.tensor([3, 7]),
        unet=unet,
        scheduler=diffusers.DDPMScheduler(),
        text_model=external.DiscreteEpsDDPMDenoiser(
            Network(**embeddings), Network.alphas_cumprod, quantize=False
        ),
        karras_net=Network(),
    )
    text = (ROOT / "docs" / "wrappers.md").read_text()
    public = [name for name in vars(external) if name.lower().endswith("denoiser")]
    assert len(public) > 8
    assert not [name for name in public if f"{name}(" not in text]
    assert names["images"].shape == (2, 4, 8, 8)
