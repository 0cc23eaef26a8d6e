from __future__ import annotations

import errno
import threading
from types import SimpleNamespace

import pytest

from tiny import write_image
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.folders.images import list_images
from tinyvit.folders.runner import Existing, FolderWork, Job


class Work(FolderWork):
    """Reads names, computes their lengths, and remembers what it has written."""

    def __init__(self, **states):
        engine = SimpleNamespace(workers=1, ahead=2)
        super().__init__(engine, None, overwrite=False, max_pixels=None)
        self.states, self.opened, self.seen, self.done = states, 0, [], []

    def _plan(self, item):
        item.path.stat()
        state = self.states.get(item.stem, "nothing")
        return Job(item, {}, Existing(state, f"it is {state}"), {"path": item.stem})

    def _read(self, job):
        self.opened += 1
        if job.item.stem == "broken":
            raise ImageError("broken.png is broken")

    def _compute(self, jobs):
        for job in jobs:
            self.seen.append((job.item.stem, self.opened))
            bad = job.item.stem == "bad"
            yield job.failed("of no use") if bad else len(job.item.stem)

    def _write(self, job, length):
        self.done.append(job.item.stem)
        return {"length": length}

    def run(self, items, overwrite=False, workers=1, ahead=2, tell=bool):
        self.overwrite, self.workers, self.ahead = overwrite, workers, ahead
        return super().run(items, tell)


@pytest.fixture
def items(tmp_path):
    def make(*names):
        for name in names:
            write_image(tmp_path / f"{name}.png", 2, 2)
        return list_images([tmp_path])

    return make


def states(outcomes):
    return {one.item.stem: one.state for one in outcomes}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_outcomes_come_in_order_with_facts(items, workers):
    outcomes = list(Work().run(items("a", "bb", "broken", "bad", "ccc"), workers=workers))
    assert states(outcomes) == {
        **{"a": "written", "bad": "failed", "bb": "written", "broken": "failed"},
        "ccc": "written",
    }
    assert list(states(outcomes)) == ["a", "bad", "bb", "broken", "ccc"]
    assert outcomes[0].told == {"path": "a", "length": 1}
    assert outcomes[1].reason.endswith("bad.png: of no use")
    assert outcomes[3].reason == "broken.png is broken"


def test_an_interruption_has_told_all_that_is_done(items):
    """Found by Ctrl-C in a folder: "stopped after 1 of 40 images" with 3 complete ones on disk."""
    work, told = Work(b="current"), []
    compute = work._compute

    def stopped(jobs):
        for number, result in enumerate(compute(jobs)):
            if number == 3:
                raise KeyboardInterrupt
            yield result

    work._compute = stopped
    with pytest.raises(KeyboardInterrupt):
        list(work.run(items("a", "b", "c", "d", "e"), workers=2, tell=told.append))
    assert sorted(one.item.stem for one in told if one.state == "written") == work.done
    assert states(told) == {"b": "skipped", **dict.fromkeys(work.done, "written")}


def test_what_is_there_is_told_first(items):
    work = Work(b="current", c="foreign", d="outdated")
    outcomes = list(work.run(items("a", "b", "c", "d")))
    assert [one.item.stem for one in outcomes] == ["b", "c", "a", "d"]
    assert states(outcomes) == {"b": "skipped", "c": "failed", "a": "written", "d": "written"}
    assert outcomes[0].told == {"path": "b"}
    assert "it is foreign; choose another folder, or --overwrite" in outcomes[1].reason
    assert (outcomes[2].reason, outcomes[3].reason) == ("", "it is outdated")
    again = list(work.run(items("a"), overwrite=True))
    assert set(states(again).values()) == {"written"}
    assert {one.reason for one in again} == {"", "it is outdated"}


def test_nothing_but_broken_images(items):
    assert states(Work().run(items("broken"))) == {"broken": "failed"}
    assert list(Work().run([])) == []


def test_an_image_that_vanishes_or_is_done_meanwhile(items):
    todo = items("a", "b", "c", "d")
    work = Work()
    outcomes = work.run(todo, workers=0)
    first = next(outcomes)
    todo[1].path.unlink()
    work.states["c"] = "current"
    assert states([first, *outcomes]) == {
        **{"a": "written", "b": "failed", "c": "skipped", "d": "written"}
    }
    (gone,) = work.run(todo[1:2])
    assert (gone.item, gone.state) == (todo[1], "failed")
    assert gone.reason == f"{todo[1].path}: No such file or directory"


def test_no_more_is_read_ahead_than_allowed(items):
    work = Work()
    list(work.run(items(*(f"{number:02}" for number in range(12)))))
    assert all(opened <= number + 1 + 2 for number, (_, opened) in enumerate(work.seen))


def test_errors_of_the_disk(items, monkeypatch):
    todo = items("a", "b")
    work = Work()

    def fail(job, length):
        if job.item.stem == "a":
            raise error
        return {}

    monkeypatch.setattr(work, "_write", fail)
    error = OSError(errno.ENAMETOOLONG, "File name too long")  # of one image alone
    (first, second) = work.run(todo)
    assert (first.state, second.state) == ("failed", "written")
    assert "its outputs have too long a name" in first.reason
    caused = CheckpointError("no")
    caused.__cause__ = OSError(errno.EACCES, "no")
    for error in (OSError(errno.ENOSPC, "No space left"), caused):
        with pytest.raises(type(error)):
            list(work.run(todo))


def test_threads_end_when_the_work_is_given_up(items, monkeypatch):
    before = threading.active_count()
    work = Work()
    outcomes = work.run(items(*"abcdef"))
    next(outcomes)
    assert threading.active_count() > before
    outcomes.close()
    assert threading.active_count() == before

    def fail(jobs):
        next(jobs)
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(work, "_compute", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(work.run(items("a")))
    assert threading.active_count() == before
