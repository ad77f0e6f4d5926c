"""The first SIGINT or SIGTERM ends a block, wherever in the program it comes."""

from __future__ import annotations

import gc
import signal
import sys
import time
import weakref

import pytest

from dora_jax.interrupts import InterruptError, raised

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Thing:
    """What a weak reference can name."""


class Ending:
    def __init__(self, interrupt):
        self.interrupt = interrupt

    def __del__(self):
        self.interrupt()


def while_garbage_is_collected(interrupt):
    def callback(phase, _):
        if phase == "start":
            interrupt()

    gc.callbacks.append(callback)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(callback)


def while_an_object_ends(interrupt):
    Ending(interrupt)


def when_an_object_has_ended(interrupt):
    thing = Thing()
    reference = weakref.ref(thing, lambda _: interrupt())
    del thing
    assert reference() is None


# Python prints what is raised there, and goes on.
PLACES = [while_garbage_is_collected, while_an_object_ends, when_an_object_has_ended]


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_not_lost_where_python_ignores_what_is_raised(number, place, goes_on, capfd):
    before = [*map(signal.getsignal, SIGNALS), sys.unraisablehook]
    ended = []
    with pytest.raises(InterruptError) as error, raised():
        try:
            place(lambda: signal.raise_signal(number))
            time.sleep(5 * goes_on)
        finally:
            ended.append("as it should")
    assert (error.value.status, ended) == (128 + number, ["as it should"])
    assert [*map(signal.getsignal, SIGNALS), sys.unraisablehook] == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", SIGNALS)
def test_an_error_that_a_signal_was_turned_into_is_an_interrupt(number):
    """As pybind11 does: no argument that it can convert."""
    with pytest.raises(InterruptError) as error, raised():
        try:
            signal.raise_signal(number)
            time.sleep(5)
        except InterruptError:
            came = True
        if came:
            raise TypeError("incompatible function arguments")
    assert error.value.status == 128 + number
    assert isinstance(error.value.__cause__, TypeError)
    with pytest.raises(TypeError), raised():
        raise TypeError("no signal came")


def test_what_else_is_raised_there_is_printed_as_ever(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda ignored: printed.append(ignored.exc_value))

    def fail():
        raise ValueError("of another kind")

    with raised():
        while_an_object_ends(fail)
    (error,) = printed
    assert str(error) == "of another kind"
