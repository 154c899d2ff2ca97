"""k-diffusion: Karras et al. (2022) diffusion models for PyTorch.

`import k_diffusion as K` is cheap: submodules (`K.sampling`, `K.models`, ...) load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0.dev0"

_SUBMODULES = (
    "augmentation",
    "checkpoints",
    "common",
    "conditions",
    "config",
    "data",
    "denoisers",
    "densities",
    "distributed",
    "encoders",
    "evaluation",
    "external",
    "generation",
    "gns",
    "guidance",
    "layers",
    "likelihood",
    "loading",
    "models",
    "noise",
    "sampling",
    "schedules",
    "scripts",
    "solvers",
    "training",
    "utils",
)

# Names of the package itself, and the submodules that hold them.
_NAMES = {
    "Denoiser": "denoisers",
    "editing": "generation",
    "load": "loading",
    "push_to_hub": "generation.pretrained",
    "sample": "generation.pretrained",
    "save_pretrained": "generation.pretrained",
}

if TYPE_CHECKING:
    from . import (  # noqa: F401
        augmentation,
        checkpoints,
        common,
        conditions,
        config,
        data,
        denoisers,
        densities,
        distributed,
        encoders,
        evaluation,
        external,
        generation,
        gns,
        guidance,
        layers,
        likelihood,
        loading,
        models,
        noise,
        sampling,
        schedules,
        scripts,
        solvers,
        training,
        utils,
    )
    from .denoisers import Denoiser
    from .generation import editing
    from .generation.pretrained import push_to_hub, sample, save_pretrained
    from .loading import load

__all__ = [
    "Denoiser",
    "__version__",
    "editing",
    "load",
    "push_to_hub",
    "sample",
    "save_pretrained",
    *_SUBMODULES,
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
