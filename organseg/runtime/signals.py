"""Signals that ask a `fit` to stop (FAULTS.md 6), where processes are started and where Lightning listens too."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from organseg.processes import STOP_SIGNALS

if TYPE_CHECKING:
    import lightning as L


@contextmanager
def held_back() -> Iterator[None]:
    """Processes that are started meanwhile get their signals when they listen: none dies because it came too early."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def keep_handlers(trainer: "L.Trainer") -> None:
    """Let Lightning install none of its own: they save, or wait for other ranks, inside the signal, and exit with 0.

    Nor ask all ranks before each batch whether one of them was called.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
