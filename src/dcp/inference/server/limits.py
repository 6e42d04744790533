"""A request's body may be so long and no longer: it is not kept in memory beyond."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_BYTES, OTHER_BYTES = 64, 1 << 20  # of a long token in JSON, and of all that is no prompt


class LimitedBody:
    """ASGI middleware: a body beyond what ``max_length`` tokens can take is refused with 413."""

    def __init__(self, app: ASGIApp, *, max_length: int) -> None:
        self._app, self._most = app, max_length * TOKEN_BYTES + OTHER_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left = self._most

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the request's body is longer than {self._most} bytes")
            return message

        await self._app(scope, limited, send)
