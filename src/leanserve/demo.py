"""The built-in demo: a small model in plain Python behind REST, server-sent events and a WebSocket.

Raw ASGI 3, no framework: it shows what the server itself does. ``python -m leanserve`` serves it.

    GET  /         a page that asks the model over REST and over WebSocket, side by side
    POST /predict  {"text": "..."} -> {"label": "positive", "score": 0.97, ...}
    GET  /stream   ?prompt=the&tokens=20: generated words as server-sent events
    WS   /ws       the JSON of /predict, one answer per message
    GET  /health   {"status": "ok", ...}
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

__all__ = ["SentimentModel", "WordModel", "app"]

_MAX_BODY_BYTES = 65536
_TOKEN_PAUSE_S = 0.05

_POSITIVE = """\
what a lovely day and a wonderful result
i love this fast little server
great work the answer was quick and correct
an excellent meal and friendly people
this is the best model we have ever had
happy to say that it works perfectly
a beautiful and simple design
thanks for the fantastic help
the new version is so much better and faster
we enjoyed every minute of it
good clear and reliable
it is amazing how smooth this feels"""

_NEGATIVE = """\
what a terrible day and an awful result
i hate this slow broken thing
bad work the answer was late and wrong
a horrible meal and rude people
this is the worst model we have ever had
sad to say that it fails always
an ugly and confusing design
no thanks for the useless help
the new version is so much worse and slower
we regretted every minute of it
poor unclear and unreliable
it is annoying how sluggish this feels"""

_STORY = """\
the server waits for a request and the request waits for the model .
the model reads the words and the words become numbers .
the numbers become an answer and the answer goes back to the client .
the client reads the answer and sends the next request .
a small server is easy to read and a small model is easy to run .
the worker holds the model and the supervisor holds the worker ."""


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


class SentimentModel:
    """Logistic regression over the words of a text, trained on two dozen sentences in a few milliseconds."""

    def __init__(self, *, epochs: int = 60, rate: float = 0.5) -> None:
        self.weights: defaultdict[str, float] = defaultdict(float)
        self.bias = 0.0
        examples = [(_words(line), 1.0) for line in _POSITIVE.splitlines()]
        examples += [(_words(line), 0.0) for line in _NEGATIVE.splitlines()]
        order = random.Random(7)  # the same weights in every worker
        for _ in range(epochs):
            order.shuffle(examples)
            for words, target in examples:
                step = rate * (target - self._probability(words))
                self.bias += 0.1 * step
                for word in words:
                    self.weights[word] += step - 0.002 * self.weights[word]

    def _probability(self, words: list[str]) -> float:
        total = self.bias + sum(self.weights.get(word, 0.0) for word in words)
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, total))))

    def predict(self, text: str) -> dict[str, Any]:
        """The label of `text`, its probability, and the weight of each word that the model knows."""
        words = _words(text)
        positive = self._probability(words)
        label = "positive" if positive >= 0.5 else "negative"
        return {
            "label": label,
            "score": round(max(positive, 1 - positive), 4),
            "words": {word: round(self.weights[word], 2) for word in words if word in self.weights},
        }


class WordModel:
    """Draws each next word from those that followed the last one in a small text."""

    def __init__(self) -> None:
        self._next: dict[str, list[str]] = {}
        words = _STORY.split()
        for word, follower in zip(words, [*words[1:], words[0]], strict=True):
            self._next.setdefault(word, []).append(follower)

    def generate(self, prompt: str, tokens: int) -> Iterator[str]:
        """`tokens` words behind the last known word of `prompt`."""
        known = [word for word in prompt.lower().split() if word in self._next]
        word = known[-1] if known else "."
        for _ in range(tokens):
            word = random.choice(self._next[word])
            yield word


class _BadRequest(Exception):
    """What the client sent cannot be answered."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


async def app(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI application."""
    if scope["type"] == "lifespan":
        await _lifespan(scope, receive, send)
    elif scope["type"] == "websocket":
        await _websocket(scope, receive, send)
    else:
        try:
            await _route(scope, receive, send)
        except _BadRequest as error:
            await _answer_json(send, error.status, {"error": str(error)})


async def _lifespan(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    scope["state"]["sentiment"] = SentimentModel()
    scope["state"]["words"] = WordModel()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


_ALLOWED = {"/": "GET", "/health": "GET", "/stream": "GET", "/predict": "POST"}


async def _route(scope: Any, receive: Any, send: Any) -> None:
    path, method = scope["path"], scope["method"]
    allowed = _ALLOWED.get(path)
    if allowed is None:
        raise _BadRequest(f"nothing is here; try {', '.join(_ALLOWED)} or the WebSocket /ws", 404)
    if method != allowed and not (method == "HEAD" and allowed == "GET"):
        raise _BadRequest(f"{path} takes {allowed}, not {method}", 405)
    if path == "/predict":
        await _answer_json(send, 200, _predict(scope, await _read_body(receive)))
    elif path == "/stream":
        await _stream(scope, send)
    elif path == "/health":
        await _answer_json(send, 200, {"status": "ok", "pid": os.getpid()})
    else:
        page = files("leanserve").joinpath("demo.html").read_bytes()
        await _answer(send, 200, b"text/html; charset=utf-8", page)


async def _read_body(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _BadRequest("the client has gone")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > _MAX_BODY_BYTES:
            raise _BadRequest(f"the body may have {_MAX_BODY_BYTES} bytes at most", 413)
    return body


def _predict(scope: Any, body: bytes | str) -> dict[str, Any]:
    try:
        question = json.loads(body)
    except ValueError as error:
        raise _BadRequest(f"this is not JSON: {error}") from None
    except RecursionError:
        raise _BadRequest("this JSON is nested too deeply") from None
    text = question.get("text") if isinstance(question, dict) else None
    if not isinstance(text, str):
        raise _BadRequest('send {"text": "some words"}')
    answer: dict[str, Any] = scope["state"]["sentiment"].predict(text)
    return answer


async def _stream(scope: Any, send: Any) -> None:
    query = parse_qs(scope["query_string"].decode("latin-1"))
    prompt, count = query.get("prompt", ["the"])[0], query.get("tokens", ["20"])[0]
    if not (count.isascii() and count.isdigit() and 1 <= int(count[:6]) <= 1000):
        raise _BadRequest("tokens must be a number from 1 to 1000")
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for token in scope["state"]["words"].generate(prompt, int(count)):
        event = b"data: %s\n\n" % json.dumps({"token": token}).encode()
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await asyncio.sleep(_TOKEN_PAUSE_S)
    await send({"type": "http.response.body", "body": b"event: done\ndata: {}\n\n"})


async def _websocket(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    if scope["path"] != "/ws":
        await send({"type": "websocket.close"})  # before accept: HTTP 403
        return
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        try:
            answer = _predict(scope, message.get("text") or message.get("bytes") or b"")
        except _BadRequest as error:
            answer = {"error": str(error)}
        await send({"type": "websocket.send", "text": json.dumps(answer)})


async def _answer_json(send: Any, status: int, value: Any) -> None:
    await _answer(send, status, b"application/json", json.dumps(value).encode())


async def _answer(send: Any, status: int, content_type: bytes, body: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
