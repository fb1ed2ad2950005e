"""The main job: a predict endpoint, a token stream and a WebSocket, as a FastAPI user writes them."""

import asyncio
import os

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel

app = FastAPI()


class Features(BaseModel):
    x: list[float]


@app.post("/predict")
def predict(features: Features):
    return {"y": 2 * sum(features.x)}


@app.get("/stream")
async def stream():
    async def tokens():
        for number in range(5):
            yield f"data: {number}\n\n"
            await asyncio.sleep(0.01)

    return StreamingResponse(tokens(), media_type="text/event-stream")


@app.websocket("/ws")
async def ws(socket: WebSocket):
    await socket.accept()
    try:
        while True:
            features = Features(**await socket.receive_json())
            await socket.send_json({"y": 2 * sum(features.x)})
    except WebSocketDisconnect:
        pass


@app.get("/pid", response_class=PlainTextResponse)
def pid():
    return str(os.getpid())


# The page asks over REST, over server-sent events and over WebSocket, and reports what it got.
PAGE = """<!doctype html><title>predict</title><script type="module">
const rest = await (await fetch("/predict", {
  method: "POST", headers: {"content-type": "application/json"}, body: '{"x": [1, 2]}'})).json();
const tokens = await (await fetch("/stream")).text();
const socket = new WebSocket(location.href.replace("http", "ws") + "ws");
socket.onopen = () => socket.send('{"x": [3, 4]}');
socket.onmessage = async (event) => {
  const report = {rest: rest.y, tokens: tokens.match(/data/g).length, socket: JSON.parse(event.data).y};
  await fetch("/report", {method: "POST", body: JSON.stringify(report)});
};
</script>"""


@app.get("/", response_class=HTMLResponse)
def page():
    return PAGE


@app.post("/report", status_code=204)
async def report(request: Request):
    with open(os.environ["LEANSERVE_TEST_REPORT"], "wb") as file:
        file.write(await request.body())
