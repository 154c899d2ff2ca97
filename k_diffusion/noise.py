"""Noise sources: a seeded Brownian path for SDE samplers, and noise by each image's own seed.

A noise sampler is a function (sigma, sigma_next) -> unit Gaussian noise shaped like x, for the step
between those noise levels. Those here take floats too, so a loop that knows its noise levels on the
host never has to wait for the device (`accepts_floats`).
"""

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Seeds = int | Sequence[int] | Tensor
Device = torch.device | str


def _check_seeds(seeds: Iterable[Any]) -> list[int]:
    try:
        out = [operator.index(s) for s in seeds]
    except TypeError as e:
        raise ValueError(f"seeds must be integers >= 0, one for each image, got {seeds!r}") from e
    if any(s < 0 for s in out):
        raise ValueError(f"seeds must be integers >= 0, got {min(out)}")
    return out


def _one_seed_an_image(seeds: Iterable[Any], n: int) -> list[int]:
    out = _check_seeds(seeds)
    if len(out) != n:
        raise ValueError(
            f"a list of seeds needs one seed for each of the {n} images in x, got {len(out)}"
        )
    return out


def _stream_seed(seed: int, stream: int) -> int:
    """The generator seed of one of the independent streams that belong to an image's seed."""
    if stream == 0:
        return seed
    sequence = np.random.SeedSequence(seed, spawn_key=(stream,))
    return int(sequence.generate_state(1, np.uint64)[0])


def _generators(seeds: Iterable[Any], stream: int, device: Device) -> list[torch.Generator]:
    # Generators take 64 bits; larger seeds wrap, as they do in numpy's and CUDA's.
    return [
        torch.Generator(device).manual_seed(_stream_seed(s, stream) % 2**64)
        for s in _check_seeds(seeds)
    ]


def _draw(generators: Sequence[torch.Generator], shape: Sequence[int], device: Device) -> Tensor:
    # Image by image and in float32: neither the batch nor the dtype may change what a seed draws.
    return torch.stack([torch.randn(tuple(shape), generator=g, device=device) for g in generators])


def ask(
    noise_sampler: Callable[..., Tensor], sigma: float, sigma_next: float, like: Tensor
) -> Tensor:
    """Calls a noise sampler with floats where it takes them, else with 0-d tensors on the CPU.

    like: (...), a tensor with the dtype of the schedule. Others' noise samplers expect tensors;
    reading one on the CPU doesn't wait for the device.
    """
    if getattr(noise_sampler, "accepts_floats", False):
        return noise_sampler(sigma, sigma_next)
    dtype = like.dtype
    return noise_sampler(torch.tensor(sigma, dtype=dtype), torch.tensor(sigma_next, dtype=dtype))


def randn_per_seed(
    seeds: Iterable[int],
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    stream: int = 0,
) -> Tensor:
    """Gaussian noise in which row i depends on seeds[i] alone: an image's initial noise.

    Drawn on the CPU, so all devices agree. Stream 0 is what `torch.Generator().manual_seed(seed)`
    gives; other streams of a seed are independent of it. shape: of one image. Returns
    (len(seeds), *shape). Raises ValueError for a negative seed.
    """
    generators = _generators(seeds, stream, "cpu")
    if not generators:
        return torch.empty((0, *shape), dtype=dtype, device=device)
    return _draw(generators, shape, "cpu").to(device, dtype, non_blocking=True)


class SeededNoiseSampler:
    """Fresh noise for every call; image i's depends on seeds[i] and the call's number alone.

    For ancestral samplers and churn. Its streams differ from the initial noise's (stream 0 of
    `randn_per_seed`). x: (n, ...). device: where to draw; the CPU gives all devices the same noise.
    Raises ValueError unless there is one seed >= 0 for each image.
    """

    accepts_floats = True

    def __init__(self, x: Tensor, seeds: Iterable[int], *, stream: int = 1, device: Device = "cpu"):
        if stream == 0:
            raise ValueError("stream 0 is the initial noise's; pass a stream >= 1")
        self.shape, self.dtype, self.device = x.shape[1:], x.dtype, x.device
        self.draw_device = device
        self.generators = _generators(_one_seed_an_image(seeds, len(x)), stream, device)

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        noise = _draw(self.generators, self.shape, self.draw_device)
        return noise.to(self.device, self.dtype, non_blocking=True)


@dataclass
class _Node:
    """A dyadic interval of the tree: its ends, W at its start, its increment, and its address."""

    start: float
    end: float
    w: Tensor
    dw: Tensor
    key: int
    depth: int


class BatchedBrownianTree:
    """A Brownian path W on [t0, t1] for each image, fixed by its seed, evaluated at any time.

    It is the virtual Brownian tree (Li et al. 2020, arXiv:2001.01328, algorithm 3) with the values
    of `torchsde.BrownianTree(t0, w0, t1, entropy=seed)`: the interval is halved, each midpoint
    drawn from the bridge between its ends, until a time is met to the tolerance. W is evaluated
    once for a time and the last path through the tree is kept, since the next time is likely near.

    x: (n, ...), gives shape, dtype and device. t0, t1: () or floats. seed: one int for a path over
    the whole batch, a list of one int per image for independent paths, None to draw one from
    torch's global generator. Nothing else is drawn before the first call. w0, w1: values at t0 and
    t1 instead of 0 and a draw. tol: resolution in t. Raises ValueError for seeds that don't fit x
    and infinite times.

    tree(ta, tb) returns W(tb) - W(ta), times clamped to the interval; tree(t) returns w0 + W(t).
    """

    # Levels of the last path that are kept: deeper ones are rarely shared, and each costs memory.
    KEPT_LEVELS = 12

    def __init__(
        self, x: Tensor, t0: float | Tensor, t1: float | Tensor, seed: Seeds | None = None, **kwargs
    ):
        self.w0: Tensor | None = kwargs.pop("w0", None)
        self.w1: Tensor | None = kwargs.pop("w1", None)
        tol: float = kwargs.pop("tol", 1e-6)
        self.pool_size: int = kwargs.pop("pool_size", 24)
        # torchsde's tree accepts these two and ignores them.
        kwargs.pop("cache_depth", None), kwargs.pop("safety", None)
        if kwargs:
            raise TypeError(f"BatchedBrownianTree has no option {sorted(kwargs)[0]!r}")
        if not tol > 0:
            raise ValueError(f"tol must be positive, got {tol}")
        t0, t1 = float(t0), float(t1)
        if not (math.isfinite(t0) and math.isfinite(t1)):
            raise ValueError(f"a Brownian path needs a finite interval, got [{t0}, {t1}]")
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, ()))
        elif isinstance(seed, Tensor):
            seed = seed.tolist()
        if isinstance(seed, Iterable):
            self.batched, self.seeds = True, _one_seed_an_image(seed, len(x))
        else:
            self.batched, self.seeds = False, _check_seeds([seed])
        self.sign = 1 if t0 <= t1 else -1
        self.t_min, self.t_max = min(t0, t1), max(t0, t1)
        self.digits = -int(math.log10(tol))
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.work_dtype = torch.promote_types(x.dtype, torch.float32)
        self.path: list[_Node] = []
        self.known: OrderedDict[float, Tensor] = OrderedDict()

    def _normal(self, **spawn: Any) -> Tensor:
        """A draw for each seed, at one address of the tree."""
        shape = self.shape[1:] if self.batched else self.shape
        generator = torch.Generator(self.device)
        draws = []
        for seed in self.seeds:
            sequence = np.random.SeedSequence(seed, pool_size=self.pool_size, **spawn)
            generator.manual_seed(int(sequence.generate_state(1)[0]))
            draws.append(
                torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)
            )
        noise = torch.stack(draws) if self.batched else draws[0]
        return noise.to(self.work_dtype)

    def _root(self) -> _Node:
        if self.w1 is not None:
            w1 = self.w1 if self.w0 is None else self.w1 - self.w0
            dw = w1.to(self.device, self.work_dtype).expand(self.shape)
        else:
            dw = self._normal() * math.sqrt(self.t_max - self.t_min)
        start, end = round(self.t_min, self.digits), round(self.t_max, self.digits)
        return _Node(start, end, torch.zeros_like(dw), dw, 0, 0)

    def _halve(self, node: _Node, mid: float) -> tuple[_Node, _Node]:
        left, right, length = mid - node.start, node.end - mid, node.end - node.start
        noise = self._normal(spawn_key=(node.key, node.depth))
        # Not one fused operation: an image's bits must not depend on its place in the batch.
        dw = node.dw * (left / length) + noise * math.sqrt(left * right / length)
        key, depth = 2 * node.key, node.depth + 1
        return (
            _Node(node.start, mid, node.w, dw, key, depth),
            _Node(mid, node.end, node.w + dw, node.dw - dw, key + 1, depth),
        )

    def _value(self, t: float) -> Tensor:
        """W(t), for t on the grid of the tolerance."""
        if t in self.known:
            self.known.move_to_end(t)
            return self.known[t]
        if not self.path:
            self.path = [self._root()]
        while len(self.path) > 1 and not self.path[-1].start <= t <= self.path[-1].end:
            self.path.pop()
        node = self.path[-1]
        while node.start < t < node.end:
            mid = round(0.5 * (node.end + node.start), self.digits)
            if not node.start < mid < node.end:  # a float's own resolution is met
                break
            left, right = self._halve(node, mid)
            node = left if t <= mid else right
            if node.depth < self.KEPT_LEVELS:
                self.path.append(node)
        value = node.w if t <= node.start else node.w + node.dw
        self.known[t] = value
        if (
            len(self.known) > 4
        ):  # a step asks for three times at most, one of them from the last step
            self.known.popitem(last=False)
        return value

    def clamp(self, t: float | Tensor) -> float:
        """t as a float, moved into the interval: rounding can put it a few ULPs outside.

        t: () or a float.
        """
        return min(max(float(t), self.t_min), self.t_max)

    def __call__(self, ta: float | Tensor, tb: float | Tensor | None = None) -> Tensor:
        """ta, tb: () or floats."""
        if tb is None:
            w = self._value(round(self.clamp(ta), self.digits)).to(self.dtype)
            return w if self.w0 is None else self.w0 + w
        a, b = (self._value(round(self.clamp(t), self.digits)) for t in (ta, tb))
        return ((b - a) * self.sign).to(self.dtype)


def identity(t: Any) -> Any:
    """The default time of a Brownian noise sampler: sigma itself."""
    return t


class BrownianTreeNoiseSampler:
    """Noise for SDE samplers: increments of one Brownian path in sigma, scaled to unit variance.

    The path is fixed by the seed whatever the steps are, so fewer or more steps approximate the
    same image, and noises of nested intervals are correlated as the SDE solvers require.

    x: (n, ...). sigma_min, sigma_max: () or floats, the interval. seed: as in
    BatchedBrownianTree; a list of one int per image makes image i depend on seed[i] alone.
    transform: from sigma to the path's time. Two equal noise levels give zeros.
    """

    accepts_floats = True

    def __init__(
        self,
        x: Tensor,
        sigma_min: float | Tensor,
        sigma_max: float | Tensor,
        seed: Seeds | None = None,
        transform: Callable[[Any], Any] = identity,
    ):
        self.transform = transform
        self.tree = BatchedBrownianTree(x, self._time(sigma_min), self._time(sigma_max), seed)

    def _time(self, sigma: float | Tensor) -> float:
        if self.transform is identity:
            return float(sigma)
        return float(self.transform(torch.as_tensor(sigma)))

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """Unit noise of the interval. sigma, sigma_next: () or floats."""
        ta, tb = (self.tree.clamp(self._time(s)) for s in (sigma, sigma_next))
        if ta == tb:
            return torch.zeros(self.tree.shape, dtype=self.tree.dtype, device=self.tree.device)
        return self.tree(ta, tb) / math.sqrt(abs(tb - ta))
