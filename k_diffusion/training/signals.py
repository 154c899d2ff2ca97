"""Ctrl-C and SIGTERM as a wish to stop after the current step."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import torch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Within it, the first Ctrl-C or SIGTERM sets `number`; the second acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._old: dict[int, Any] = {}
        self._asked: torch.Tensor | None = None

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
        self.number = number
        self._restore()
        # print isn't safe here: the signal may have come in the middle of another one
        os.write(
            2, f"\n{self.name}: saving after this step; press again to exit at once\n".encode()
        )

    def _restore(self) -> None:
        while self._old:
            signal.signal(*self._old.popitem())

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """As a shell reports the signal; 0 without one."""
        return 128 + self.number if self.number else 0

    def agreed(self, accelerator: Any) -> bool:
        """Whether to stop now: as soon as any process was told to, all get the same answer.

        Call it once per step. Among several processes the answer is one step old, so that nobody
        waits for the device.
        """
        if accelerator.num_processes > 1:
            asked, mine = self._asked, torch.tensor([self.number], device=accelerator.device)
            self._asked = accelerator.gather(mine)
            return asked is not None and bool(asked.any())
        return self.number != 0
