"""The studio's web server: routes that turn requests into calls of a :class:`.workshop.Workshop`.

It listens on this machine alone. Whoever knows the token in the address may use it; every request's Host must be this
server's own, and its Origin, where one is sent, too.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import hmac
import json
import secrets
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import RewriteCoreError, quoted
from ..files import to_json
from .films import KINDS
from .pixels import Tiles
from .workshop import Workshop, made_by

_MOST_BYTES = 64 << 20  # of one request
_MOST_ROWS = 200  # pictures in one sheet
_MOST_SIDE = 2048
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; style-src 'self'; "
    "frame-ancestors 'self' http://localhost:* http://127.0.0.1:*",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Endpoint = Callable[[Request, Workshop], Any]


class Guard:
    """Lets through what comes from this server's own page: the right Host, no foreign Origin, the token."""

    def __init__(self, app: ASGIApp, token: str, port: int):
        self.app, self.token, self.cookie = app, token, f"rewrite_studio_{port}"
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        reason = self._reason(request)
        if reason is not None:
            await Response(reason, 403, _HEADERS, "text/plain")(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _reason(self, request: Request) -> str | None:
        if request.headers.get("host") not in self.hosts:
            return "This address is not the studio's own.\n"
        origin = request.headers.get("origin")
        if origin is not None and origin not in self.origins:
            return "Another site may not use the studio.\n"
        given = request.query_params.get("token") or request.cookies.get(self.cookie) or ""
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return (
                "Open the studio with the address that `rewrite studio` printed; its token is missing or wrong here.\n"
            )
        return None


def make_app(workshop: Workshop, port: int, token: str | None = None) -> Starlette:
    """The web application; ``app.state.token`` is what its address must carry."""
    token = token or secrets.token_urlsafe(24)

    def route(path: str, endpoint: Endpoint, method: str = "GET") -> Route:
        return Route(path, functools.partial(_answer, endpoint, workshop), methods=[method])

    routes = [
        Route("/", functools.partial(_page, f"rewrite_studio_{port}", token)),
        Route("/page/{name}", _static),
        Route("/api/events", functools.partial(_events, workshop)),
        route("/api/state", lambda request, shop: shop.describe()),
        route("/api/pictures", _pictures),
        route("/api/pictures.png", _sheet),
        route("/api/differences", lambda request, shop: shop.differences(_rows(request))),
        route("/api/edit", _take_edit, "PUT"),
        route("/api/settings", _take_settings, "PUT"),
        route("/api/fit", _fit, "POST"),
        route("/api/fit", lambda request, shop: shop.drop_live(), "DELETE"),
        route("/api/measure", lambda request, shop: shop.measure(), "POST"),
        route("/api/search", _search, "POST"),
        route("/api/rules", _keep, "POST"),
        route("/api/rules/order", lambda request, shop: shop.order_rules(_json(request)), "PUT"),
        route("/api/rules/{number:int}", _change_rule, "PATCH"),
        route("/api/rules/{number:int}", lambda request, shop: shop.take_off(request.path_params["number"]), "DELETE"),
        route("/api/rules/file", _drop_in, "POST"),
        route("/api/rules/{number:int}/file", _rule_file),
        route("/api/layers", lambda request, shop: shop.layers()),
        route("/api/layer", _choose_layer, "PUT"),
        route("/api/scan", lambda request, shop: shop.scan(), "POST"),
        route("/api/cancel", lambda request, shop: shop.cancel(), "POST"),
        route("/api/edit.json", lambda request, shop: _file(shop.edit_json.encode(), "edit.json")),
        route("/api/checkpoint.safetensors", lambda request, shop: _file(shop.checkpoint(), "edited.safetensors")),
        route(
            "/api/sheet.png",
            lambda request, shop: _file(shop.before_after(_rows(request)), "before_after.png"),
        ),
        route("/api/walk.{kind}", _film),
    ]
    app = Starlette(routes=routes)
    app.state.token, app.state.turns = token, Turns()
    app.add_middleware(Guard, token=token, port=port)
    return app


# --- answers


async def _answer(endpoint: Endpoint, workshop: Workshop, request: Request) -> Response:
    """What an endpoint returns as JSON, or the response it made; the library's own refusals as one sentence."""
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > _MOST_BYTES:
        return _told(f"A request holds at most {_MOST_BYTES >> 20} MB.", 413)
    request.scope["read"] = await request.body()
    made_by.set(request.headers.get("x-page", "")[:40])  # a page knows its own changes by it
    try:
        answer = await run_in_threadpool(endpoint, request, workshop)
    except concurrent.futures.CancelledError:
        return JSONResponse({"replaced": True}, 409, _HEADERS)
    except (RewriteCoreError, OSError) as error:
        return _told(" ".join(str(error).split())[:500], 400)
    except Exception as error:  # whatever a generator raises; the page goes on
        traceback.print_exc()
        return _told(_failed(error), 500)
    if isinstance(answer, Response):
        return answer
    return Response(to_json(answer), headers=_HEADERS, media_type="application/json")


def _failed(error: Exception) -> str:
    return f"This did not work: {' '.join(str(error).split())[:300]}"


def _told(sentence: str, status: int) -> Response:
    return JSONResponse({"error": sentence}, status, _HEADERS)


def _file(data: bytes, name: str) -> Response:
    disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(data, headers=_HEADERS | disposition, media_type="application/octet-stream")


async def _page(cookie: str, token: str, request: Request) -> Response:
    html = (resources.files(__package__) / "page" / "index.html").read_text(encoding="utf-8")
    response = Response(html, headers=_HEADERS, media_type="text/html")
    response.set_cookie(cookie, token, httponly=True, samesite="strict")
    return response


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    file = resources.files(__package__) / "page" / name
    if not name.replace(".", "").replace("-", "").isalnum() or not file.is_file():
        return _told("There is no such file.", 404)
    return Response(file.read_bytes(), headers=_HEADERS, media_type=_TYPES.get(name.rpartition(".")[2], "text/plain"))


async def _events(workshop: Workshop, request: Request) -> Response:
    """Server-sent events: state changes and progress, until the page goes."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]]()

    def heard(event: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    end = workshop.listen(heard)

    async def stream() -> Any:
        try:
            yield f"data: {to_json({'kind': 'hello', 'version': workshop.version})}\n\n"
            while True:
                try:
                    event = await asyncio.wait_for(queue.get(), 15)
                except asyncio.TimeoutError:
                    yield ": still here\n\n"
                    continue
                yield f"data: {to_json(event)}\n\n"
        finally:
            end()

    return StreamingResponse(stream(), headers=_HEADERS, media_type="text/event-stream")


# --- endpoints


def _json(request: Request) -> Any:
    try:
        return json.loads(request.scope["read"] or b"null")
    except (ValueError, RecursionError) as error:
        raise RewriteCoreError(f"The request is no JSON ({error}).") from None


def _whole(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.lstrip("-").isdigit() or not least <= int(text[:12]) <= most:
        raise RewriteCoreError(f"{name} is a whole number from {least} to {most}, not {text[:20]!r}.")
    return int(text)


def _rows(request: Request) -> list[int]:
    return [row for part in _parts(request.query_params.get("rows", "")) for row in part]


def _parts(text: str) -> list[list[int]]:
    """Numbers of pictures, such as 0,1;2,3: a comma between two, and a semicolon between two parts."""
    parts = [part.split(",") for part in text.split(";")]
    each = [row for part in parts for row in part]
    if not all(row.isdigit() and len(row) < 10 for row in each) or len(each) > _MOST_ROWS:
        raise RewriteCoreError(
            f"rows are up to {_MOST_ROWS} numbers of pictures with commas between, not {text[:40]!r}."
        )
    return [[int(row) for row in part] for part in parts]


def _strength(request: Request) -> float | None:
    text = request.query_params.get("strength")
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = float("nan")
    if value is not None and not -10 <= value <= 10:
        raise RewriteCoreError(f"strength is a number from -10 to 10, not {text!r}.")
    return value


def _how(request: Request) -> tuple[int, bool, float | None]:
    """How large, the originals or not, and how strong the live change is."""
    original = request.query_params.get("original") == "1"
    return _whole(request, "side", 128, 1, _MOST_SIDE), original, _strength(request)


def _pictures(request: Request, shop: Workshop) -> Response:
    parts = _parts(request.query_params.get("rows", ""))
    return _streamed(request, shop.paint_soon(parts, *_how(request)))


def _sheet(request: Request, shop: Workshop) -> Response:
    return Response(shop.sheet(_rows(request), *_how(request)), headers=_HEADERS, media_type="image/png")


def _streamed(request: Request, painted: Sequence[tuple[list[int], Future[Tiles]]], head: object = None) -> Response:
    """Pictures, part by part as they are painted: a line of JSON that says which and how large, and their pixels. A
    line of `head` comes first. What goes wrong on the way is a line, too. Parts that nobody waits for any more are
    not painted."""
    return StreamingResponse(_stream(request, painted, head), 200, _HEADERS, "application/octet-stream")


async def _stream(
    request: Request, painted: Sequence[tuple[list[int], Future[Tiles]]], head: object
) -> AsyncIterator[bytes]:
    try:
        if head is not None:
            yield to_json(head).encode() + b"\n"
        for rows, future in painted:
            try:
                found = await asyncio.wrap_future(future)
            except Exception as error:  # whatever a generator raises
                traceback.print_exception(error)
                yield to_json({"error": _failed(error)}).encode() + b"\n"
                return
            if await request.is_disconnected():
                return
            yield to_json({"rows": rows, "width": found.width, "height": found.height}).encode() + b"\n" + found.data
    finally:
        for _, future in painted:
            future.cancel()


def _film(request: Request, shop: Workshop) -> Response:
    kind = request.path_params["kind"]
    if kind not in KINDS:
        raise RewriteCoreError(f"A film is one of {', '.join(KINDS)}, not {quoted(kind)}.")
    return _file(shop.walk(_rows(request), kind), f"walk.{kind}")


class Turns:
    """Keeps a page's edits in the order in which it sent them, whichever connection was faster."""

    _MOST = 100  # pages that are remembered

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[str, int] = {}

    def take_edit(self, request: Request, shop: Workshop, text: str) -> Future[None]:
        """The edit goes to the workshop; returns what is done when it is saved. Raises CancelledError where the page
        has sent a newer one already."""
        page, turn = request.headers.get("x-page", ""), request.headers.get("x-turn", "")
        with self._lock:
            if turn.isdigit():
                if int(turn[:15]) < self._newest.get(page, 0):
                    raise concurrent.futures.CancelledError
                self._newest[page] = int(turn[:15])
                while len(self._newest) > self._MOST:
                    del self._newest[next(iter(self._newest))]
            return shop.take_edit_soon(text)


def _take_edit(request: Request, shop: Workshop) -> None:
    try:
        text = request.scope["read"].decode("utf-8")
    except UnicodeDecodeError:
        raise RewriteCoreError("The edit is not text.") from None
    request.app.state.turns.take_edit(request, shop, text).result()


def _take_settings(request: Request, shop: Workshop) -> None:
    shop.take_settings(_json(request))


def _fit(request: Request, shop: Workshop) -> dict[str, Any] | Response:
    """The report; where pictures are asked for too, they follow it in one stream."""
    wanted = _json(request) or {}
    if not isinstance(wanted, dict):
        raise RewriteCoreError("A fit is asked for with an object.")
    seen = wanted.get("pictures")
    parts, side = ([], 0) if seen is None else _seen(seen)
    saved = None
    if "settings" in wanted:
        shop.take_settings(wanted["settings"])
    if wanted.get("edit") is not None:  # else the one that it has
        saved = request.app.state.turns.take_edit(request, shop, to_json(wanted["edit"]))
    report = shop.fit(wanted.get("kind", "rewrite"))
    painted = shop.paint_soon(parts, side)
    if saved is not None:
        saved.result()
    return report if seen is None else _streamed(request, painted, report)


def _seen(value: object) -> tuple[list[list[int]], int]:
    """The parts and the side of the pictures that a page asks for with a fit."""
    if isinstance(value, dict) and isinstance(value.get("rows"), str):
        side = value.get("side")
        if type(side) is int and 1 <= side <= _MOST_SIDE:
            return _parts(value["rows"]) if value["rows"] else [], side
    raise RewriteCoreError(f"pictures are an object with rows, such as '0,1;2,3', and a side from 1 to {_MOST_SIDE}.")


def _search(request: Request, shop: Workshop) -> dict[str, Any]:
    wanted = _json(request)
    if not isinstance(wanted, dict) or "selection" not in wanted:
        raise RewriteCoreError("A search needs a selection.")
    top = wanted.get("top", 12)
    if not isinstance(top, int):
        raise RewriteCoreError(f"top is a whole number, not {top!r}.")
    return shop.find(wanted["selection"], top)


def _keep(request: Request, shop: Workshop) -> dict[str, Any]:
    return shop.keep(str((_json(request) or {}).get("name", ""))).describe()


def _change_rule(request: Request, shop: Workshop) -> None:
    shop.change_rule(request.path_params["number"], _json(request))


def _drop_in(request: Request, shop: Workshop) -> dict[str, Any]:
    return shop.drop_in(request.query_params.get("name", ""), request.scope["read"]).describe()


def _rule_file(request: Request, shop: Workshop) -> Response:
    rule = shop.rule(request.path_params["number"])
    data = (shop.folder / f"rule-{rule.number}.safetensors").read_bytes()
    return _file(data, f"{''.join(c if c.isalnum() else '_' for c in rule.name)[:60] or 'rule'}.safetensors")


def _choose_layer(request: Request, shop: Workshop) -> None:
    wanted = _json(request)
    if not isinstance(wanted, dict) or not isinstance(wanted.get("name"), str):
        raise RewriteCoreError("A layer is chosen by an object with its name.")
    shop.choose_layer(wanted["name"])


def serve(
    workshop: Workshop,
    port: int,
    token: str | None = None,
    ready: Callable[[str], Awaitable[None] | None] | None = None,
) -> None:
    """Serve until interrupted. `ready` is told the page's address once the port answers.

    Raises OSError where the port is taken.
    """
    import socket

    import uvicorn

    # asyncio sends small answers at once only where the protocol is named; else each waits 40 ms for the last one
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    port = listener.getsockname()[1]
    app = make_app(workshop, port, token)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, server_header=False
    )
    if ready is not None:
        listener.listen()
        ready(f"http://127.0.0.1:{port}/?token={app.state.token}")
    with workshop.open():
        uvicorn.Server(config).run(sockets=[listener])
