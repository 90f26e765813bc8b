"""Ctrl-C within a block that must be whole waits for its end."""

from __future__ import annotations

import signal
import threading

import pytest

from autofit.interrupts import uninterrupted

pytestmark = pytest.mark.usefixtures("hears_interrupts")


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_waits_for_the_end() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            interrupt()
            done.append("written")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["written"]


def test_none_that_was_not_heard_is_raised() -> None:
    with uninterrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handler_is_restored_also_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), uninterrupted():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_is_heard_also_after_an_error() -> None:
    def work() -> None:
        with uninterrupted():
            interrupt()
            _ = 1 / 0

    with pytest.raises(KeyboardInterrupt) as raised:
        work()
    assert isinstance(raised.value.__context__, ZeroDivisionError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handler_that_was_there_hears_it_once() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    with uninterrupted():
        interrupt()
        interrupt()
        assert heard == []
    assert heard == [signal.SIGINT]


def test_blocks_within_blocks() -> None:
    order = []

    def work() -> None:
        with uninterrupted():
            with uninterrupted():
                interrupt()
            order.append("still inside")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert order == ["still inside"]


def test_who_ignores_interrupts_goes_on_ignoring_them() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_in_another_thread_there_is_nothing_to_hold_back() -> None:
    done: list[str] = []

    def work() -> None:
        with uninterrupted():
            done.append("worked")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["worked"]
