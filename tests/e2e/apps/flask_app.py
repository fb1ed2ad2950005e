"""Predict and stream with Flask: a WSGI application."""

import os

from flask import Flask, Response, jsonify, request

app = Flask(__name__)


@app.post("/predict")
def predict():
    return jsonify(y=2 * sum(request.get_json()["x"]))


@app.get("/stream")
def stream():
    return Response((f"data: {number}\n\n" for number in range(5)), mimetype="text/event-stream")


@app.get("/pid")
def pid():
    return str(os.getpid())
