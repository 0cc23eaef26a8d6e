"""A signal as a run hears it, without sending one to the process that runs the tests.

A signal to a worker of pytest-xdist can end the worker; that real signals are heard is tested in
processes of their own.
"""

import signal


def interrupt(number=signal.SIGINT):
    """Call who listens for a signal, as Python does between two instructions."""
    heard_by = signal.getsignal(number)
    assert callable(heard_by), f"nobody listens for {number!r}"
    heard_by(number, None)
