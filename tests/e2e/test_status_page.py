"""The status page in headless Chromium: what it shows of a server that works, loses a worker, and stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from browser import open_page
from harness import Load, Serving, fetch, free_port, wait_until

WORKERS = (
    "[...document.querySelectorAll('#workers tr')]"
    ".map(row => [...row.cells].map(cell => cell.textContent))"
)


def test_status_page(serve: Callable[..., Serving], tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    server = serve("raw_app:app", "--workers", "2", "--admin", address)
    pids = server.worker_pids(2)
    with open_page(f"http://{address}/status", tmp_path / "profile") as page:
        page.wait(f"{WORKERS}.length === 2")
        assert {int(row[1]) for row in page.ask(WORKERS)} == pids
        assert {row[2] for row in page.ask(WORKERS)} == {"ready"}
        assert page.ask("document.getElementById('state').textContent") == "running"
        assert page.ask("document.getElementById('ready').textContent") == "ready: 2 of 2 workers ready"
        assert page.ask("document.title") == f"leanserve {server.pid}"

        with Load(server) as load:
            # Rates, the distribution and the counts move; nobody reloads the page.
            page.wait("parseFloat(document.querySelector('#tiles .value').textContent) > 0")
            page.wait("document.querySelectorAll('#bars .bar').length > 0")
            page.wait("document.getElementById('counts').textContent.includes('status 2xx')")
            page.wait("document.querySelectorAll('#tiles polyline')[0].points.length > 2")
            assert page.ask("document.getElementById('quantiles').textContent").startswith("half < ")
        assert load.failures == []
        fetch(server, "/stream")
        page.ask("(which => { which.value = 'gap'; which.dispatchEvent(new Event('change')); })"
                 "(document.getElementById('which'))")
        page.wait("document.querySelectorAll('#bars .bar').length > 0")

        with server.connect() as connection:
            connection.sendall(b"GET /endless HTTP/1.1\r\nhost: localhost\r\n\r\n")
            page.wait("document.getElementById('running').textContent.includes(\"GET '/endless'\")")
        page.wait("document.getElementById('running').textContent === ''")

        victim = min(pids)
        os.kill(victim, signal.SIGKILL)
        page.wait(f"!{WORKERS}.some(row => row[1] === '{victim}') && {WORKERS}.length === 2")
        page.wait("document.getElementById('facts').textContent.includes('1 crashed')")

        urls = page.ask("performance.getEntriesByType('resource').map(entry => entry.name)")
        assert {url for url in urls if not url.endswith("/favicon.ico")} == {
            f"http://{address}/status", f"http://{address}/running",
        }
        assert page.complaints == []
        server.exit_code = None  # the worker that was killed is an error in the log
        server.stop()
        page.wait("document.getElementById('state').textContent === 'does not answer'")
    wait_until(lambda: server.running.poll() is not None, 5, "the end")
