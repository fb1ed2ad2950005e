"""leanserve.worker.admission: who is at work, who waits and who is refused; in one worker."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
import ssl
from collections.abc import Hashable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import Certificates
from leanserve.asgi.cancellation import CANCELLATION
from leanserve.settings import AdmissionSettings
from leanserve.tokens import Tokens
from leanserve.worker import admission as module
from leanserve.worker.admission import Admission, overloaded
from leanserve.worker.queue import FairQueue
from leanserve.worker.slots import PoolSlots, Slots, SoleSlots
from leanserve.worker.worker import Worker
from served import CLOSING_GET, GET, Client, eventually, fetch, run, serving, tls_client


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def turns() -> None:
    """Enough for whatever does not wait for something outside."""
    for _ in range(6):
        await asyncio.sleep(0)


# Without sockets


class Request:
    """One exchange, as far as admission knows it."""

    def __init__(self, guarded: Any, scope: dict[str, Any]) -> None:
        self.begun = False
        self.go_on = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        scope = {**scope, "request": self}
        self.task = asyncio.get_running_loop().create_task(guarded(scope, None, self.send))

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def refused(self) -> bool:
        return bool(self.sent)

    @property
    def at_work(self) -> bool:
        return self.begun and not self.task.done()

    @property
    def waits(self) -> bool:
        return not self.begun and not self.task.done()

    @property
    def retry_after(self) -> int:
        return int(dict(self.sent[0]["headers"])[b"retry-after"])


async def app(scope: Any, receive: Any, send: Any) -> None:
    """At work until it is told to go on."""
    scope["request"].begun = True
    await scope["request"].go_on.wait()
    if scope["request"].sent == ["raise"]:
        raise LookupError("of the application")


class Crowd:
    """Requests in front of one Admission."""

    def __init__(self, slots: Slots, places: Slots, **flat: Any) -> None:
        facts = {"max_concurrent_requests": slots.limit, "max_queue": places.limit, **flat}
        extra = {name: facts.pop(name) for name in ("root_path",) if name in facts}
        self.admission = Admission(AdmissionSettings(**facts), slots, places, **extra)
        self.requests: list[Request] = []
        self._guarded = self.admission.guard(app)

    def arrive(
        self, client: str = "a", path: str = "/", kind: str = "http", headers: Any = (), **limits: float
    ) -> Request:
        scope = {"type": kind, "path": path, "client": (client, 1), "headers": headers}
        scope["extensions"] = {CANCELLATION: limits}
        self.requests.append(Request(self._guarded, scope))
        return self.requests[-1]

    async def arrived(self, *clients: str) -> list[Request]:
        found = [self.arrive(client) for client in clients]
        await turns()
        return found

    def count(self, what: str) -> int:
        return sum(getattr(request, what) for request in self.requests)

    async def end(self) -> None:
        """All go on, and nothing is left."""
        for request in self.requests:
            request.go_on.set()
        await asyncio.gather(*(request.task for request in self.requests), return_exceptions=True)
        assert not self.admission._queue
        assert not self.admission._waiters


def sole(limit: int, queue: int = 0, **flat: Any) -> Crowd:
    return Crowd(SoleSlots(limit), SoleSlots(queue), **flat)


def test_the_one_too_many_is_the_first_that_is_refused() -> None:
    async def main() -> None:
        crowd = sole(3)
        requests = await crowd.arrived(*"aaaaa")
        assert [request.at_work for request in requests] == [True] * 3 + [False] * 2
        assert [request.refused for request in requests] == [False] * 3 + [True] * 2
        requests[1].go_on.set()
        await turns()
        (late,) = await crowd.arrived("a")
        assert late.at_work
        await crowd.end()
        assert repr(crowd.admission) == "<Admission 0 at work, 0 waiting, 0 of them here>"

    asyncio.run(main())


def test_who_waits_is_served_in_order_and_the_next_is_refused() -> None:
    async def main() -> None:
        crowd = sole(1, 2)
        first, second, third, fourth = await crowd.arrived(*"abab")
        assert (first.at_work, second.waits, third.waits, fourth.refused) == (True,) * 4
        assert repr(crowd.admission) == "<Admission 1 at work, 2 waiting, 2 of them here>"
        first.go_on.set()
        await turns()
        assert (second.at_work, third.waits) == (True, True)
        (fifth,) = await crowd.arrived("a")
        assert fifth.waits
        second.go_on.set()
        await turns()
        assert (third.at_work, fifth.waits) == (True, True)
        await crowd.end()

    asyncio.run(main())


def test_a_failing_application_gives_its_slot_back() -> None:
    async def main() -> None:
        crowd = sole(1)
        (request,) = await crowd.arrived("a")
        request.sent.append("raise")  # type: ignore[arg-type]  # a word to the application
        request.go_on.set()
        await turns()
        assert isinstance(request.task.exception(), LookupError)
        (cancelled,) = await crowd.arrived("a")
        cancelled.task.cancel()
        await turns()
        (last,) = await crowd.arrived("a")
        assert last.at_work
        await crowd.end()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["leave", "cancel", "leave and cancel"])
def test_who_leaves_frees_the_place_at_once(how: str) -> None:
    async def main() -> None:
        crowd = sole(1, 1)
        _, waiter = await crowd.arrived("a", "a")
        if "leave" in how:
            crowd.admission.leave(waiter.task)
            assert crowd.admission._places.taken() == 0
        if "cancel" in how:
            waiter.task.cancel()
            await turns()
        (third,) = await crowd.arrived("a")
        assert third.waits
        assert waiter.task.done()
        assert not waiter.begun
        assert not waiter.sent
        await crowd.end()
        assert not waiter.begun

    asyncio.run(main())


@pytest.mark.parametrize("how", ["leave", "cancel", "leave and cancel"])
def test_who_leaves_when_its_turn_has_just_come_passes_it_on(how: str) -> None:
    async def main() -> None:
        crowd = sole(1, 2)
        first, second, third = await crowd.arrived(*"aaa")
        crowd.admission._release()  # as first's end would, but second has not run since
        if "leave" in how:
            crowd.admission.leave(second.task)
        if "cancel" in how:
            second.task.cancel()
        await turns()
        assert not second.begun
        assert third.at_work
        assert crowd.admission._slots.taken() == 1
        crowd.admission._slots.take()  # which first gives back
        await crowd.end()
        assert first.begun

    asyncio.run(main())


def test_who_has_left_before_it_could_wait_does_not() -> None:
    async def main() -> None:
        crowd = sole(1, 1)
        await crowd.arrived("a")
        gone = crowd.arrive()
        crowd.admission.leave(gone.task)
        await turns()
        assert gone.task.done()
        assert not gone.sent
        assert crowd.admission._places.taken() == 0
        await crowd.end()
        assert not gone.begun

    asyncio.run(main())


def test_to_leave_at_work_changes_nothing() -> None:
    async def main() -> None:
        crowd = sole(1, 1)
        first, second = await crowd.arrived("a", "a")
        crowd.admission.leave(first.task)
        await turns()
        assert (first.at_work, second.waits) == (True, True)
        await crowd.end()
        assert second.begun

    asyncio.run(main())


@pytest.mark.parametrize(
    "flat",
    [
        {"queue_timeout": 0.05},
        {"queue_timeout": 0.0},
    ],
)
def test_no_wait_is_longer_than_the_shorter_limit(flat: dict[str, Any]) -> None:
    async def main() -> None:
        crowd = sole(1, 3, **flat)
        _, *waiters = await crowd.arrived(*"aaa")
        async with asyncio.timeout(5):
            await asyncio.gather(*(waiter.task for waiter in waiters))
        assert all(waiter.refused and not waiter.begun for waiter in waiters)
        assert crowd.admission._places.taken() == 0
        await crowd.end()

    asyncio.run(main())


def test_nothing_is_left_of_those_who_waited() -> None:
    """Their time limits neither."""
    gc.collect()  # what other tests have left

    def waiters_known() -> set[int]:
        return {id(it) for it in gc.get_objects() if type(it) is module._Waiter}

    async def main() -> None:
        older = waiters_known()  # in tracebacks of other tests
        crowd = sole(1, 9, queue_timeout=1000.0)
        _, *waiters = await crowd.arrived(*"aaaa")
        crowd.admission.leave(waiters[0].task)
        await crowd.end()
        assert waiters_known() <= older

    asyncio.run(main())


def test_waiting_without_end() -> None:
    async def main() -> None:
        crowd = sole(1, 1, queue_timeout=None)
        _, waiter = await crowd.arrived("a", "a")
        await asyncio.sleep(0.05)
        assert waiter.waits
        await crowd.end()
        assert waiter.begun

    asyncio.run(main())


def test_exempt_paths_are_neither_counted_nor_limited() -> None:
    async def main() -> None:
        crowd = sole(1, 0, root_path="/api", limit_exempt=("/health", ""))
        health = crowd.arrive(path="/api/health")
        await turns()
        first, second = await crowd.arrived("a", "a")
        assert (health.at_work, first.at_work, second.refused) == (True, True, True)
        others = [
            crowd.arrive(path="/health"), crowd.arrive(path="/api/health/"), crowd.arrive(path=""),
            crowd.arrive(path="/api"), crowd.arrive(path="/api/health", kind="websocket"),
        ]  # fmt: skip
        await turns()
        assert [other.refused for other in others] == [True] * 5
        again = crowd.arrive(path="/api/health")
        await turns()
        assert again.at_work
        await crowd.end()
        assert crowd.admission._slots.taken() == 0

    asyncio.run(main())


def test_the_usual_health_paths_are_exempt_unless_told_otherwise() -> None:
    async def main() -> None:
        crowd = sole(1)
        await crowd.arrived("a")
        for path in ("/health", "/healthz", "/livez", "/readyz", "/ping"):
            request = crowd.arrive(path=path)
            await turns()
            assert request.at_work, path
        await crowd.end()

    asyncio.run(main())


# Fairness


def test_a_batch_client_has_one_turn_among_others() -> None:
    async def main() -> None:
        crowd = sole(2, 50, fair_by="client")
        await crowd.arrived(*["batch"] * 22)
        ours = await crowd.arrived("anna", "ben")
        for _ in range(3):
            next(request for request in crowd.requests if request.at_work).go_on.set()
            await turns()
        assert all(request.at_work for request in ours)
        await crowd.end()

    asyncio.run(main())


def test_a_batch_client_makes_room_when_no_place_is_left() -> None:
    async def main() -> None:
        crowd = sole(1, 3, fair_by="client")
        batch = await crowd.arrived(*["batch"] * 4)
        (anna,) = await crowd.arrived("anna")
        assert anna.waits
        assert [request.refused for request in batch] == [False, False, False, True]
        assert crowd.admission._places.taken() == 3
        (ben,) = await crowd.arrived("ben")
        assert (ben.waits, batch[2].refused) == (True, True)
        # Now everybody has one; nobody is put out for one who would have as many.
        late = await crowd.arrived("carl", "batch", "anna")
        assert [request.refused for request in late] == [True] * 3
        await crowd.end()

    asyncio.run(main())


@pytest.mark.parametrize("fair_by", ["X-Api-Key", "client", None])
def test_keys(fair_by: str | None) -> None:
    """A header, whatever the case of its name; requests without it are one key."""

    async def main() -> None:
        crowd = sole(1, 9, fair_by=fair_by)
        one, two = (b"x-api-key", b"1"), (b"x-api-key", b"2")
        arrivals = [("a", [one]), ("a", [one]), ("b", [one]), ("a", [(b"x", b"1"), two]), ("a", [])]
        first = crowd.arrive()
        requests = [crowd.arrive(client, headers=headers) for client, headers in arrivals]
        await turns()
        order: list[int] = []
        running = first
        while len(order) < len(requests):
            running.go_on.set()
            await turns()
            (running,) = [request for request in requests if request.at_work]
            order.append(requests.index(running))
        expected = {"X-Api-Key": [0, 3, 4, 1, 2], "client": [0, 2, 1, 3, 4], None: [0, 1, 2, 3, 4]}
        assert order == expected[fair_by]
        await crowd.end()

    asyncio.run(main())


def test_a_client_without_an_address_is_a_key() -> None:
    async def main() -> None:
        crowd = sole(1, 1, fair_by="client")
        await crowd.arrived("a")
        crowd._guarded = crowd.admission.guard(app)
        extensions: dict[str, Any] = {CANCELLATION: {}}
        scope = {"type": "http", "path": "/", "client": None, "headers": [], "extensions": extensions}
        request = Request(crowd._guarded, scope)
        crowd.requests.append(request)
        await turns()
        assert request.waits
        await crowd.end()

    asyncio.run(main())


# Against a model


class Expected:
    """What has to become of requests, said in another way."""

    def __init__(self, limit: int, places: int, fair: bool) -> None:
        self.limit, self.places, self.fair = limit, places, fair
        self.work: list[int] = []
        self.refused: set[int] = set()
        self.gone: set[int] = set()
        self.queue: FairQueue[int] = FairQueue()  # has a model and a test of its own
        self.keys: dict[int, Hashable] = {}

    def arrive(self, number: int, key: Hashable) -> None:
        self.keys[number] = key = key if self.fair else None
        if len(self.work) < self.limit:
            self.work.append(number)
        elif len(self.queue) < self.places:
            self.queue.add(key, number)
        elif self.fair and (crowded := self.queue.most_crowded(key)):
            self.queue.remove(*crowded)
            self.refused.add(crowded[1])
            self.queue.add(key, number)
        else:
            self.refused.add(number)

    def finish(self, number: int) -> None:
        self.work.remove(number)
        if self.queue:
            self.work.append(self.queue.take())

    def leave(self, number: int) -> None:
        self.queue.remove(self.keys[number], number)
        self.gone.add(number)


moves = st.lists(st.tuples(st.sampled_from("aaaafflc"), st.integers(0, 40)), max_size=50)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(0, 6), st.booleans(), moves)
def test_as_the_model(limit: int, places: int, fair: bool, moves: list[tuple[str, int]]) -> None:
    async def main() -> None:
        crowd = sole(limit, places, fair_by="client" if fair else None)
        expected = Expected(limit, places, fair)
        for what, value in moves:
            waiting = [number for number, request in enumerate(crowd.requests) if request.waits]
            if what == "a":
                expected.arrive(len(crowd.requests), f"c{value % 4}")
                crowd.arrive(f"c{value % 4}")
            elif what == "f" and expected.work:
                number = expected.work[value % len(expected.work)]
                expected.finish(number)
                crowd.requests[number].go_on.set()
            elif what in "lc" and waiting:
                number = waiting[value % len(waiting)]
                expected.leave(number)
                task = crowd.requests[number].task
                crowd.admission.leave(task) if what == "l" else task.cancel()
            await turns()
            found = [number for number, request in enumerate(crowd.requests) if request.at_work]
            assert found == sorted(expected.work)
            assert crowd.count("waits") == len(expected.queue)
            assert {number for number, it in enumerate(crowd.requests) if it.refused} == expected.refused
            assert crowd.admission._slots.taken() == len(expected.work)
            assert crowd.admission._places.taken() == len(expected.queue)
        assert not any(crowd.requests[number].begun for number in expected.gone)
        await crowd.end()

    asyncio.run(main())


# Several that share


def shared(count: int, limit: int, places: int, **flat: Any) -> tuple[list[Crowd], list[Tokens]]:
    """As many workers in this loop, with descriptors of their own on the same pipes."""
    pools = [Tokens.create(limit), Tokens.create(places)]

    def share(pool: Tokens) -> PoolSlots:
        return PoolSlots(Tokens(pool.limit, (os.dup(pool.fds[0]), os.dup(pool.fds[1]))), lambda _change: None)

    crowds = [Crowd(share(pools[0]), share(pools[1]), **flat) for _ in range(count)]
    return crowds, pools


def close(crowds: list[Crowd], pools: list[Tokens]) -> None:
    for crowd in crowds:
        for slots in (crowd.admission._slots, crowd.admission._places):
            assert isinstance(slots, PoolSlots)
            assert slots._callback is None  # nobody watches
            slots._tokens.close()
    for pool in pools:
        assert pool.taken() == 0
        pool.close()


@pytest.mark.parametrize("seed", range(4))
def test_the_limits_hold_over_all_that_share(loop: str, seed: int) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        limit, places = chance.randint(1, 4), chance.randint(0, 5)
        crowds, pools = shared(3, limit, places)

        def total(what: str) -> int:
            return sum(crowd.count(what) for crowd in crowds)

        for _ in range(60):
            crowd = chance.choice(crowds)
            busy = [request for request in crowd.requests if request.at_work]
            waiting = [request for request in crowd.requests if request.waits]
            what = chance.random()
            if what < 0.5:
                full = total("at_work") == limit and total("waits") == places
                request = crowd.arrive()
                await turns()
                assert request.refused == full
            elif what < 0.85 and busy:
                chance.choice(busy).go_on.set()
            elif waiting:
                crowd.admission.leave(chance.choice(waiting).task)
            await turns()
            await eventually(lambda: total("at_work") == limit or not total("waits"))
            await turns()
            assert total("at_work") <= limit
            assert total("waits") <= places
            assert pools[0].taken() == total("at_work")
            assert pools[1].taken() == total("waits")
        await asyncio.gather(*(crowd.end() for crowd in crowds))
        close(crowds, pools)

    run(loop, main)


@pytest.mark.parametrize("places", [1, 2])
def test_a_slot_that_has_just_become_free_is_for_who_waited_first(loop: str, places: int) -> None:
    """Nor is the newcomer refused for want of a place, though the loop has not told of the slot yet."""

    async def main() -> None:
        (crowd,), pools = shared(1, 1, places)
        assert pools[0].take()  # by another worker
        (waiter,) = await crowd.arrived("a")
        pools[0].give()
        newcomer = crowd.arrive()
        await asyncio.sleep(0)
        assert not newcomer.begun
        await eventually(lambda: waiter.at_work)
        assert newcomer.waits
        await crowd.end()
        assert newcomer.begun
        close([crowd], pools)

    run(loop, main)


def test_who_frees_a_slot_lets_others_ask_first(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanserve.worker.slots._TURN_S", 0.3)

    async def main() -> None:
        (crowd,), pools = shared(1, 1, 2)
        first, second = await crowd.arrived("a", "a")
        assert pools[1].take()  # somebody waits in another worker
        first.go_on.set()
        await turns()
        assert (second.waits, pools[0].taken()) == (True, 0)
        await eventually(lambda: second.at_work)  # the other did not want it
        pools[1].give()
        (third,) = await crowd.arrived("a")
        second.go_on.set()
        await turns()
        assert third.at_work  # nobody else waits: at once
        await crowd.end()
        close([crowd], pools)

    run(loop, main)


def test_a_slot_goes_round_between_workers(loop: str) -> None:
    """A worker that always has somebody waiting does not keep the only slot to itself."""

    async def main() -> None:
        crowds, pools = shared(2, 1, 40)
        busy, other = crowds
        await busy.arrived(*["a"] * 20)
        (late,) = await other.arrived("a")
        served = 0
        while late.waits:
            for request in busy.requests:
                if request.at_work and not request.go_on.is_set():
                    served += 1
                    request.go_on.set()
            await asyncio.sleep(0.001)
        assert served < 20
        await asyncio.gather(*(crowd.end() for crowd in crowds))
        close(crowds, pools)

    run(loop, main)


# When to come again


def test_retry_after_is_computed_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: clock[0])

    async def main() -> None:
        crowd = sole(2, 4)
        assert crowd.admission.retry_after_s() == 1  # nothing is known yet

        async def work(seconds: float, kind: str = "http") -> None:
            request = crowd.arrive(kind=kind)
            await turns()
            clock[0] += seconds
            request.go_on.set()
            await turns()

        for _ in range(3):
            await work(6.0)
        assert crowd.admission.retry_after_s() == 3  # 6 s, two slots, and it would be the next
        await work(36000.0, "websocket")
        assert crowd.admission.retry_after_s() == 3  # a WebSocket says nothing about requests
        await crowd.arrived(*"aaaaaa")
        assert crowd.admission.retry_after_s() == 15  # four are ahead
        (refused,) = await crowd.arrived("a")
        assert refused.retry_after == 15
        await crowd.end()
        assert crowd.admission.retry_after_s() < 15
        for _ in range(100):
            await work(0.0)
        assert crowd.admission.retry_after_s() == 1
        for _ in range(100):
            await work(1e6)
        assert crowd.admission.retry_after_s() == 300

    asyncio.run(main())


@pytest.mark.parametrize(("kind", "prefix"), [("http", "http"), ("websocket", "websocket.http")])
def test_overloaded(kind: str, prefix: str) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(overloaded({"type": kind}, send, 17))
    assert [message["type"] for message in sent] == [f"{prefix}.response.start", f"{prefix}.response.body"]
    assert sent[0]["status"] == 503
    headers = dict(sent[0]["headers"])
    assert headers[b"content-length"] == b"%d" % len(sent[1]["body"])
    assert headers[b"retry-after"] == b"17"


# On sockets


class App:
    """Holds each request until it is told to go on."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go_on = asyncio.Event()
        self.at_work = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        self.begun.append(scope["path"])
        self.at_work += 1
        try:
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.accept"})
            if scope["path"] not in ("/health", "/quick"):
                await self.go_on.wait()
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": scope["path"].encode()})
        finally:
            self.at_work -= 1


def get(path: str) -> bytes:
    return GET.replace(b"/ ", path.encode() + b" ", 1)


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def held(worker: Worker) -> tuple[int, int]:
    assert worker.admission is not None
    return worker.admission._slots.taken(), worker.admission._places.taken()


async def opened(worker: Worker, *requests: bytes) -> list[Client]:
    """A connection for each, sent one after the other."""
    clients = []
    for data in requests:
        there = set(worker.running)
        clients.append(await Client.open(worker))
        await clients[-1].send(data)
        await eventually(lambda there=there: worker.running - there)
        await turns()
    return clients


def test_served_in_order_and_refused_beyond(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, max_concurrent_requests=1, max_queue=2) as worker:
            clients = await opened(worker, get("/1"), get("/2"), get("/3"))
            assert held(worker) == (1, 2)
            async with await Client.open(worker) as fourth:
                await fourth.send(get("/4"))
                answer = await fourth.read_one()
                assert (answer.status, answer.get(b"retry-after")) == (503, b"1")
                await fourth.send(get("/health"))
                assert (await fourth.read_one()).status == 200
            assert app.begun == ["/1", "/health"]
            app.go_on.set()
            for number, client in enumerate(clients, 1):
                assert (await client.read_one()).body == b"/%d" % number
                client.sock.close()
            assert app.begun == ["/1", "/health", "/2", "/3"]
            await eventually(lambda: held(worker) == (0, 0))

    run(loop, main)


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_waiter_that_resets_leaves_at_once(loop: str, kind: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, max_concurrent_requests=1, max_queue=1) as worker:
            request = UPGRADE if kind == "websocket" else get("/2")
            first, second = await opened(worker, get("/1"), request)
            assert held(worker) == (1, 1)
            second.reset()
            await eventually(lambda: held(worker) == (1, 0))
            (third,) = await opened(worker, get("/3"))
            assert held(worker) == (1, 1)
            app.go_on.set()
            for client in (first, third):
                assert (await client.read_one()).status == 200
                client.sock.close()
            assert app.begun == ["/1", "/3"]

    run(loop, main)


def test_who_cannot_begin_in_time_does_not_wait() -> None:
    """As far as the work of those before it tells."""

    async def main() -> None:
        crowd = sole(1, 5)
        for _ in range(3):
            crowd.arrive()
            await turns()
            await asyncio.sleep(0.05)
            crowd.requests[-1].go_on.set()
            await turns()
        crowd.arrive()
        await turns()
        hurried, patient, other = crowd.arrive(timeout=0.01), crowd.arrive(timeout=30.0), crowd.arrive()
        await turns()
        assert (hurried.refused, patient.waits, other.waits) == (True, True, True)
        await crowd.end()

    run("asyncio", main)


@pytest.mark.parametrize("half_closed", [False, True])
def test_a_waiter_that_nobody_reads_from_leaves_at_once(loop: str, half_closed: bool) -> None:
    """Its body is larger than what is read ahead of the application; or its side is closed already."""

    async def main() -> None:
        app = App()
        async with serving(app, max_concurrent_requests=1, max_queue=1) as worker:
            size = 0 if half_closed else 1 << 20
            post = b"POST /2 HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % size
            first, second = await opened(worker, get("/1"), post)
            if half_closed:
                second.shut()
                await eventually(lambda: any(connection.codec.eof for connection in worker.connections))
            else:
                sending = asyncio.ensure_future(second.send(bytes(size)))
                await eventually(lambda: any(connection.paused for connection in worker.connections))
                sending.cancel()
                await asyncio.wait([sending])
            await asyncio.sleep(0.1)
            assert held(worker) == (1, 1)  # it has not gone yet
            second.reset()
            await eventually(lambda: held(worker) == (1, 0))
            app.go_on.set()
            assert (await first.read_one()).status == 200
            first.sock.close()
            assert app.begun == ["/1"]

    run(loop, main)


def test_a_waiter_behind_tls_leaves_when_it_closes(loop: str, certificates: Certificates) -> None:
    async def main() -> None:
        app = App()
        flat = {"ssl_certfile": str(certificates.certificate), "ssl_keyfile": str(certificates.key)}
        async with serving(app, max_concurrent_requests=1, max_queue=1, **flat) as worker:
            context = certificates.client_context()
            pairs = []
            for path in ("/1", "/2"):
                reader, writer = await tls_client(worker, context)
                writer.write(get(path))
                pairs.append((reader, writer))
                await eventually(lambda: sum(held(worker)) == len(pairs))
            pairs[1][1].close()
            await eventually(lambda: held(worker) == (1, 0))
            app.go_on.set()
            assert b"200 OK" in await pairs[0][0].read(100)
            pairs[0][1].close()
            for _, writer in pairs:
                with contextlib.suppress(OSError, ssl.SSLError):
                    await writer.wait_closed()
            assert app.begun == ["/1"]

    run(loop, main)


def test_a_waiter_that_closes_its_side_only_still_gets_its_answer(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, max_concurrent_requests=1, max_queue=1) as worker:
            first, second = await opened(worker, get("/1"), get("/2"))
            second.shut()
            await asyncio.sleep(0.05)
            assert held(worker) == (1, 1)
            app.go_on.set()
            assert [answer.body for answer in await second.read_all()] == [b"/2"]
            first.sock.close()
            second.sock.close()

    run(loop, main)


def test_a_request_that_breaks_off_does_not_wait(loop: str) -> None:
    """Head and bad chunk in one read: the exchange has ended before its task has begun."""

    async def main() -> None:
        app = App()
        async with serving(app, max_concurrent_requests=1, max_queue=1) as worker:
            (first,) = await opened(worker, get("/1"))
            async with await Client.open(worker) as second:
                await second.send(
                    b"POST /2 HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
                )
                assert [answer.status for answer in await second.read_all()] == [400]
            await eventually(lambda: held(worker) == (1, 0))
            app.go_on.set()
            first.sock.close()
        assert app.begun == ["/1"]

    run(loop, main)


def test_queue_timeout(loop: str) -> None:
    async def main() -> None:
        app = App()
        flat = {"max_concurrent_requests": 1, "max_queue": 5, "queue_timeout": 0.1}
        async with serving(app, **flat) as worker:
            first, second, third = await opened(worker, get("/1"), get("/2"), UPGRADE)
            for client in (second, third):
                answer = await client.read_one()
                assert (answer.status, answer.get(b"retry-after")) == (503, b"1")
                client.sock.close()
            assert held(worker) == (1, 0)
            app.go_on.set()
            assert (await first.read_one()).status == 200
            first.sock.close()
            assert app.begun == ["/1"]

    run(loop, main)


def test_websockets_count_wait_and_are_refused(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, max_concurrent_requests=1, max_queue=1) as worker:
            first, second = await opened(worker, UPGRADE, UPGRADE)
            assert b"101 Switching" in await first.read()
            async with await Client.open(worker) as third:
                await third.send(UPGRADE)
                answer = await third.read_one()
                assert (answer.status, answer.get(b"retry-after")) == (503, b"1")
            assert held(worker) == (1, 1)
            first.reset()
            app.go_on.set()
            assert b"101 Switching" in await second.read()
            second.sock.close()
            await eventually(lambda: held(worker) == (0, 0))
            assert app.begun == ["/ws", "/ws"]

    run(loop, main)


def test_a_handshake_that_cannot_be_granted_takes_nothing(loop: str) -> None:
    async def main() -> None:
        async with serving(App(), max_concurrent_requests=1) as worker:
            for _ in range(3):
                bad = UPGRADE.replace(b"AAAAAAAAAAAAAAAAAAAAAA==", b"short")
                assert [answer.status for answer in await fetch(worker, bad)] == [400]
            assert held(worker) == (0, 0)

    run(loop, main)


def test_pipelined_requests_hold_one_slot_after_the_other(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, max_concurrent_requests=1, max_queue=1) as worker:
            quick = get("/quick")
            answers = await fetch(worker, quick, quick, CLOSING_GET.replace(b"/ ", b"/quick ", 1))
            assert [answer.status for answer in answers] == [200] * 3
            first, second = await opened(worker, get("/1"), quick * 3)
            assert held(worker) == (1, 1)
            second.shut()
            app.go_on.set()
            assert [answer.status for answer in await second.read_all()] == [200] * 3
            first.sock.close()
            second.sock.close()

    run(loop, main)


def test_a_drain_serves_those_who_wait(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, max_concurrent_requests=1, max_queue=2, drain_idle_timeout=0.0) as worker:
            clients = await opened(worker, get("/1"), get("/2"), UPGRADE)
            draining = asyncio.ensure_future(worker.drain())
            await asyncio.sleep(0.05)
            assert held(worker) == (1, 2)
            app.go_on.set()
            assert (await clients[0].read_one()).status == 200
            assert (await clients[1].read_one()).status == 200
            assert b"101 Switching" in await clients[2].read()
            for client in clients:
                client.sock.close()
            await draining
            assert app.begun == ["/1", "/2", "/ws"]

    run(loop, main)


def test_who_still_waits_at_the_end_of_a_drain_gets_an_answer(loop: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, max_concurrent_requests=1, max_queue=1, drain_timeout=0.05) as worker:
            clients = await opened(worker, get("/1"), get("/2"))
            await worker.drain()
            for client in clients:
                assert [answer.status for answer in await client.read_all()] == [503]
                client.sock.close()
            assert held(worker) == (0, 0)
        assert app.begun == ["/1"]

    run(loop, main)


def test_by_address_of_the_client_that_a_proxy_names(loop: str) -> None:
    async def main() -> None:
        app = App()
        flat = {"max_concurrent_requests": 1, "max_queue": 9, "fair_by": "client"}

        def of(path: str, address: str) -> bytes:
            return get(path).replace(b"host: a", b"host: a\r\nx-forwarded-for: " + address.encode())

        async with serving(app, **flat) as worker:
            clients = await opened(
                worker, of("/1", "10.0.0.1"), of("/2", "10.0.0.1"), of("/3", "10.0.0.1"), of("/4", "10.0.0.2")
            )
            app.go_on.set()
            for client in clients:
                assert (await client.read_one()).status == 200
                client.sock.close()
            assert app.begun == ["/1", "/2", "/4", "/3"]

    run(loop, main)


def test_without_a_limit_nothing_stands_in_front_of_the_application(loop: str) -> None:
    async def main() -> None:
        app = App()
        app.go_on.set()
        async with serving(app) as worker:
            assert worker.app is app
            assert not worker.limits_running
            assert [answer.status for answer in await fetch(worker, CLOSING_GET)] == [200]

    run(loop, main)


def test_a_body_is_asked_for_when_its_turn_has_come(loop: str) -> None:
    """RFC 9110 section 10.1.1: no 100 (Continue) for a request that may be refused yet."""

    async def reading(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def main() -> None:
        nonlocal go_on
        go_on = asyncio.Event()
        flat = {"max_concurrent_requests": 1, "max_queue": 1, "lifespan": "off"}
        async with serving(reading, **flat) as worker:
            post = b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
            first, second = await opened(worker, get("/1"), post)
            assert held(worker) == (1, 1)
            second.sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                second.sock.recv(1, socket.MSG_PEEK)
            go_on.set()
            assert (await second.read()).startswith(b"HTTP/1.1 100 Continue\r\n")
            await second.send(b"ok")
            assert (await second.read_one()).status in (100, 200)
            first.sock.close()
            second.sock.close()

    go_on: asyncio.Event
    run(loop, main)
