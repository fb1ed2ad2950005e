"""leanserve.demo: what a newcomer sees."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from leanserve import Server
from leanserve.demo import SentimentModel, WordModel


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Server("leanserve.demo:app", port=0, lifespan="on", drain_idle_timeout=0) as server:
        yield server.urls[0]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("a wonderful, fast server!", "positive"),
        ("I love it", "positive"),
        ("this is terrible and slow", "negative"),
        ("the worst meal, rude people", "negative"),
    ],
)
def test_model(text: str, label: str) -> None:
    answer = SentimentModel().predict(text)
    assert answer["label"] == label
    assert 0.6 < answer["score"] <= 1


def test_model_of_unknown_words_is_unsure_and_reproducible() -> None:
    one, two = SentimentModel(), SentimentModel()
    assert one.predict("zzz") == two.predict("zzz")
    assert one.predict("zzz")["words"] == {}
    assert one.predict("zzz")["score"] < 0.75
    assert one.predict("love " * 5000)["score"] <= 1


def test_word_model() -> None:
    words = list(WordModel().generate("nothing known", 500))
    assert len(words) == 500
    assert {"server", "model"} < set(words)


def test_predict(url: str) -> None:
    answer = httpx.post(f"{url}/predict", json={"text": "what a lovely day"})
    assert answer.status_code == 200
    assert answer.json()["label"] == "positive"
    assert answer.json()["words"]["lovely"] > 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/predict", b"{", 400, "this is not JSON: "),
        ("POST", "/predict", b"", 400, "this is not JSON: "),
        ("POST", "/predict", b"\xff", 400, "this is not JSON: "),
        ("POST", "/predict", b"[" * 50000, 400, "JSON"),
        ("POST", "/predict", b"[]", 400, 'send {"text"'),
        ("POST", "/predict", b'{"text": 1}', 400, 'send {"text"'),
        ("POST", "/predict", b" " * 65537, 413, "65536 bytes at most"),
        ("GET", "/predict", b"", 405, "takes POST, not GET"),
        ("GET", "/stream?tokens=0", b"", 400, "from 1 to 1000"),
        ("GET", "/stream?tokens=many", b"", 400, "from 1 to 1000"),
        ("GET", "/nothing", b"", 404, "nothing is here"),
    ],
)
def test_wrong_requests(url: str, method: str, path: str, body: bytes, status: int, message: str) -> None:
    answer = httpx.request(method, url + path, content=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]


def test_stream(url: str) -> None:
    with httpx.stream("GET", f"{url}/stream?prompt=the&tokens=3") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        events = "".join(answer.iter_text()).split("\n\n")
    assert [set(json.loads(event.removeprefix("data: "))) for event in events[:3]] == [{"token"}] * 3
    assert events[3:] == ["event: done\ndata: {}", ""]


def test_websocket(url: str) -> None:
    address = url.replace("http", "ws")
    with connect(f"{address}/ws") as socket:
        for message in ('{"text": "lovely"}', b'{"text": "lovely"}'):
            socket.send(message)
            assert json.loads(socket.recv(timeout=20))["label"] == "positive"
        socket.send("{")
        assert "not JSON" in json.loads(socket.recv(timeout=20))["error"]
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"{address}/other")


def test_health_and_page(url: str) -> None:
    assert httpx.get(f"{url}/health").json()["status"] == "ok"
    page = httpx.get(url)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert httpx.head(url).headers["content-length"] == page.headers["content-length"]
    # self-contained: it works without a network
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page.text)
    for place in ("predict", "ws", "stream"):
        assert f'"{place}' in page.text


def test_client_that_leaves_a_stream(url: str) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient() as client, client.stream("GET", f"{url}/stream?tokens=1000") as answer:
            async for _ in answer.aiter_text():
                return

    asyncio.run(leave())
    assert httpx.get(f"{url}/health").status_code == 200
