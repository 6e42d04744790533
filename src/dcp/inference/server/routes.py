"""The routes: thin, for what they do is in :mod:`prompts`, :mod:`inbox` and :mod:`answers`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from dcp.inference.requests import Piece
from dcp.inference.server.answers import Answer, ChatAnswer, CompletionAnswer
from dcp.inference.server.inbox import Draining, Inbox, QueueFull, Ticket
from dcp.inference.server.limits import LimitedBody
from dcp.inference.server.metrics import Metrics
from dcp.inference.server.prompts import Prompts, TooLong
from dcp.inference.server.shapes import Asked, ChatAsked, CompletionAsked

INVALID, FAILED, BUSY = "invalid_request_error", "server_error", "rate_limit_error"


class Refused(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, kind: str, *, param: str | None = None, code: Any = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def make_app(inbox: Inbox, prompts: Prompts, metrics: Metrics, *, name: str) -> FastAPI:
    """The application of a server whose model is called ``name``."""
    app = FastAPI(title="dcp serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LimitedBody, max_length=prompts.max_length)
    _answer_errors(app, metrics)
    created = int(time.time())
    card = {"id": name, "object": "model", "created": created, "owned_by": "dcp"}

    def find_model(wanted: str) -> None:
        if wanted != name:
            said = f"the model {wanted!r:.100} is not here, only {name!r} is"
            raise Refused(404, said, INVALID, param="model", code="model_not_found")

    async def answer(http: Request, asked: Asked, kind: Callable[..., Answer]) -> Response:
        find_model(asked.model)
        ticket = await _submit(inbox, prompts, asked)
        reply = kind(ticket.request, name, prompts.show, asked.return_token_ids)
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = _events(ticket, reply, with_usage=with_usage)
            return _Stream(events, lambda: inbox.cancel(ticket))
        try:
            pieces = await _unless_gone(http, ticket)
        finally:
            inbox.cancel(ticket)
        if pieces[-1].finish == "error":
            raise Refused(500, pieces[-1].error, FAILED)
        return JSONResponse(reply.whole(pieces))

    @app.post("/v1/chat/completions")
    async def chat(http: Request, asked: ChatAsked) -> Response:
        return await answer(http, asked, ChatAnswer)

    @app.post("/v1/completions")
    async def complete(http: Request, asked: CompletionAsked) -> Response:
        return await answer(http, asked, CompletionAnswer)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{wanted:path}")
    async def show_model(wanted: str) -> Response:
        find_model(wanted)
        return JSONResponse(card)

    @app.get("/health")
    async def health() -> Response:
        if inbox.is_draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


async def _submit(inbox: Inbox, prompts: Prompts, asked: Asked) -> Ticket:
    """The request on its way; :class:`Refused` where it cannot be."""
    try:
        return inbox.submit(await run_in_threadpool(prompts.request, asked))
    except TooLong as error:
        raise Refused(400, str(error), INVALID, code="context_length_exceeded") from None
    except ValueError as error:
        raise Refused(400, str(error), INVALID) from None
    except QueueFull as error:
        raise Refused(429, str(error), BUSY, code="queue_full") from None
    except Draining as error:
        raise Refused(503, str(error), FAILED, code="draining") from None


async def _unless_gone(http: Request, ticket: Ticket) -> list[Piece]:
    """All pieces of a reply; :class:`Refused`, which nobody reads, once the client has gone."""

    async def all_pieces() -> list[Piece]:
        return [piece async for piece in ticket]

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    reading, leaving = asyncio.create_task(all_pieces()), asyncio.create_task(gone())
    try:
        await asyncio.wait([reading, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise Refused(499, "the client has gone", INVALID)
        return await reading
    finally:
        reading.cancel()
        leaving.cancel()


async def _events(ticket: Ticket, reply: Answer, *, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of a reply."""
    async for piece in ticket:
        if piece.finish == "error":
            yield _event(Refused(500, piece.error, FAILED).body)
            return
        if (chunk := reply.chunk(piece)) is not None:
            yield _event(chunk)
    if with_usage:
        yield _event(reply.usage_chunk())
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class _Stream(StreamingResponse):
    """Events, and what is done when the last is sent or the client has gone, even before the
    first."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._at_end = at_end

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self._at_end()


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error in OpenAI's form."""

    def refuse(error: Refused) -> Response:
        if error.status < 499:
            metrics.ended("refused")
        return JSONResponse(error.body, error.status)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return refuse(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refuse(Refused(400, f"the body is no JSON: {first['ctx']['error']}", INVALID))
        of = first.get("ctx", {}).get("name")  # a field that is not served
        name = of or ".".join(map(str, first["loc"][1:])) or None
        said = first["msg"] if of or name is None else f"{name}: {first['msg']}"
        return refuse(Refused(400, said, INVALID, param=name))

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> Response:
        return refuse(Refused(error.status_code, str(error.detail), INVALID))

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        return refuse(Refused(500, f"{type(error).__name__}: {error}", FAILED))
