"""nginx and haproxy of the distribution in front: no request is lost, and none is made of another.

All requests are POSTs, which a proxy does not send again by itself: what the server loses, the client sees.

``LEANSERVE_PROXY_REQUESTS=10000 pytest tests/e2e/test_reverse_proxies.py`` sends as many through each.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import Serving, descendants, wait_until
from proxies import Haproxy, Nginx, Posts, Proxy

Serve = Callable[..., Serving]

REQUESTS = int(os.environ.get("LEANSERVE_PROXY_REQUESTS", "400"))
LANES = 8 if REQUESTS < 4000 else 32
# In a full run a request every 0.1 s of each of 32 lanes, and time for a machine that has other work.
pytestmark = pytest.mark.timeout(60 + REQUESTS // 50)

PROXIES = {"nginx": Nginx, "haproxy": Haproxy}


@pytest.fixture(params=PROXIES)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Proxy]:
    kind = PROXIES[request.param]
    return lambda *servers, **facts: kind(tmp_path / "proxy", servers, lanes=LANES, **facts)


def check(posts: Posts, proxy: Proxy) -> None:
    """Nothing was lost, as the client sees it and as the proxy does."""
    assert posts.failures == []
    assert proxy.lost() == []


def test_idle_timeout(serve: Serve, make: Callable[..., Proxy], tmp_path: Path) -> None:
    """Every request is sent just when the server is about to close the connection it would go over.

    A request and the server's FIN may cross on the wire, so a proxy that means to lose none sends again what
    came back unanswered. That is safe if such a request never reached the application: each does so once.
    """
    idle_s, journal = 0.1, tmp_path / "journal"
    server = serve(
        "behind_app:app", "--keep-alive-timeout", str(idle_s),
        environment={"LEANSERVE_TEST_JOURNAL": str(journal)},
    )
    each = REQUESTS // LANES
    with make(server.port, again="unanswered") as proxy:
        with Posts(proxy, (idle_s - 0.002, idle_s + 0.003), each) as posts:
            posts.join(each * 0.2 + 30)
    assert posts.failures == []
    calls = Counter(entry["target"] for entry in map(json.loads, journal.read_text().splitlines()))
    sent = {f"/{lane}/{number}" for lane in range(LANES) for number in range(1, each + 1)}
    assert {target: calls[target] for target in sent if calls[target] != 1} == {}
    # The timeout was at play: some requests came just in time for the old connection, some too late.
    assert min(posts.reused, posts.fresh) > posts.answered // 50, (posts.reused, posts.fresh)


def test_drain_of_one_of_two(serve: Serve, make: Callable[..., Proxy]) -> None:
    leaves, stays = (serve("behind_app:app", "--workers", "2") for _ in range(2))
    with make(leaves.port, stays.port, again="unsent") as proxy, Posts(proxy, (0.0, 0.004)) as posts:
        posts.wait_answered(REQUESTS // 2)
        assert posts.workers & descendants(leaves.pid)
        leaves.stop()
        posts.wait_answered(REQUESTS // 2)
    check(posts, proxy)


def test_roll(serve: Serve, make: Callable[..., Proxy]) -> None:
    server = serve("behind_app:app", "--workers", "2")
    with make(server.port) as proxy, Posts(proxy, (0.0, 0.004)) as posts:
        rolls = max(2, REQUESTS // 1000)
        for _ in range(rolls):
            before = descendants(server.pid)
            server.running.send_signal(signal.SIGHUP)
            wait_until(lambda before=before: not before & descendants(server.pid), 30, "all are new")
            posts.wait_answered(REQUESTS // rolls)
    check(posts, proxy)
    assert len(posts.workers) >= 2 * rolls
