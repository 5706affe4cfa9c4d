"""Ctrl-C waits for a good moment."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from amago_core import interrupts


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_waits_for_a_check():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.postponed():
        press()
        done.append("the step in progress")
        interrupts.check()
        done.append("never")
    assert done == ["the step in progress"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    interrupts.check()  # forgotten


def test_comes_at_the_end_without_a_check():
    with pytest.raises(KeyboardInterrupt), interrupts.postponed():
        press()


def test_second_press_comes_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.postponed():
        press()
        done.append("once")
        press()
        done.append("twice")
    assert done == ["once"]


def test_what_goes_wrong_inside_is_what_is_raised():
    with pytest.raises(ValueError, match="inside"), interrupts.postponed():
        press()
        raise ValueError("inside")
    interrupts.check()


def test_leaves_a_program_its_own_handling():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("theirs"))
    try:
        with interrupts.postponed():
            press()
            interrupts.check()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["theirs"]


def test_other_threads_have_no_signals():
    entered = []

    def work() -> None:
        with interrupts.postponed(), interrupts.ignored():
            entered.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [signal.default_int_handler]


def test_processes_started_inside_ignore_it():
    code = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    with interrupts.ignored():
        inside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    outside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (inside.stdout, outside.stdout) == ("True\n", "False\n")
