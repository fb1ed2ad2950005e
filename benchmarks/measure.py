"""One measurement: a server started, warmed up, loaded by a client in a process of its own, and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import Any

import trustme

from benchmarks.peers import ROOT, Running, Setup, accepts, answers, started
from benchmarks.proc import cpu_seconds, memory, tree
from benchmarks.workloads import Workload

_SETTLE_S = 0.05
_CLIENT_WITHIN_S = 90.0
_SPARE_DESCRIPTORS = 200


class Failure(Exception):
    """A server that could not be measured, and why."""


_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done.

    Attributes:
        seconds: length of one measurement; a transfer has twice as long.
        warm_up_s: load before the clock runs.
        transfer_bytes: size of an upload or a download.
        idle: idle connections.
        settle_s: before memory is read.
        pin: one CPU for the server, another for the client, where there are two.
    """

    seconds: float = 1.2
    warm_up_s: float = 0.25
    transfer_bytes: int = 1 << 30
    idle: int = 10_000
    settle_s: float = 0.5
    pin: bool = True


SMOKE = Scale(seconds=0.02, warm_up_s=0.01, transfer_bytes=1 << 20, idle=60, settle_s=0.0, pin=False)


@dataclass(frozen=True, slots=True)
class Place:
    """What all measurements of a run share: a folder with a file to send, a certificate and its key."""

    file: Path
    certificate: Path
    key: Path


def prepare(folder: Path, scale: Scale) -> Place:
    """Make the files in `folder`, and allow as many descriptors as the kernel lets us have."""
    place = Place(folder / "file", folder / "certificate.pem", folder / "key.pem")
    with place.file.open("wb") as file:  # real bytes: whoever first reads a hole pays for filling it
        for start in range(0, scale.transfer_bytes, _BLOCK):
            file.write(bytes(min(_BLOCK, scale.transfer_bytes - start)))
    issued = trustme.CA().issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(place.key)
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(place.certificate, append=number > 0)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return place


def idle_connections(scale: Scale) -> int:
    """As many as asked for, or as a process may have."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(scale.idle, most - _SPARE_DESCRIPTORS) if most != resource.RLIM_INFINITY else scale.idle


def cpus() -> tuple[set[int], set[int], set[int]]:
    """(all that we may use, the server's, the client's)"""
    mine = os.sched_getaffinity(0)
    first, *others = sorted(mine)
    return mine, {first}, set(others) or {first}


class Client:
    """A client process."""

    def __init__(self, kind: str, port: int, options: dict[str, Any]) -> None:
        """Start it; it has to be closed."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.clients", kind, str(port), json.dumps(options)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )

    def wait_ready(self) -> None:
        """Until its connections are open. Failure when the server fails it, here and in `work`."""
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        ready, _, _ = select([self._process.stdout], [], [], _CLIENT_WITHIN_S)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._process.kill()
            why = self._process.stderr.read().strip().splitlines()
            raise Failure(why[-1][:200] if why else f"the client said nothing for {_CLIENT_WITHIN_S} s")
        return line.strip()

    def work(self, seconds: float) -> dict[str, float]:
        """So long; what it did: `count` and `seconds`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        done: dict[str, float] = json.loads(self._line())
        return done

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def client_process(kind: str, port: int, options: dict[str, Any]) -> Iterator[Client]:
    """A client that is ready, for the length of the block."""
    client = Client(kind, port, options)
    try:
        client.wait_ready()
        yield client
    finally:
        client.close()


def _load(server: Running, workload: Workload, scale: Scale, place: Place) -> dict[str, float]:
    """CPU time per unit of work, and units per second."""
    kind, options = workload.client
    seconds = scale.seconds
    if workload.how == "transfer":
        size, seconds = scale.transfer_bytes, 2 * scale.seconds
        options = {key: value.format(size=size, file=place.file) for key, value in options.items()}
        options["size"] = size
    with client_process(kind, server.port, options) as client:
        client.work(scale.warm_up_s)
        time.sleep(_SETTLE_S)
        before = cpu_seconds(server.pid)
        done = client.work(seconds)
        used = cpu_seconds(server.pid) - before
    if not done["count"]:
        raise Failure("nothing was done in time")
    return {"cpu": used / done["count"], "rate": done["count"] / done["seconds"]}


def _idle(server: Running, workload: Workload, scale: Scale, place: Place) -> dict[str, float]:
    """Memory of a connection that does nothing."""
    kind, options = workload.client
    count = idle_connections(scale)
    with client_process(kind, server.port, {**options, "connections": min(count, 50)}):
        pass  # what the first connections allocate stays
    time.sleep(scale.settle_s)
    before = memory(tree(server.pid)).rss
    with client_process(kind, server.port, {**options, "connections": count}) as client:
        time.sleep(scale.settle_s)
        after = memory(tree(server.pid)).rss
        still_open = client.work(0)["count"]
    if still_open < count:
        raise Failure(f"{count - still_open:.0f} of {count} connections were closed")
    return {"each": (after - before) / count}


def _start(server: Running, workload: Workload, scale: Scale, place: Place) -> dict[str, float]:
    """The time until a GET is answered, and the memory of the parent when all has come to rest."""
    server.wait(answers)
    first_s = time.perf_counter() - server.begun_s
    time.sleep(scale.settle_s * 2)
    parent, everyone = memory({server.pid}), memory(tree(server.pid))
    return {
        "first": first_s, "rss": parent.rss, "pss": parent.pss, "uss": parent.uss, "all_pss": everyone.pss,
    }


_WAYS: dict[str, Callable[[Running, Workload, Scale, Place], dict[str, float]]] = {
    "load": _load, "transfer": _load, "idle": _idle, "start": _start,
}


def measure(name: str, workload: Workload, scale: Scale, place: Place) -> dict[str, float]:
    """One server, started, measured and stopped: its figures. Failure when it cannot."""
    every, server_cpus, client_cpus = cpus()
    pinned = scale.pin and workload.pinned
    setup = Setup(workload.app, workload.workers, (place.certificate, place.key) if workload.tls else None)
    try:
        # Affinity belongs to the calling thread; what it starts inherits it.
        os.sched_setaffinity(0, server_cpus if pinned else every)
        with started(name, setup) as server:
            os.sched_setaffinity(0, client_cpus if pinned else every)
            if workload.how != "start":
                server.wait(accepts)
            return _WAYS[workload.how](server, workload, scale, place)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise Failure(str(error)) from error
    finally:
        os.sched_setaffinity(0, every)
