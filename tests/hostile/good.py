"""Good clients, in a process of their own: ``python -m hostile.good PORT [CA-FILE]``.

Keep-alive GETs over some connections, each with a pause behind its answer. For every line on standard input
one line of JSON: what became of the requests since the last.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time

CONNECTIONS = 8
PAUSE_S = 0.005
TIMEOUT_S = 10.0
REQUEST = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


class Tally:
    """What became of the requests."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.failures: list[str] = []

    def take(self) -> dict[str, object]:
        """Count, failures and percentiles in ms; and begin anew."""
        times, failures = sorted(self.times), self.failures
        self.times, self.failures = [], []
        facts: dict[str, object] = {"count": len(times), "failures": failures}
        if times:
            facts |= {"p50_ms": times[len(times) // 2] * 1000, "p99_ms": times[len(times) * 99 // 100] * 1000}
        return facts


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(REQUEST)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise ConnectionError(repr(head[:40]))
    await reader.readexactly(13)


async def _client(port: int, context: ssl.SSLContext | None, tally: Tally) -> None:
    while True:
        writer = None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
            while True:
                begun = time.perf_counter()
                async with asyncio.timeout(TIMEOUT_S):
                    await _ask(reader, writer)
                tally.times.append(time.perf_counter() - begun)
                await asyncio.sleep(PAUSE_S)
        except (OSError, EOFError, TimeoutError) as error:
            tally.failures.append(repr(error))
            await asyncio.sleep(0.05)
        finally:
            if writer is not None:
                writer.close()


async def main(port: int, authority: str | None) -> None:
    """Until standard input ends."""
    context = ssl.create_default_context(cafile=authority) if authority else None
    tally, lines = Tally(), asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    clients = [asyncio.ensure_future(_client(port, context, tally)) for _ in range(CONNECTIONS)]
    while await lines.readline():
        print(json.dumps(tally.take()), flush=True)
    for client in clients:
        client.cancel()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
