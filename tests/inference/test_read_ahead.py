from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.inference.read_ahead import choose_workers, read_ahead


def same(value: int) -> int:
    return value


def fail(error: BaseException) -> int:
    raise error


def jobs(number: int) -> list[Callable[[], int]]:
    return [partial(same, i) for i in range(number)]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@given(st.integers(0, 4), st.integers(1, 6), st.integers(0, 12))
def test_results_come_in_order(workers: int, ahead: int, number: int) -> None:
    assert list(read_ahead(jobs(number), workers=workers, ahead=ahead)) == list(range(number))


def test_the_order_is_that_of_the_jobs_and_not_of_their_end() -> None:
    def slow(i: int) -> int:
        time.sleep(0.02 if i % 2 == 0 else 0)
        return i

    slow_jobs = (partial(slow, i) for i in range(8))
    assert list(read_ahead(slow_jobs, workers=4, ahead=4)) == list(range(8))


def test_jobs_are_done_while_the_consumer_is_busy() -> None:
    done = [threading.Event() for _ in range(4)]
    results = read_ahead([event.set for event in done], workers=1, ahead=3)
    next(results)
    assert all(event.wait(10) for event in done[:3])  # nobody has asked for these
    assert not done[3].is_set()
    results.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_no_more_than_the_bound_is_taken_and_in_the_caller_s_thread(workers: int) -> None:
    taken: list[int] = []
    here = threading.get_ident()

    def endless() -> Iterator[Callable[[], int]]:
        while True:
            assert threading.get_ident() == here
            taken.append(len(taken))
            yield partial(same, len(taken) - 1)

    results = read_ahead(endless(), workers=workers, ahead=4)
    assert taken == []
    for i in range(20):
        assert next(results) == i
        assert len(taken) == (i + 1 if workers == 0 else i + 4)
    results.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_in_its_place_and_ends_it(workers: int) -> None:
    many = [*jobs(3), partial(fail, KeyError("third")), *jobs(3)]
    results = read_ahead(many, workers=workers, ahead=7)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="third"):
        next(results)
    assert list(results) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_iterable_comes_in_its_place(workers: int) -> None:
    def broken() -> Iterator[Callable[[], int]]:
        yield from jobs(2)
        raise OSError("the list ends here")

    results = read_ahead(broken(), workers=workers, ahead=8)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="the list ends here"):
        next(results)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(error: type[BaseException]) -> None:
    with pytest.raises(error):
        list(read_ahead([*jobs(1), partial(fail, error())], workers=1, ahead=2))

    def interrupted() -> Iterator[Callable[[], int]]:
        yield from jobs(1)
        raise error

    with pytest.raises(error):
        list(read_ahead(interrupted(), workers=1, ahead=2))


def test_what_comes_after_a_failure_is_not_begun() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def first() -> int:
        gate.wait(10)
        raise ValueError("first")

    results = read_ahead([first, *(partial(begun.append, i) for i in range(5))], workers=1, ahead=6)
    timer = threading.Timer(0.02, gate.set)
    timer.start()
    with pytest.raises(ValueError, match="first"):
        next(results)
    timer.join()
    assert begun == []


def test_a_consumer_that_stops_ends_the_threads_and_what_waits() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def held(i: int) -> None:
        begun.append(i)
        if i:
            gate.wait(10)

    results = read_ahead([partial(held, i) for i in range(9)], workers=1, ahead=5)
    next(results)
    timer = threading.Timer(0.02, gate.set)
    timer.start()
    results.close()
    timer.join()
    assert begun in ([0], [0, 1])


def test_results_are_let_go() -> None:
    class Large:
        pass

    alive: list[weakref.ref[Large]] = []

    def make() -> Large:
        large = Large()
        alive.append(weakref.ref(large))
        return large

    for result in read_ahead([make] * 20, workers=2, ahead=3):
        del result
        assert sum(ref() is not None for ref in list(alive)) <= 5  # ahead, and two being made


def test_wrong_numbers() -> None:
    for workers, ahead in ((-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="workers must be at least 0 and ahead at least 1"):
            next(read_ahead(jobs(1), workers=workers, ahead=ahead))


@pytest.mark.parametrize(("cores", "wanted"), [(1, 1), (2, 2), (3, 3), (4, 4), (8, 4), (None, 1)])
def test_choose_workers(cores: int | None, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert choose_workers() == wanted
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores or 0)), raising=False)
    assert choose_workers() == wanted


def test_threads_give_way_a_little() -> None:
    """At nice 19 they starved behind other programs: two images took more than 380 s."""

    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found = set(read_ahead([priority] * 6, workers=2, ahead=3))
    assert found <= {priority(), priority() + 5}  # the consumer does what no thread has begun


@pytest.mark.parametrize("ahead", [1, 4])
def test_what_no_thread_has_begun_is_done_by_who_waits_for_it(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda pool, job: Future())  # gets no time
    results = read_ahead([threading.get_ident] * 6, workers=1, ahead=ahead)
    assert list(results) == [threading.get_ident()] * 6
