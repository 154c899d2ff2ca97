"""Signals as wishes: to save and leave after the current step, or to save and go on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

import torch

from ..common.launcher import LAUNCHED

# Windows has no SIGHUP and no SIGUSR1.
_LEAVE = signal.SIGINT, signal.SIGTERM
_HANGUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
_SAVE = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()
_SHIFT = 8  # room for a signal's number


class StopSignal:
    """Within it, Ctrl-C, SIGTERM and SIGHUP set `number`; SIGUSR1 asks for a save.

    A second Ctrl-C, SIGTERM or SIGHUP leaves at once, or when the save it came in is done. Under a
    launcher it does nothing: launchers repeat what they were sent. SIGHUP stays ignored where it
    was, as under nohup, but torchrun's is never: it stops its processes on SIGHUP even so.

    number: of the signal that asks to leave, or 0. save_agreed: whether to save in this step.
    """

    def __init__(self, launched: bool = LAUNCHED) -> None:
        self.number = 0
        self.save_agreed = False
        self._launched = launched
        self._save = self._saving = self._insisted = False
        self._old: dict[int, Any] = {}
        self._asked: torch.Tensor | None = None

    def __enter__(self) -> "StopSignal":
        for number in (*_LEAVE, *_SAVE, *_HANGUP):
            if number in _LEAVE or signal.getsignal(number) != signal.SIG_IGN or _in_torchrun():
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
        name = signal.Signals(number).name
        if number in _SAVE:
            self._save = True
            _tell(f"{name}: saving after this step")
        elif not self.number:
            self.number = number
            again = "" if self._launched else "; press again to exit at once"
            _tell(f"{name}: saving after this step{again}")
        elif self._launched or self._insisted:
            pass
        elif self._saving:
            self._insisted = True
            _tell(f"{name}: leaving as soon as this save is done")
        else:
            self._restore()
            raise SystemExit(128 + number)

    def _restore(self) -> None:
        while self._old:
            signal.signal(*self._old.popitem())

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save, which a second signal lets finish, and then leaves."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False
        if self._insisted:
            raise SystemExit(self.exit_code)

    @property
    def exit_code(self) -> int:
        """As a shell reports the signal; 0 without one."""
        return 128 + self.number if self.number else 0

    def asked(self) -> bool:
        """Whether this process was told to leave: what takes longer than a step looks here."""
        return self.number != 0

    def agreed(self, accelerator: Any) -> bool:
        """Whether to leave now: as soon as any process was told to, all get the same answer.

        The same holds for `save_agreed`. Call it once per step. Among several processes the answer
        is one step old, so that nobody waits for the device.
        """
        number, save = self.number, self._save
        if save:
            self._save = False
        if accelerator.num_processes > 1:
            before, mine = self._asked, number | save << _SHIFT
            self._asked = accelerator.gather(torch.tensor([mine], device=accelerator.device))
            wishes = [] if before is None else before.tolist()
            number = max((wish % (1 << _SHIFT) for wish in wishes), default=0)
            save = any(wish >> _SHIFT for wish in wishes)
        self.number = number or self.number
        self.save_agreed = save
        return number != 0


def _in_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _tell(text: str) -> None:
    # print isn't safe here: the signal may have come in the middle of another one
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
