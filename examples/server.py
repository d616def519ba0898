"""A web server that streams generated text to many clients from one shared model. Plain ASGI, no framework.

pip install uvicorn
SMALLM_MODEL=runs/mine/export uvicorn examples.server:app
curl -N 'http://127.0.0.1:8000/generate?seed=Once&max_length=200&temperature=0.8'

Every request gets its own `TextStream`; the model is shared. Chunks are computed in worker threads, so that the event
loop stays free, and a client that disconnects ends its generation.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

from smallm import LanguageModel, UserError

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

NUMBERS = {"max_length": int, "temperature": float, "top_k": int, "top_p": float, "rng_seed": int}
MAX_LENGTH = 5000  # characters that one request may ask for


@cache
def model() -> LanguageModel:
    """The model of this process, loaded at the first request."""
    return LanguageModel.load(os.environ["SMALLM_MODEL"], threads=1)


def read_options(query: bytes) -> tuple[str, dict[str, Any]]:
    """A query string -> the seed text and the options of generation. Raises `ValueError` (`UserError` is one)."""
    values = dict(parse_qsl(query.decode(), keep_blank_values=True))
    seed = values.pop("seed", "")
    options: dict[str, Any] = {name: NUMBERS.get(name, str)(value) for name, value in values.items()}
    if options.setdefault("max_length", 200) > MAX_LENGTH:
        raise UserError(f"max_length = {options['max_length']} is too large; ask for at most {MAX_LENGTH}")
    return seed, options


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """The ASGI application: GET /generate?seed=…&max_length=…&temperature=… streams text."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await asyncio.to_thread(model)  # fail at the start, not at the first request
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["type"] != "http" or scope["path"] != "/generate":
        return await reply(send, 404, "try /generate?seed=Once\n")
    try:
        seed, options = read_options(scope["query_string"])
        stream = await asyncio.to_thread(lambda: model().stream(seed, **options))
    except ValueError as error:
        return await reply(send, 400, f"{error}\n")
    await start(send, 200)
    await send_body(send, seed, more=True)
    disconnected = asyncio.ensure_future(wait_for_disconnect(receive))
    while not disconnected.done() and (text := await asyncio.to_thread(next, stream, None)) is not None:
        await send_body(send, text, more=True)
    disconnected.cancel()
    await send_body(send, "", more=False)


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def reply(send: Send, status: int, text: str) -> None:
    """A whole response of plain text."""
    await start(send, status)
    await send_body(send, text, more=False)


async def start(send: Send, status: int) -> None:
    """Status and headers."""
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def send_body(send: Send, text: str, more: bool) -> None:
    """A part of the body."""
    await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
