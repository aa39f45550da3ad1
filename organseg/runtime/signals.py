"""Signals that ask a `fit` to stop (FAULTS.md 6).

Handlers belong to the process, so there is one request for all of it. The handler sets a flag and nothing else: saving
inside it would catch the optimiser in the middle of a step, and a collective inside it would wait for ranks that know
of no signal. The callbacks that save look at the flag after each step, on all ranks together.

Importing this costs nothing: the command line listens before it imports torch.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from organseg.processes import STOP_SIGNALS

if TYPE_CHECKING:
    import lightning as L


class StopRequest:
    """Remembers that a signal asked to stop; a second one ends the process as if nobody had listened."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self, *numbers: int) -> None:
        """Take these signals, by default all that ask to stop, except what the process was started to ignore."""
        for number in numbers or STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True


STOP = StopRequest()
"""Of this process."""


@contextmanager
def held_back() -> Iterator[None]:
    """Processes that are started meanwhile get their signals when they listen: none dies because it came too early."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def keep_handlers(trainer: "L.Trainer") -> None:
    """Let Lightning install none of its own: they save, or wait for other ranks, inside the signal, and exit with 0."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
