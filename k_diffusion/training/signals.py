"""Ctrl-C and SIGTERM as a wish to stop after the current step."""

import signal
from types import FrameType, TracebackType
from typing import Any

import torch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGREE_EVERY = 10


class StopSignal:
    """Within it, the first Ctrl-C or SIGTERM sets `requested`; the second acts as usual."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in _SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._old:
            signal.signal(*self._old.popitem())

    def agreed(self, accelerator: Any, step: int) -> bool:
        """Whether to stop after this step; all processes get the same answer."""
        if accelerator.num_processes == 1:
            return self.requested is not None
        if step % _AGREE_EVERY:
            return False
        flag = torch.tensor(float(self.requested is not None), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item())
