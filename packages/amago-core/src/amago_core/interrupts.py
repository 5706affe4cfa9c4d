"""Ctrl-C at a good moment: between two steps, never with a file half open or an answer of a worker under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_requested = False


@contextmanager
def postponed() -> Iterator[None]:
    """Inside, Ctrl-C raises `KeyboardInterrupt` only where `check` is called or at the end; a second one, at once.

    Does nothing outside the main thread, or if the program handles SIGINT in its own way.
    """
    global _requested  # noqa: PLW0603 - a process has one SIGINT
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _note)
    try:
        yield
        check()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _requested = False


def check() -> None:
    """A moment at which a postponed Ctrl-C may stop the program.

    Raises:
        KeyboardInterrupt: if Ctrl-C was pressed inside `postponed`.
    """
    if _requested:
        raise KeyboardInterrupt


@contextmanager
def ignored() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which a terminal sends to them too: whoever started them stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _note(signum: int, frame: FrameType | None) -> None:
    global _requested  # noqa: PLW0603
    if _requested:
        signal.default_int_handler(signum, frame)
    _requested = True
