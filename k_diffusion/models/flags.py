"""Switches of the models: gradient checkpointing, compilation, FlashAttention-2, RoPE parity."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint as torch_checkpoint,
    create_selective_checkpoint_contexts,
)

F = TypeVar("F", bound=Callable[..., Any])


def constant_when_compiled(function: F) -> F:
    """Have `torch.compile` call a function as it traces, and take its result for a constant.

    Does what `torch.compiler.assume_constant_result` does, which takes a second to import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


CheckpointingMode: TypeAlias = Literal["off", "full", "selective"]
_checkpointing: ContextVar[CheckpointingMode] = ContextVar(
    "k_diffusion_checkpointing", default="off"
)


@contextmanager
def checkpointing(enable: bool = True, *, keep_attention: bool = False) -> Iterator[None]:
    """Within it, models recompute each block in the backward pass instead of keeping activations.

    keep_attention: keep the outputs of attention, the part that is dear to compute and cheap to
    keep, and recompute the rest. The setting belongs to the thread (or task) that enters it; any
    other starts from off.
    """
    mode: CheckpointingMode = "selective" if keep_attention else "full"
    token = _checkpointing.set(mode if enable else "off")
    try:
        yield
    finally:
        _checkpointing.reset(token)


# Names of the ways, for command lines, as arguments of `checkpointing`.
CHECKPOINTING: dict[str, dict[str, bool]] = {
    "off": {"enable": False},
    "full": {"enable": True},
    "selective": {"enable": True, "keep_attention": True},
}


def get_checkpointing() -> bool:
    """Whether gradient checkpointing is on in this thread."""
    return _checkpointing.get() != "off"


@constant_when_compiled
def _mode() -> CheckpointingMode:
    return _checkpointing.get()


# torch's fused attention, FlashAttention's and NATTEN's kernels, by the names of their operators
_ATTENTION = re.compile(r"scaled_dot_product|flash_attn|natten")


def _keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE
        if _ATTENTION.search(str(op))
        else CheckpointPolicy.PREFER_RECOMPUTE
    )


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_attention)


def checkpoint(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """`function(*args)`, recomputed in the backward pass where `checkpointing` is on.

    Compiled code keeps to what it was when the code was first run.
    """
    mode = _mode()
    if mode == "off" or not torch.is_grad_enabled():
        return function(*args)
    if mode == "selective":
        return torch_checkpoint(function, *args, use_reentrant=False, context_fn=_contexts)
    return torch_checkpoint(function, *args, use_reentrant=False)


def _env_flag(name: str, default: bool) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in {"", "1", "true", "yes", "on", "0", "false", "no", "off"}:
        return default if value == "" else value in {"1", "true", "yes", "on"}
    raise ValueError(f"{name} must be 0 or 1, got {value!r}")


def get_use_compile() -> bool:
    """`K_DIFFUSION_USE_COMPILE` (default 1): whether a requested `torch.compile` is carried out."""
    return _env_flag("K_DIFFUSION_USE_COMPILE", True)


def get_use_flash_attention_2() -> bool:
    """`K_DIFFUSION_USE_FLASH_2` (default 1): whether FlashAttention-2 may be chosen."""
    return _env_flag("K_DIFFUSION_USE_FLASH_2", True)


def get_rope_parity() -> bool:
    """`K_DIFFUSION_ROPE_PARITY` (default 0): RoPE angles in the dtype of q and k.

    k-diffusion 0.1.1 rounded positions to the activations' dtype, which in bf16 moves angles by up
    to 0.1 rad; set this to 1 to reproduce its bits with a checkpoint trained that way.
    """
    return _env_flag("K_DIFFUSION_ROPE_PARITY", False)
