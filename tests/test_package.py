"""The package as a whole: what importing it costs, and what it finds."""

import importlib
import subprocess
import sys
from importlib.metadata import version

import pytest

import k_diffusion as K


def run(code):
    """Run code in an interpreter of its own; what it prints."""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


def test_importing_imports_nothing_heavy():
    heavy = run(
        "import sys, k_diffusion as K\n"
        "assert K.__version__ and 'sampling' in dir(K)\n"
        "heavy = ['torch', 'numpy', 'torchvision', 'clip', 'open_clip', 'cleanfid', 'skimage',\n"
        "         'scipy', 'accelerate', 'pydantic', 'wandb', 'datasets']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert heavy == "[]"


@pytest.mark.slow
def test_importing_everything_leaves_torch_as_it_was():
    changed = run(
        "import torch, torch._dynamo\n"
        "config = torch._dynamo.config\n"
        "state = lambda: (dict(config.get_config_copy()), torch.is_grad_enabled(),"
        " torch.get_default_dtype())\n"
        "before = state()\n"
        "import k_diffusion as K\n"
        "for name in K._SUBMODULES: getattr(K, name)\n"
        "K.models.image_transformer_v2, K.models.image_v1, K.models.image_transformer_v1\n"
        "print(state() != before)"
    )
    assert changed == "False"


def test_sampling_a_model_needs_no_training_extras():
    shape = run(
        "import sys\n"
        "extras = {'accelerate', 'torchvision', 'datasets', 'cleanfid', 'wandb', 'sklearn',\n"
        "          'matplotlib', 'tensorboard', 'clip', 'open_clip', 'natten', 'flash_attn'}\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in extras:\n"
        "            raise ModuleNotFoundError(f'blocked {name}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import torch, k_diffusion as K\n"
        "for name in set(K._SUBMODULES) - {'training', 'evaluation'}: getattr(K, name)\n"
        "config = K.config.load_config({'model': {'type': 'image_transformer_v2',\n"
        "    'input_channels': 1, 'input_size': 8, 'patch_size': 1, 'depths': [1],\n"
        "    'widths': [16], 'self_attns': [{'type': 'global', 'd_head': 8}],\n"
        "    'mapping_width': 16, 'sigma_sample_density': {'type': 'loguniform'}}})\n"
        "model = K.config.make_denoiser_wrapper(config)(K.config.make_model(config))\n"
        "sigmas = K.sampling.get_sigmas_karras(3, 0.1, 10)\n"
        "with torch.no_grad():\n"
        "    x = K.sampling.sample_dpmpp_2m_sde(model, torch.randn(2, 1, 8, 8), sigmas,\n"
        "                                       disable=True)\n"
        "print(tuple(x.shape))"
    )
    assert shape == "(2, 1, 8, 8)"


@pytest.mark.parametrize("name", K._SUBMODULES)
def test_every_submodule_resolves(name):
    assert getattr(K, name) is importlib.import_module(f"k_diffusion.{name}")
    assert name in dir(K)


@pytest.mark.parametrize("name", [*K.models._MODELS, *K.models._SUBMODULES])
def test_every_model_resolves(name):
    assert getattr(K.models, name).__name__.split(".")[-1] == name
    assert name in dir(K.models)


def test_names_that_do_not_exist_are_attribute_errors():
    for module in (K, K.models):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    assert K.Denoiser is K.layers.Denoiser
    assert version("k-diffusion") == K.__version__ == "0.3.0.dev0"
