"""What both transformers share: norms, GEGLU, mapping network, attention, parameter tags."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from . import flops
from .attention import Geometry, attend
from .autograd import normalize, rms_norm

M = TypeVar("M", bound=nn.Module)

# ---------------------------------------------------------------- parameter tags


def tag_param(param: nn.Parameter, tag: str) -> nn.Parameter:
    """Add a tag ("wd", "mapping") to a parameter; `filter_params` selects by them."""
    param._tags = {*getattr(param, "_tags", ()), tag}  # type: ignore[attr-defined]
    return param


def _tag(module: nn.Module, tag: str, suffix: str = "") -> None:
    # The tags are kept by the module that owns the parameter: a copy of a parameter loses its
    # attributes, a copy of a module doesn't.
    for owner in module.modules():
        tags = owner.__dict__.setdefault("_param_tags", {})
        for name, _ in owner.named_parameters(recurse=False):
            if name.endswith(suffix):
                tags[name] = {*tags.get(name, ()), tag}


def tag_module(module: M, tag: str) -> M:
    """Add a tag to every parameter of a module."""
    _tag(module, tag)
    return module


def apply_wd(module: M) -> M:
    """Tag a module's weights, not its biases and scales, for weight decay."""
    _tag(module, "wd", suffix="weight")
    return module


def _tagged_params(module: nn.Module) -> Iterator[tuple[nn.Parameter, set[str]]]:
    for path, param in module.named_parameters():
        parent, _, name = path.rpartition(".")
        tags = module.get_submodule(parent).__dict__.get("_param_tags", {}).get(name, ())
        yield param, {*tags, *getattr(param, "_tags", ())}


def filter_params(
    function: Callable[[set[str]], bool], module: nn.Module
) -> Iterator[nn.Parameter]:
    """The parameters of a module whose set of tags satisfies `function`."""
    return (param for param, tags in _tagged_params(module) if function(tags))


def tagged_param_groups(
    module: nn.Module, base_lr: float, mapping_lr_scale: float
) -> list[dict[str, object]]:
    """Four optimizer groups: (main, mapping) x (with, without weight decay)."""
    groups: list[dict[str, object]] = []
    for mapping in (False, True):
        lr = base_lr * mapping_lr_scale if mapping else base_lr
        for wd in (True, False):
            params = [
                param
                for param, tags in _tagged_params(module)
                if ("mapping" in tags, "wd" in tags) == (mapping, wd)
            ]
            groups.append({"params": params, "lr": lr, **({} if wd else {"weight_decay": 0.0})})
    return groups


def zero_init(layer: M) -> M:
    """Set a layer's weight, and bias if it has one, to zero, so that it starts as no change."""
    for param in (layer.weight, getattr(layer, "bias", None)):
        if isinstance(param, torch.Tensor):
            nn.init.zeros_(param)
    return layer


# ---------------------------------------------------------------- layers


class Linear(nn.Linear):
    """`nn.Linear` that `flop_counter` sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features)."""
        flops.op(flops.op_linear, x.shape, self.weight.shape)
        return super().forward(x)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """GEGLU (arXiv 2002.05202): the first half of the last axis times gelu of the second.

    x: (..., 2 d). Returns (..., d).
    """
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class LinearGEGLU(nn.Linear):
    """GEGLU (arXiv 2002.05202): the first half of a linear layer times gelu of the second half.

    (..., in_features) to (..., out_features).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features * 2, bias=bias)
        self.out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features)."""
        flops.op(flops.op_linear, x.shape, self.weight.shape)
        return geglu(F.linear(x, self.weight, self.bias))


class RMSNorm(nn.Module):
    """RMS normalisation (arXiv 1910.07467) over the last axis, with a learned scale of `shape`."""

    def __init__(self, shape: int | tuple[int, ...], eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(shape))

    def extra_repr(self) -> str:
        return f"shape={tuple(self.scale.shape)}, eps={self.eps}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., d)."""
        return rms_norm(x, self.scale, self.eps)


class AdaRMSNorm(nn.Module):
    """RMS normalisation whose scale, 1 + a linear map of `cond`, starts at 1.

    x: (n, ..., features), cond: (n, cond_features).
    """

    def __init__(self, features: int, cond_features: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.linear = apply_wd(zero_init(Linear(cond_features, features, bias=False)))
        tag_module(self.linear, "mapping")

    def extra_repr(self) -> str:
        return f"eps={self.eps}"

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        scale = self.linear(cond) + 1
        return rms_norm(x, scale.view(len(scale), *[1] * (x.ndim - 2), x.shape[-1]), self.eps)


class FeedForwardBlock(nn.Module):
    """Residual GEGLU block with adaptive RMS norm. x: (n, ..., d_model), cond: (n, c)."""

    def __init__(self, d_model: int, d_ff: int, cond_features: int, dropout: float = 0.0):
        super().__init__()
        self.norm = AdaRMSNorm(d_model, cond_features)
        self.up_proj = apply_wd(LinearGEGLU(d_model, d_ff, bias=False))
        self.dropout = nn.Dropout(dropout)
        self.down_proj = apply_wd(zero_init(Linear(d_ff, d_model, bias=False)))

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(self.dropout(self.up_proj(self.norm(x, cond))))


# ---------------------------------------------------------------- mapping network


class MappingFeedForwardBlock(nn.Module):
    """Residual GEGLU block of the mapping network. x: (n, d_model)."""

    def __init__(self, d_model: int, d_ff: int, dropout: float = 0.0):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.up_proj = apply_wd(LinearGEGLU(d_model, d_ff, bias=False))
        self.dropout = nn.Dropout(dropout)
        self.down_proj = apply_wd(zero_init(Linear(d_ff, d_model, bias=False)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(self.dropout(self.up_proj(self.norm(x))))


class MappingNetwork(nn.Module):
    """From the sum of the condition embeddings to what every adaptive norm reads: (n, d_model)."""

    def __init__(self, n_layers: int, d_model: int, d_ff: int, dropout: float = 0.0):
        super().__init__()
        self.in_norm = RMSNorm(d_model)
        self.blocks = nn.ModuleList(
            MappingFeedForwardBlock(d_model, d_ff, dropout=dropout) for _ in range(n_layers)
        )
        self.out_norm = RMSNorm(d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (n, width)."""
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


# ---------------------------------------------------------------- attention's common parts


def scale_for_cosine_sim(
    q: torch.Tensor, k: torch.Tensor, scale: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise q and k so that their dot product is `scale` times their cosine similarity.

    q, k: (..., n_heads, d_head). scale: (n_heads,). Norms are taken in at least float32.
    """
    return normalize(q, scale, eps), normalize(k, scale, eps)


def grid_attention(
    geometry: Geometry, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """`attend` that `flop_counter` sees. q, k, v: (n, h, w, n_heads, d_head). Returns
    (n, h, w, n_heads * d_head)."""
    geometry.record_flops(q.shape)
    return attend(geometry, q, k, v).flatten(-2)


def split_heads(qkv: torch.Tensor, n_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(..., 3 * n_heads * d_head) to q, k and v of (..., n_heads, d_head).

    qkv: (..., 3 * n_heads * d_head).
    """
    q, k, v = qkv.unflatten(-1, (3, n_heads, -1)).unbind(-3)
    return q, k, v


def log_sigma(sigma: torch.Tensor) -> torch.Tensor:
    """log(sigma), finite at 0: there a denoiser's skip connection takes over anyway.

    sigma: (...), any shape.
    """
    return torch.log(sigma.clamp(min=torch.finfo(sigma.dtype).tiny))
