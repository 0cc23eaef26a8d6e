"""What a server is made of, without a socket: lanes, cache, adapters' formats, settings."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from conftest import read_brush
from tinyvit.serve import ServeSettings
from tinyvit.serve.adapters.label_studio import brush
from tinyvit.serve.guard import AccessLog
from tinyvit.serve.lanes import FairQueue, Job, Lane
from tinyvit.serve.problems import TITLES, Problem, explain
from tinyvit.serve.schema import pack_logits, unpack_logits

masks = arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12))


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def queue(**changes):
    arguments = {"name": "decode", "per_client": 8, "cap": 100, "max_wait": 20.0, "clock": Clock()}
    return FairQueue(**{**arguments, **changes})


def job(client, **more):
    return Job(client, lambda: client, **more)


@given(masks)
def test_the_brush_is_read_back(mask):
    assert (read_brush(brush(mask), mask.shape) == mask).all()


def test_a_long_brush_is_split():
    mask = np.zeros((300, 400), bool)
    mask[100:280, 3:] = True
    assert (read_brush(brush(mask), mask.shape) == mask).all()
    with pytest.raises(ValueError, match="wanted 4"):
        read_brush(brush(mask), (1, 1))
    with pytest.raises(ValueError, match="ends too early"):
        read_brush(brush(mask)[:12], mask.shape)


@given(arrays.arrays(np.float32, (4, 5), elements=st.floats(-15, 15, width=32)))
def test_logits_keep_their_sign_and_nearly_their_value(logits):
    packed = pack_logits(logits, (32, 40), 4.0, "int8-root")
    again = unpack_logits(packed)
    assert ((again > 0) == (logits >= 0)).all()
    assert np.abs(np.sqrt(np.abs(again)) - np.sqrt(np.abs(logits))).max() <= 1 / 32 + 1e-6
    exact = unpack_logits(pack_logits(logits, (32, 40), 4.0, "float16"))
    np.testing.assert_allclose(exact, logits, rtol=1e-3, atol=1e-4)


def test_clients_take_turns():
    own = queue()
    for client in "aaabbc":
        own.add(job(client))
    assert [own.take()[0].client for _ in range(6)] == list("abcaba")[:6]
    assert own.take() == []


def test_one_client_has_a_bound_and_so_have_all():
    own = queue(per_client=2)
    own.add(job("a"))
    own.add(job("a"))
    with pytest.raises(Problem) as caught:
        own.add(job("a"))
    assert caught.value.name == "too-many-at-once"
    own = queue(cap=1)
    own.add(job("a"))
    with pytest.raises(Problem) as caught:
        own.add(job("b"))
    assert (caught.value.name, caught.value.retry_after) == ("busy", 1)


def test_what_would_wait_too_long_is_refused_with_the_time():
    own = queue(max_wait=5.0)
    own.finished(2.0, 1)
    for client in "abc":
        own.add(job(client))
    times = []
    for client in "defg":
        with pytest.raises(Problem, match="about 6 s") as caught:
            own.add(job(client))
        times.append(caught.value.retry_after)
    assert times == [3, 5, 7, 9]  # each is given a time of its own


def test_a_job_that_waited_too_long_is_answered():
    own = queue(max_wait=5.0)
    late = job("a")
    own.add(late)
    own.clock.now = 6.0
    assert own.take() == []
    assert late.done.exception().name == "busy"


def test_a_client_that_has_gone_is_dropped():
    own = queue()
    gone, stays = job("a"), job("b")
    own.add(gone)
    own.add(stays)
    gone.done.cancel()
    assert own.take() == [stays]


def test_previews_come_last_and_the_newer_replaces_the_older():
    own = queue()
    first, second, click = job("a", is_preview=True), job("a", is_preview=True), job("b")
    for one in (first, second, click):
        own.add(one)
    assert first.done.exception().name == "busy"
    assert own.take() == [click]
    assert own.take() == [second]


def test_equal_keys_are_taken_together():
    own = queue()
    one, two, other, three = (job("a", key=1), job("b", key=1), job("c", key=2), job("d", key=1))
    for each in (one, two, other, three):
        own.add(each)
    assert own.take(2) == [one, two]
    assert own.take(2) == [other]
    assert own.take(2) == [three]


def test_a_lane_works_fails_alone_and_ends():
    begun = threading.Event()
    lane = Lane(queue(clock=time.monotonic), begin=begun.set)
    good = lane.submit("a", lambda: 7)
    bad = lane.submit("a", lambda: 1 / 0)
    after = lane.submit("b", lambda: 8)
    assert good.done.result(5) == 7
    assert isinstance(bad.done.exception(5), ZeroDivisionError)
    assert after.done.result(5) == 8
    assert begun.is_set()
    lane.close()
    lane.join(5)
    with pytest.raises(Problem) as caught:
        lane.submit("a", lambda: 1)
    assert caught.value.name == "draining"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"port": 70_000}, "port must be from 0 to 65535, came 70000"),
        ({"max_wait": 0}, "max_wait must be from 0.1"),
        ({"allow_origins": ("*",)}, "must name origins such as"),
        ({"allow_origins": ("example.org",)}, "an origin is a scheme and a host"),
        ({"token": "short"}, "at least 16 characters"),
        ({"token": "x" * 20, "no_token": True}, "either a token or no_token"),
        ({"adapters": ("cvat",)}, "unknown adapter 'cvat'; known are label-studio"),
        ({"proxy_prefix": "sam"}, "must begin with '/'"),
        ({"log": "xml"}, "log must be 'text' or 'json'"),
    ],
)
def test_wrong_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        ServeSettings(**changes)


HOSTS = [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]


@pytest.mark.parametrize("host, near", [*HOSTS, ("::", False), ("example.org", False)])
def test_a_token_is_made_where_others_reach_the_server(host, near):
    settings = ServeSettings(host=host)
    assert settings.is_loopback == near
    assert (settings.with_token().token is None) == near
    assert ServeSettings(host=host, no_token=True).with_token().token is None
    assert len(ServeSettings(host="0.0.0.0").with_token().token) >= 32


def test_every_problem_explains_itself():
    for name, (status, title) in TITLES.items():
        assert title in explain(name)
        assert Problem(name, "x" * 900).status == status
        assert len(Problem(name, "x" * 900).body("id")) < 900


def test_a_flood_of_one_problem_is_counted_and_lines_cannot_be_forged(caplog):
    caplog.set_level("INFO", "tinyvit.serve")
    clock = Clock()
    log = AccessLog(ServeSettings(), clock)
    state = {"request_id": "a", "client": "x\ny", "facts": {"problem": "busy"}}
    for _ in range(30):
        log.write("GET", "/v1", state, {"status": 503, "received": 0, "sent": 9}, 0.1)
    assert len(caplog.records) == 20
    assert 'client="x\\ny" problem=busy' in caplog.records[0].getMessage()
    clock.now = 1.0
    log.write("GET", "/v1", state, {"status": 503, "received": 0, "sent": 9}, 0.1)
    assert [record.getMessage() for record in caplog.records[20:21]] == ["10 more of busy"]
    assert len(caplog.records) == 22
