"""The same three endpoints with Litestar."""

import asyncio
import os

from litestar import Litestar, MediaType, get, post, websocket_listener
from litestar.response import Stream


@post("/predict", status_code=200)
async def predict(data: dict[str, list[float]]) -> dict[str, float]:
    return {"y": 2 * sum(data["x"])}


@get("/stream")
async def stream() -> Stream:
    async def tokens():
        for number in range(5):
            yield f"data: {number}\n\n"
            await asyncio.sleep(0.01)

    return Stream(tokens(), media_type="text/event-stream")


@websocket_listener("/ws")
async def ws(data: dict[str, list[float]]) -> dict[str, float]:
    return {"y": 2 * sum(data["x"])}


@get("/pid", media_type=MediaType.TEXT, sync_to_thread=False)
def pid() -> str:
    return str(os.getpid())


app = Litestar([predict, stream, ws, pid], openapi_config=None)
