"""Modules: their size and mode, and the precision of their matrix products."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def n_params(module: nn.Module) -> int:
    """The number of parameters of a module, trainable or not."""
    return sum(p.numel() for p in module.parameters())


@contextmanager
def train_mode(model: nn.Module, mode: bool = True) -> Iterator[nn.Module]:
    """Put a model into training (or, with mode False, evaluation) mode, then restore every module.

    Also a decorator.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.train(mode)
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into evaluation mode, then restore the mode of every module. Also a decorator."""
    with train_mode(model, False):
        yield model


@contextmanager
def tf32_mode(cudnn: bool | None = None, matmul: bool | None = None) -> Iterator[None]:
    """Allow or forbid TF32 on CUDA in convolutions and matrix products; None leaves one alone."""
    with ExitStack() as stack:
        if cudnn is not None:
            stack.enter_context(_tf32(torch.backends.cudnn, ("conv", "rnn"), cudnn))
        if matmul is not None:
            stack.enter_context(_tf32(torch.backends.cuda.matmul, (), matmul))
        yield


@contextmanager
def _tf32(backend: Any, ops: Sequence[str], allow: bool) -> Iterator[None]:
    try:
        saved = [(backend, "allow_tf32", backend.allow_tf32)]
    except RuntimeError:
        # The caller has used PyTorch's newer switches, and then the old one can't be read.
        switches = [getattr(backend, op) for op in ops] or [backend]
        saved = [(switch, "fp32_precision", switch.fp32_precision) for switch in switches]
    backend.allow_tf32 = allow
    try:
        yield
    finally:
        for switch, name, value in saved:
            setattr(switch, name, value)
