"""The manifests of docs/howto/kubernetes.md: their parts fit together, and a kubelet is content."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.documents import blocks, read, table
from harness import free_port, wait_until
from leanserve.cli import settings_from
from leanserve.command import build_command
from leanserve.settings import Settings

PAGE = {block.kind: block.text for block in blocks(read("howto/kubernetes.md"))}
MANIFESTS = list(yaml.safe_load_all(PAGE["yaml model.yaml"]))
KINDS: dict[str, dict[str, Any]] = {each["kind"]: each for each in MANIFESTS}
POD: dict[str, Any] = KINDS["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
PROBES = {name: CONTAINER[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
PORTS = {each["name"]: each["containerPort"] for each in CONTAINER["ports"]}
# What the supervisor gives workers beyond the sum of its settings.
CUT_S = 2


def settings() -> Settings:
    """What the command of the container means."""
    assert CONTAINER["command"][:3] == ["python", "-m", "leanserve"]
    line = [*CONTAINER["command"][3:], *CONTAINER["args"]]
    context = build_command().make_context("leanserve", line)
    return settings_from({name: value for name, value in context.params.items() if name != "app"}, {})


def test_the_parts_fit_together() -> None:
    labels = POD["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert KINDS[kind]["spec"]["selector"] == {"matchLabels": labels}
    assert KINDS["Service"]["spec"]["selector"] == labels
    (port,) = KINDS["Service"]["spec"]["ports"]
    assert port["targetPort"] in PORTS
    assert {each["httpGet"]["port"] for each in PROBES.values()} <= set(PORTS)
    found = settings()
    assert (found.listen.port, found.listen.host) == (PORTS["http"], "0.0.0.0")
    assert found.admin.admin == f"0.0.0.0:{PORTS['admin']}"
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(PORTS["admin"])
    target = KINDS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", KINDS["Deployment"]["metadata"]["name"])


def _needed_s(found: Settings) -> float:
    lifespan = found.load.lifespan_shutdown_timeout
    assert lifespan is not None
    return found.drain.pre_stop_delay + found.drain.drain_timeout + lifespan + found.drain.kill_grace + CUT_S


def test_the_grace_period_is_long_enough_and_the_page_has_the_sum() -> None:
    found = settings()
    needed_s = _needed_s(found)
    assert POD["spec"]["terminationGracePeriodSeconds"] > needed_s
    assert f"5 + 30 + 30 + 5 + 2 = {needed_s:g}" in read("howto/kubernetes.md")
    longer = found.replace(drain_timeout=600.0)
    assert f"`--drain-timeout 600` and {_needed_s(longer) + 3:g} s" in read("howto/kubernetes.md")
    rows = table(read("howto/kubernetes.md"), "moment", "Kubernetes", "leanserve")
    drain, lifespan = found.drain, found.load.lifespan_shutdown_timeout or 0
    moments = [0, drain.pre_stop_delay, drain.pre_stop_delay + drain.drain_timeout]
    moments += [moments[-1] + lifespan, needed_s, POD["spec"]["terminationGracePeriodSeconds"]]
    assert [float(row[0].partition(" s")[0]) for row in rows] == moments


def test_the_metrics_exist() -> None:
    known = {row[0].strip("`") for row in table(read("howto/prometheus.md"), "metric", "kind", "what")}
    (metric,) = KINDS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = yaml.safe_load(PAGE["yaml adapter.yaml"])["rules"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    named = re.findall(r"leanserve_\w+", rule["seriesQuery"] + rule["metricsQuery"])
    assert {"leanserve_in_flight", "leanserve_queued"} == set(named)
    assert set(named) <= known


# The life of a pod

SERVICE = """
import asyncio

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await asyncio.sleep(1)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print("lifespan has ended", flush=True)
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["path"] == "/slow":
        print("slow has begun", flush=True)
        await asyncio.sleep(float(scope["query_string"]))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})
"""
# The signal must go to PID 1 of the namespace, as the kubelet's does.
NAMESPACE = ("unshare", "-p", "-f", "--mount-proc", "--kill-child")
CAN_UNSHARE = (
    sys.platform == "linux"
    and subprocess.run(["unshare", "-p", "-f", "true"], capture_output=True, check=False).returncode == 0
)


class Pod:
    """The container's command as PID 1, at ports of its own on loopback."""

    def __init__(self, folder: Path) -> None:
        (folder / "service.py").write_text(SERVICE)
        self.ports = {name: free_port() for name in PORTS}
        numbers = {str(PORTS[name]): str(port) for name, port in self.ports.items()}
        line = [sys.executable, *CONTAINER["command"][1:], *CONTAINER["args"]]
        self._line = [_here(word, numbers) for word in line]
        self._folder, self._log = folder, folder / "log"

    def start(self) -> None:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*NAMESPACE, *self._line], cwd=self._folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, "XDG_RUNTIME_DIR": str(self._folder)},
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ask(self, port: str, path: str, timeout_s: float = 1.0) -> int:
        """Status of a GET, 0 when nobody answers in time: what a kubelet sees, with its default timeout."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=timeout_s)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except OSError:
            return 0
        finally:
            connection.close()

    def probe(self, name: str) -> int:
        get = PROBES[name]["httpGet"]
        return self.ask(get["port"], get["path"])

    def end(self) -> None:
        """SIGTERM for PID 1 of the container."""
        (first,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert f"NSpid:\t{first}\t1\n" in Path(f"/proc/{first}/status").read_text()
        os.kill(int(first), signal.SIGTERM)


def _here(word: str, numbers: dict[str, str]) -> str:
    for number, port in numbers.items():
        word = re.sub(rf"\b{number}$", port, word)
    return word.replace("0.0.0.0", "127.0.0.1")


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    it = Pod(tmp_path)
    it.start()
    yield it
    with contextlib.suppress(ProcessLookupError):
        os.killpg(it.process.pid, signal.SIGKILL)  # a session of its own
    it.process.wait(10)


@pytest.mark.skipif(not CAN_UNSHARE, reason="no privilege for a namespace of processes")
def test_the_life_of_a_pod(pod: Pod) -> None:
    """Started, ready; then deleted while a request is at work and clients that know nothing of it go on."""
    assert (pod.probe("startup"), pod.probe("readiness")) != (200, 200)
    limit_s = PROBES["startup"]["periodSeconds"] * PROBES["startup"]["failureThreshold"]
    wait_until(lambda: pod.probe("startup") == 200, min(limit_s, 30), f"it starts\n{pod.log}")
    wait_until(lambda: pod.probe("readiness") == 200, 10, "it is ready")
    workers = settings().pool.workers
    wait_until(lambda: pod.log.count(" ready in ") == workers, 20, "all are")  # one that boots just ends
    assert pod.probe("liveness") == 200
    assert pod.ask("http", "/") == 200
    slow: list[int] = []
    thread = threading.Thread(target=lambda: slow.append(pod.ask("http", "/slow?6", 30)))
    thread.start()
    wait_until(lambda: "slow has begun" in pod.log, 10, "it is at work")

    pod.end()
    ended_s = time.monotonic()
    wait_until(lambda: pod.probe("readiness") == 503, 10, "not ready any more")
    late = []
    while True:
        found = (pod.ask("http", "/", 10), pod.probe("readiness"), pod.probe("liveness"))
        if time.monotonic() - ended_s > settings().drain.pre_stop_delay:
            break  # that one may have come too late
        late.append(found)
        time.sleep(0.1)
    assert len(late) > 5
    assert set(late) == {(200, 503, 200)}, late
    assert pod.process.wait(POD["spec"]["terminationGracePeriodSeconds"]) == 0, pod.log
    thread.join(5)
    assert slow == [200]
    assert pod.ask("http", "/") == 0
    assert pod.log.count("lifespan has ended") == workers, pod.log
