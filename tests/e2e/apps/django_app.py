"""Predict and stream with Django, in one file."""

import asyncio
import json
import os

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

settings.configure(
    ROOT_URLCONF=__name__, SECRET_KEY="for a test only", ALLOWED_HOSTS=["*"], MIDDLEWARE=[], USE_TZ=True
)
django.setup()


async def predict(request):
    return JsonResponse({"y": 2 * sum(json.loads(request.body)["x"])})


async def stream(request):
    async def tokens():
        for number in range(5):
            yield f"data: {number}\n\n"
            await asyncio.sleep(0.01)

    return StreamingHttpResponse(tokens(), content_type="text/event-stream")


def pid(request):
    return HttpResponse(str(os.getpid()))


urlpatterns = [path("predict", predict), path("stream", stream), path("pid", pid)]
app = get_asgi_application()
