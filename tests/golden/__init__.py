"""Numbers of the published package, and how to hold models against them."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

PATH = Path(__file__).parent / "golden.safetensors"
SECOND = PATH.with_name("golden_2.safetensors")


def names(path: Path = PATH) -> set[str]:
    """The cases on record."""
    with safe_open(path, "pt") as f:
        return {name.split("/")[0] for name in list(f.keys())} | set(f.metadata() or {})


def load(case: str, path: Path = PATH) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of a case by name, and its JSON part (None if it has none)."""
    with safe_open(path, "pt") as f:
        names = [name for name in list(f.keys()) if name.startswith(f"{case}/")]
        tensors = {name.removeprefix(f"{case}/"): f.get_tensor(name) for name in names}
        return tensors, json.loads((f.metadata() or {}).get(case, "null"))


def normal(seed: int, shape: tuple[int, ...], std: float = 1.0) -> torch.Tensor:
    """Normal noise of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def fill(module: nn.Module) -> nn.Module:
    """Fill a module with weights that depend on the names and shapes of its state dict alone."""
    with torch.no_grad():
        for name, t in sorted(module.state_dict().items()):
            if not t.is_floating_point() or name.endswith(("freqs", "kernel", "sigmas")):
                continue
            first = t.flatten()[0].item()
            base = first if (t == first).all() else 0.0
            t.copy_(base + normal(zlib.crc32(name.encode()), t.shape, 0.05))
    return module


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error, relative to an entry of `want` or to their mean size if that is larger."""
    size = want.abs().clamp(min=want.abs().mean() + 1e-3)
    return ((got - want).abs() / size).max().item()


def same_facts(got: Any, want: Any) -> bool:
    """Whether JSON facts agree; dicts may hold more than wanted, and numbers are rounded."""
    if isinstance(want, dict):
        return all(key in got and same_facts(got[key], value) for key, value in want.items())
    if isinstance(want, list):
        return len(got) == len(want) and all(map(same_facts, got, want))
    if isinstance(want, float):
        return abs(got - want) <= 1e-5 * max(1, abs(want))
    return got == want


def outputs_and_gradients(
    model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, **cond: Any
) -> dict[str, torch.Tensor]:
    """A model's output, and the gradients of a sum of it that no symmetry cancels."""
    x = x.clone().requires_grad_()
    y = model(x, sigma, **cond)
    (y * torch.cos(torch.arange(y.numel()).view(y.shape) * 0.7)).sum().backward()
    params = [p for _, p in sorted(model.named_parameters())]
    norms = [torch.zeros(()) if p.grad is None else p.grad.norm() for p in params]
    return {"y": y.detach(), "dx": x.grad, "dparam_norms": torch.stack(norms)}


def check_model(case: str, model: nn.Module, *args: torch.Tensor, tol: float, **kw: Any) -> None:
    """Hold a model's names, shapes, parameter groups, output and gradients against a case.

    args: x and sigma. The weights are replaced.
    """
    want, facts = load(case)
    fill(model).eval()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == facts["state"]
    assert sum(p.numel() for p in model.parameters()) == facts["n_params"]
    names = {p: n for n, p in model.named_parameters()}
    groups = [
        {**group, "params": sorted(names[p] for p in group["params"])}
        for group in model.param_groups(1e-3)
    ]
    assert groups == facts["groups"]

    got = outputs_and_gradients(model, *args, **kw)
    assert all(error(got[name], want[name]) < tol for name in want)
