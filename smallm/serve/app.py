"""The server as an ASGI application: /v1/completions, /v1/models, /health and the web page at /."""

import asyncio
import base64
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from smallm.errors import UserError
from smallm.html.web_page import stated_sizes, web_page_files
from smallm.language_model import MODEL_FILE
from smallm.serve.completion_request import CompletionRequest
from smallm.serve.generation_queue import BusyError, GenerationQueue, Slice

RETRY_AFTER = 2  # seconds after which a client that found the server busy may come back
PATHS = "POST /v1/completions, GET /v1/models, GET /health and a page at /"
TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}


def build_app(
    queue: GenerationQueue,
    model_file: Path,
    name: str,
    token: str | None = None,
    origin: str | None = None,
    hosts: list[str] | None = None,
) -> Starlette:
    """The application.

    model_file: the .onnx file for the web page; name: of the model, for clients; token: what clients must send, None =
    nothing; origin: a web origin whose pages may use the server, "*" = all, None = its own pages only; hosts: the
    names that a request may address, None = all (a page elsewhere could otherwise reach a local server by DNS
    rebinding).
    """
    created, files = int(time.time()), web_page_files() | {MODEL_FILE: model_file}
    sizes = stated_sizes({each: file.read_bytes() for each, file in files.items()})
    page = files["index.html"].read_text(encoding="utf-8")
    for key, value in sizes.items():
        page = page.replace(f"{{{{{key}}}}}", value)

    async def models(request: Request) -> Response:
        entry = {"id": name, "object": "model", "created": created, "owned_by": "smallm"}
        wanted = request.path_params.get("name")
        if wanted not in (None, name):
            return error_response(404, f"there is no model {wanted!r:.80}; this server has {name}", "model_not_found")
        return JSONResponse(entry if wanted else {"object": "list", "data": [entry]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "active_requests": queue.active})

    async def file(request: Request) -> Response:
        wanted = request.path_params.get("file", "index.html")
        if wanted == "index.html":
            return Response(page, media_type="text/html")
        if wanted not in files:
            raise HTTPException(404)
        return FileResponse(files[wanted], headers={"cache-control": "no-cache"})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        queue.close()

    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if hosts else []
    if origin:
        middleware.append(Middleware(CORSMiddleware, allow_origins=[origin], allow_methods=["GET", "POST"],
                                     allow_headers=["authorization", "content-type"]))  # fmt: skip
    if token:
        middleware.append(Middleware(TokenMiddleware, token=token))
    routes = [
        Route("/v1/completions", partial(completions, queue, name), methods=["POST"]),
        Route("/v1/models", models), Route("/v1/models/{name:path}", models),
        Route("/health", health), Route("/", file), Route("/{file}", file),
    ]  # fmt: skip
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan,
                     exception_handlers={HTTPException: http_error})  # fmt: skip


async def completions(queue: GenerationQueue, name: str, request: Request) -> Response:
    """POST /v1/completions. The answer has the form that clients of OpenAI's API read."""
    try:
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return error_response(415, "the content type is not application/json; send JSON")
        async with asyncio.timeout(queue.limits.body_deadline):
            body = json.loads(await read_body(request, queue.limits.max_body))
        asked = CompletionRequest.parse(body, queue.model.vocabulary, queue.limits)
        if body.get("model") not in (None, "", name):
            return error_response(404, f"there is no model {body['model']!r:.80}; this server has {name}",
                                  "model_not_found")  # fmt: skip
        asked.config.resolve(queue.model.metadata)  # raises for options that do not suit the model
    except TimeoutError:
        return error_response(408, "the body did not arrive in time; send the request again")
    except ClientDisconnect:
        return Response(status_code=499)
    except UserError as error:
        return error_response(400, str(error))
    except (ValueError, RecursionError):  # json, UTF-8
        return error_response(400, "the body is not JSON; send an object with the field prompt")
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": name}  # fmt: skip
    try:
        if asked.stream:
            return EventStream(queue, asked, head)
        with queue.place():
            async with asyncio.timeout(queue.limits.deadline):
                return await whole_answer(queue, asked, head, request)
    except BusyError:
        return error_response(503, "the server is busy; try again later", headers={"retry-after": str(RETRY_AFTER)})
    except TimeoutError:
        return error_response(504, f"the texts took longer than {queue.limits.deadline:g} s; ask for fewer characters")
    except UserError as error:
        return error_response(400, str(error))


async def read_body(request: Request, max_body: int) -> bytes:
    """The body of a request. Raises `HTTPException` 413 as soon as it is too large."""
    too_large = HTTPException(413, f"the body is larger than {max_body} bytes; send a shorter prompt")
    if int(request.headers.get("content-length", "0")) > max_body:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_body:
            raise too_large
    return bytes(body)


async def whole_answer(
    queue: GenerationQueue, asked: CompletionRequest, head: dict[str, Any], request: Request
) -> Response:
    """The answer in one piece. A client that leaves ends the generation."""
    texts: list[list[Slice]] = [[] for _ in range(len(asked.prompts) * asked.n)]
    async with aclosing(queue.slices(asked)) as slices:
        async for each in slices:
            texts[each.number].append(each)
            if await request.is_disconnected():
                return Response(status_code=499)
    choices = []
    for number, parts in enumerate(texts):
        logprobs = [each for part in parts for each in part.logprobs]
        whole = Slice(number, "".join(part.text for part in parts), logprobs, parts[-1].finish_reason)
        choices.append(choice(whole, asked.logprobs))
    written = sum(len(part.text) for parts in texts for part in parts)
    return JSONResponse(head | {"choices": choices, "usage": usage(asked, written)})


class EventStream(StreamingResponse):
    """The answer as server-sent events. Starlette cancels it when the client leaves, and the generation with it."""

    def __init__(self, queue: GenerationQueue, asked: CompletionRequest, head: dict[str, Any]):
        self._queue, self._place = queue, queue.place()
        self._place.__enter__()  # raises `BusyError` while the status can still be chosen
        super().__init__(self._events(asked, head), media_type="text/event-stream",
                         headers={"cache-control": "no-cache", "x-accel-buffering": "no"})  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._queue.limits.deadline):  # also for a client that does not read
                await super().__call__(scope, receive, send)
        except TimeoutError:
            return  # uvicorn closes the connection of an answer without an end
        finally:
            self._place.__exit__(None, None, None)

    async def _events(self, asked: CompletionRequest, head: dict[str, Any]) -> AsyncIterator[str]:
        written, offsets = 0, dict[int, int]()
        head = head | ({"usage": None} if asked.include_usage else {})
        try:
            async with aclosing(self._queue.slices(asked)) as slices:
                async for each in slices:
                    if each.text or each.finish_reason:
                        offset = offsets.get(each.number, 0)
                        yield event(head | {"choices": [choice(each, asked.logprobs, offset)]})
                        offsets[each.number] = offset + len(each.text)
                        written += len(each.text)
        except UserError as error:
            yield event(error_body(400, str(error)))
            return
        if asked.include_usage:
            yield event(head | {"choices": [], "usage": usage(asked, written)})
        yield "data: [DONE]\n\n"


def choice(part: Slice, with_logprobs: bool, offset: int = 0) -> dict[str, Any]:
    """A text, or a part of one, as an entry of `choices`; offset: characters of the text before this part."""
    logprobs = {
        "tokens": list(part.text), "token_logprobs": part.logprobs, "top_logprobs": None,
        "text_offset": list(range(offset, offset + len(part.text))),
    }  # fmt: skip
    return {"index": part.number, "text": part.text, "logprobs": logprobs if with_logprobs else None,
            "finish_reason": part.finish_reason}  # fmt: skip


def usage(asked: CompletionRequest, written: int) -> dict[str, int]:
    """The counts of characters. written: those of all texts, with the prompts that were echoed."""
    prompts = sum(map(len, asked.prompts))
    new = written - (prompts * asked.n if asked.echo else 0)
    return {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new}


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_response(
    status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """A mistake, in the form that clients of OpenAI's API read."""
    return JSONResponse(error_body(status, message, code), status, headers)


async def http_error(request: Request, error: Exception) -> Response:
    """An error of Starlette: unknown paths, methods that a path does not have."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.url.path[:80]}; this server has {PATHS}"
    elif error.status_code == 405:
        message = f"{request.url.path[:80]} does not take {request.method}; this server has {PATHS}"
    return error_response(error.status_code, message, headers=dict(error.headers or {}))


class TokenMiddleware:
    """Refuses requests without the token, except those to /health.

    Programs send it as `Authorization: Bearer TOKEN`, browsers ask for a password and send that.
    """

    def __init__(self, app: ASGIApp, token: str):
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._knows(dict(scope["headers"])):
            return await self._app(scope, receive, send)
        refusal = error_response(401, "the token is missing or wrong; send Authorization: Bearer TOKEN",
                                 "invalid_api_key", {"www-authenticate": 'Basic realm="smallm"'})  # fmt: skip
        return await refusal(scope, receive, send)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except ValueError:
                return False
        return hmac.compare_digest(given.strip(), self._token)
