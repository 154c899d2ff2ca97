"""The models `image_v1`, `image_transformer_v1` and `image_transformer_v2`, and their parts.

`unet` and `transformer` hold the blocks; `attention` computes one operation by many backends.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .compiling import (
    CUDA_GRAPHS as CUDA_GRAPHS,
    UNITS as UNITS,
    compile_model as compile_model,
)
from .flags import checkpointing as checkpointing, get_checkpointing as get_checkpointing

if TYPE_CHECKING:
    from . import (  # noqa: F401
        attention,
        autograd,
        axial_rope,
        compiling,
        embeddings,
        flags,
        flops,
        image_transformer_v1,
        image_transformer_v2,
        image_v1,
        perturbation,
        rope,
        transformer,
        unet,
    )
    from .image_transformer_v1 import ImageTransformerDenoiserModelV1
    from .image_transformer_v2 import ImageTransformerDenoiserModelV2
    from .image_v1 import ImageDenoiserModelV1

_MODELS = {
    "ImageDenoiserModelV1": "image_v1",
    "ImageTransformerDenoiserModelV1": "image_transformer_v1",
    "ImageTransformerDenoiserModelV2": "image_transformer_v2",
}
_SUBMODULES = (
    "attention",
    "autograd",
    "axial_rope",
    "compiling",
    "embeddings",
    "flags",
    "flops",
    "perturbation",
    "rope",
    "transformer",
    "unet",
)

__all__ = [
    "CUDA_GRAPHS",
    "UNITS",
    "ImageDenoiserModelV1",
    "ImageTransformerDenoiserModelV1",
    "ImageTransformerDenoiserModelV2",
    "checkpointing",
    "compile_model",
    "get_checkpointing",
]


def __getattr__(name: str) -> Any:
    if name in _MODELS:
        return getattr(importlib.import_module(f"{__name__}.{_MODELS[name]}"), name)
    if name in _SUBMODULES or name in _MODELS.values():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODELS, *_MODELS.values(), *_SUBMODULES})
