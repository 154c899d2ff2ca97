"""Compiling a model whole, or block by block."""

from typing import Any

from torch import nn

from . import flags

UNITS = ("model", "block")
CUDA_GRAPHS = "reduce-overhead"  # the mode of torch.compile that makes them


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model is compiled by, and split by over several devices."""
    return [m for m in model.modules() if getattr(m, "compile_unit", False)]


def compile_model(model: nn.Module, unit: str = "model", **options: Any) -> nn.Module:
    """Compile a model in place, names of its parameters unchanged, and return it.

    unit: "model" makes one graph of all of it, which runs fastest. "block" compiles its blocks, of
    which equal ones (of the same level, say) share their code, so that the time it takes depends on
    the number of levels and not on the depth. options: of `torch.compile`. For "block" it raises
    `torch._dynamo.config.recompile_limit` to make room for all of a model's different blocks.

    Does nothing with K_DIFFUSION_USE_COMPILE=0. Raises ValueError for another unit.
    """
    if unit not in UNITS:
        raise ValueError(f"a model is compiled by one of {', '.join(UNITS)}; got {unit!r}")
    if not flags.get_use_compile():
        return model
    if unit == "model":
        model.compile(**options)
        return model
    found = blocks(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks to compile; compile it whole")
    import torch._dynamo.config as dynamo

    # a graph each for training, for sampling and for another batch size
    dynamo.recompile_limit = max(dynamo.recompile_limit, 3 * len(found))
    for block in found:
        block.compile(**options)
    return model
