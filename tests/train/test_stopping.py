import signal
import threading

import pytest

from tinyvit.train.loop import hear_signals

from .pressing import interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_a_wish(number):
    before = signal.getsignal(number)
    with hear_signals() as wish:
        assert not wish.is_there
        interrupt(number)
        assert wish.is_there
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), hear_signals():
        interrupt()
        interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_nothing_is_changed():
    found = []

    def look():
        with hear_signals() as wish:
            found.append((signal.getsignal(signal.SIGINT), wish.is_there))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGINT), False)]
