"""The same three endpoints with Starlette."""

import asyncio
import os

from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute


async def predict(request):
    return JSONResponse({"y": 2 * sum((await request.json())["x"])})


async def stream(request):
    async def tokens():
        for number in range(5):
            yield f"data: {number}\n\n"
            await asyncio.sleep(0.01)

    return StreamingResponse(tokens(), media_type="text/event-stream")


async def ws(socket):
    await socket.accept()
    async for text in socket.iter_json():
        await socket.send_json({"y": 2 * sum(text["x"])})


async def pid(request):
    return PlainTextResponse(str(os.getpid()))


app = Starlette(
    routes=[
        Route("/predict", predict, methods=["POST"]),
        Route("/stream", stream),
        Route("/pid", pid),
        WebSocketRoute("/ws", ws),
    ]
)
