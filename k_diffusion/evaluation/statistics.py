"""Mean and covariance of features that come batch by batch, on one process or several."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.files import write_atomically
from ..common.tensors import in_float64

_ROWS, _COLUMNS = 2048, 256


class FeatureStatistics:
    """Mean and covariance of features in float64, updated by batches; memory doesn't grow with n.

    width: of the features. protocol: how they were made, "" where unknown; statistics of two
    protocols aren't merged or compared. n: samples so far, None where a file didn't say. mean:
    (width,). The update is Chan et al.'s, exact for any shift of the features.
    """

    def __init__(self, width: int, protocol: str = "", device: torch.device | str = "cpu"):
        self.protocol = protocol
        self.n: int | None = 0
        self.mean = in_float64(torch.zeros(width, device=device))
        self._scatter = self.mean.new_zeros(width, width)  # its upper blocks

    @classmethod
    def from_moments(
        cls, mean: Tensor, covariance: Tensor, n: int | None = None, protocol: str = ""
    ) -> "FeatureStatistics":
        """Statistics that are known.

        mean: (width,). covariance: (width, width), with the divisor n - 1. Raises ValueError for
        other shapes, NaN, or infinity.
        """
        d = mean.numel()
        if mean.shape != (d,) or covariance.shape != (d, d) or not d:
            raise ValueError(
                "statistics are a mean (d,) and a covariance (d, d), got shapes "
                f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("these statistics hold NaN or infinity; compute them again")
        out = cls(0, protocol)
        out.n, out.mean = n, in_float64(mean)
        out._scatter = in_float64(covariance) * out._divisor
        return out

    @property
    def width(self) -> int:
        """The features' width."""
        return self.mean.numel()

    @property
    def _divisor(self) -> int:
        return 1 if self.n is None else max(self.n - 1, 1)

    @property
    def covariance(self) -> Tensor:
        """The covariance (width, width), with the divisor n - 1."""
        upper = self._scatter.triu()
        return upper.add_(upper.triu(1).mT).div_(self._divisor)

    def update(self, features: Tensor) -> "FeatureStatistics":
        """Take in a batch of features (n, width); returns self.

        Raises ValueError for another width, NaN or infinity.
        """
        features = check_features("features", features.detach())
        if features.shape[1] != self.width:
            raise ValueError(
                f"these are statistics of features of width {self.width}{_of(self.protocol)}, got "
                f"features of width {features.shape[1]}; use one encoder for both"
            )
        for rows in features.split(_ROWS):
            rows = in_float64(rows).to(self.mean.device)
            mean = rows.mean(0)
            rows = rows - mean
            # one of two triangles, by blocks: little more than half of the products
            for i in range(0, self.width, _COLUMNS):
                block = self._scatter[i : i + _COLUMNS, i:]
                block.addmm_(rows[:, i : i + _COLUMNS].mT, rows[:, i:])
            self._join(len(rows), mean)
        return self

    def _join(self, n: int, mean: Tensor) -> None:
        """Count n more samples of a mean (width,), whose scatter around it is in already."""
        if self.n is None:
            raise ValueError(
                "statistics from a file that doesn't say their n can't be added to; compute them "
                "from the images"
            )
        shift = mean - self.mean
        total = self.n + n
        if total:
            self._scatter.addr_(shift, shift, alpha=self.n * n / total)
            self.mean = self.mean + shift * (n / total)
        self.n = total

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Take in the samples of other statistics; returns self.

        Raises ValueError for another width or protocol, or where one of the two has no n.
        """
        check_alike(self, other)
        if other.n is None:
            raise ValueError("statistics from a file that doesn't say their n can't be merged")
        self._join(other.n, other.mean.to(self.mean.device))
        self._scatter += other._scatter.to(self.mean.device)
        return self

    def merged(self, accelerator: Any) -> "FeatureStatistics":
        """The statistics of all processes together, on each of them; all call this."""
        n = torch.tensor(float(self.n or 0), dtype=torch.float64, device=self.mean.device)
        total = accelerator.reduce(n, reduction="sum")
        mean = accelerator.reduce(n * self.mean, reduction="sum") / total.clamp(min=1)
        shift = self.mean - mean
        out = FeatureStatistics(self.width, self.protocol, self.mean.device)
        mine = self._scatter + n * torch.outer(shift, shift)
        out.n, out.mean = round(float(total)), mean
        out._scatter = accelerator.reduce(mine, reduction="sum")
        return out

    def save(self, path: Path) -> None:
        """Write an .npz of mu and sigma, as EDM's tools do, with n and protocol beside them."""
        arrays: dict[str, Any] = {} if self.n is None else {"n": self.n}
        arrays |= {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy()}
        write_atomically(path, lambda file: np.savez(file, protocol=self.protocol, **arrays))

    @classmethod
    def load(cls, path: Path) -> "FeatureStatistics":
        """Read what `save` wrote; `references.read_reference` reads other tools' files as well."""
        with np.load(path, allow_pickle=False) as file:
            return cls.from_moments(
                torch.from_numpy(file["mu"]),
                torch.from_numpy(file["sigma"]),
                int(file["n"]) if "n" in file else None,
                str(file["protocol"]) if "protocol" in file else "",
            )


def _of(protocol: str) -> str:
    return f" of the protocol {protocol}" if protocol else ""


def check_features(name: str, x: Tensor) -> Tensor:
    """Features x, (n, width). Raises ValueError for another shape, NaN or infinity."""
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"{name} must have shape (n, width), got {tuple(x.shape)}")
    if x.numel() and not torch.stack(x.aminmax()).isfinite().all():  # without a mask of x's size
        raise ValueError(f"{name} hold NaN or infinity; look for such images")
    return x


def check_alike(a: Any, b: Any) -> None:
    """Raises ValueError unless two sets, features (n, width) or statistics, can be compared."""
    width_a, width_b = (
        s.width if isinstance(s, FeatureStatistics) else s.shape[-1] for s in (a, b)
    )
    protocol_a, protocol_b = getattr(a, "protocol", ""), getattr(b, "protocol", "")
    if width_a != width_b:
        raise ValueError(
            f"features of width {width_a}{_of(protocol_a)} can't be compared with features of "
            f"width {width_b}{_of(protocol_b)}; use one encoder for both"
        )
    if protocol_a and protocol_b and protocol_a != protocol_b:
        raise ValueError(
            f"features of the protocol {protocol_a} can't be compared with features of the "
            f"protocol {protocol_b}; use one protocol for both"
        )
