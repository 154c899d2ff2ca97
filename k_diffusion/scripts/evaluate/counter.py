"""How often a model is asked while it samples."""

from typing import Any

from torch import nn


class Counter:
    """Counts a model's evaluations while it is watched."""

    def __init__(self) -> None:
        self.calls = self.batches = 0
        self._handle: Any = None

    def watch(self, model: nn.Module) -> None:
        """Count the calls of the model from now on."""
        self._handle = model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    @property
    def per_image(self) -> int | None:
        """Evaluations for one image."""
        return round(self.calls / self.batches) if self.batches else None

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
