"""Which tokens see each other: the geometries of self-attention on an h x w grid.

`backend` forces one of the ways to compute it; None takes the best that can run.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import flops


@dataclass(frozen=True)
class _Heads:
    """What all geometries have: heads of d_head features."""

    d_head: int

    def heads(self, width: int) -> int:
        """The number of heads at a width. Raises ValueError where they don't fit."""
        if width % self.d_head:
            valid = [d for d in range(8, width + 1, 8) if width % d == 0]
            raise ValueError(
                f"width {width} is not a multiple of d_head {self.d_head}; values of d_head that "
                f"divide it: {valid or 'none'}"
            )
        if self.d_head % 8:
            raise ValueError(f"d_head must be a multiple of 8, for axial RoPE, got {self.d_head}")
        return width // self.d_head


@dataclass(frozen=True)
class GlobalAttentionSpec(_Heads):
    """Every token sees every token."""

    backend: str | None = None
    name: ClassVar[str] = "global"

    def describe(self) -> str:
        """For people."""
        return self.name

    def check(self, h: int, w: int) -> None:
        """Any grid will do."""

    def record_flops(self, shape: torch.Size) -> None:
        n, h, w, heads, e = shape
        flops.op(flops.op_attention, *[(n, heads, h * w, e)] * 3)

    def mask(self, h: int, w: int) -> torch.Tensor:
        """Boolean (h * w, h * w): which key (column) each query (row) sees."""
        return torch.ones(h * w, h * w, dtype=torch.bool)


@dataclass(frozen=True)
class NeighborhoodAttentionSpec(_Heads):
    """Each token sees the kernel_size x kernel_size tokens around it (arXiv 2204.07143).

    At the borders the window shifts inward: along each axis of length L, query i sees exactly
    `kernel_size` keys from clamp(i - kernel_size // 2, 0, L - kernel_size) on.
    """

    kernel_size: int
    backend: str | None = None
    name: ClassVar[str] = "neighborhood"

    def describe(self) -> str:
        """For people."""
        return f"neighborhood {self.kernel_size} x {self.kernel_size}"

    def check(self, h: int, w: int) -> None:
        """Raises ValueError if the window is larger than the grid, or not of a size at all."""
        if self.kernel_size < 1:
            raise ValueError(f"kernel_size must be at least 1, got {self.kernel_size}")
        if self.kernel_size > min(h, w):
            raise ValueError(
                f"kernel_size {self.kernel_size} is larger than the {h} x {w} tokens of this "
                f"level; use at most {min(h, w)}, a larger image or global attention"
            )

    def record_flops(self, shape: torch.Size) -> None:
        flops.op(flops.op_natten, shape, shape, shape, self.kernel_size)

    def axis_start(self, length: int) -> torch.Tensor:
        """First key, (length,), that each query of an axis sees."""
        start = torch.arange(length) - self.kernel_size // 2
        return start.clamp(0, length - self.kernel_size)

    def mask(self, h: int, w: int) -> torch.Tensor:
        """Boolean (h * w, h * w): which key (column) each query (row) sees."""

        def axis(length: int) -> torch.Tensor:
            offset = torch.arange(length) - self.axis_start(length)[:, None]
            return (offset >= 0) & (offset < self.kernel_size)

        both = axis(h)[:, None, :, None] & axis(w)[None, :, None, :]
        return both.reshape(h * w, h * w)


@dataclass(frozen=True)
class ShiftedWindowAttentionSpec(_Heads):
    """Tokens see each other within square windows (Swin, arXiv 2103.14030).

    `shift` moves the windows' borders by that many tokens up and left; the windows that this cuts
    at the image's border don't join across it. A level's blocks alternate between 0 and
    window_size // 2.
    """

    window_size: int
    shift: int = 0
    backend: str | None = None
    name: ClassVar[str] = "shifted-window"

    def describe(self) -> str:
        """For people."""
        return f"windows {self.window_size} x {self.window_size}"

    def check(self, h: int, w: int) -> None:
        """Raises ValueError if the windows don't tile the grid, or have no size at all."""
        if self.window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {self.window_size}")
        if h % self.window_size or w % self.window_size:
            valid = [d for d in range(2, min(h, w) + 1) if h % d == 0 and w % d == 0]
            raise ValueError(
                f"window_size {self.window_size} does not divide the {h} x {w} tokens of this "
                f"level; window sizes that do: {valid or 'none but 1'}"
            )

    def record_flops(self, shape: torch.Size) -> None:
        n, h, w, heads, e = shape
        windows = (n * h * w // self.window_size**2, heads, self.window_size**2, e)
        flops.op(flops.op_attention, *[windows] * 3)

    def axis_window(self, length: int) -> torch.Tensor:
        """The window, (length,), that each token of an axis is in."""
        return (torch.arange(length) + self.shift).div(self.window_size, rounding_mode="floor")

    def mask(self, h: int, w: int) -> torch.Tensor:
        """Boolean (h * w, h * w): which key (column) each query (row) sees."""
        rows, cols = self.axis_window(h), self.axis_window(w)
        window = (rows[:, None] * (len(cols) + 1) + cols).flatten()
        return window[:, None] == window


@dataclass(frozen=True)
class NoAttentionSpec:
    """A level of feed-forward blocks alone."""


Geometry = GlobalAttentionSpec | NeighborhoodAttentionSpec | ShiftedWindowAttentionSpec
