"""The pages for people: a playground at `/`, the dashboard, and the API's description. All of it works offline.

The pages are the same for everybody and hold no data: their scripts ask for it, with a key where the server has keys.
"""

from __future__ import annotations

import gzip
import mimetypes
from functools import cache
from importlib.resources import files

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from kvarena.engine.server.front.dashboard import MAX_WATCHERS, OWN_PREFIX, PoolFeed
from kvarena.engine.server.shared.errors import bad_request, unavailable

_ROOT = files("kvarena.engine.server.front").joinpath("static")
_VENDOR = ("uPlot.iife.min.js", "uPlot.min.css", "swagger-ui-bundle.js", "swagger-ui.css")
_OWN = (
    "pages.css",
    "feed.js",
    "map.js",
    "charts.js",
    "dashboard.js",
    "playground.js",
    "chat.js",
    "docs.js",
    "icon.svg",
)
# Scripts and data come from this server alone, and no other site may put a page into a frame.
_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; img-src 'self' data:"
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_READ = ["GET", "HEAD"]


@cache
def _content(name: str) -> bytes:
    """A file's bytes. Large libraries are packed."""
    if name not in _VENDOR:
        return _ROOT.joinpath(name).read_bytes()
    packed = _ROOT.joinpath("vendor", name + ".gz")
    return gzip.decompress(packed.read_bytes()) if packed.is_file() else _ROOT.joinpath("vendor", name).read_bytes()


def _page(name: str, policy: str = _POLICY) -> Response:
    return Response(_content(name), media_type="text/html", headers=_HEADERS | {"content-security-policy": policy})


def add_static_files(app: FastAPI) -> None:
    """Add what the pages load."""

    @app.api_route("/static/{name}", methods=_READ, include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in _VENDOR and name not in _OWN:
            raise HTTPException(404)
        return Response(_content(name), media_type=mimetypes.guess_type(name)[0], headers=_HEADERS)


def add_docs(app: FastAPI) -> None:
    """Add `/docs`: Swagger UI over `/openapi.json`. It styles its elements in place."""

    @app.api_route("/docs", methods=_READ, include_in_schema=False)
    async def docs() -> Response:
        return _page("docs.html", _POLICY + "; style-src 'self' 'unsafe-inline'")


def add_live_pages(app: FastAPI, feed: PoolFeed) -> None:
    """Add the playground, the dashboard, and the events that both watch."""

    @app.api_route("/", methods=_READ, include_in_schema=False)
    async def playground() -> Response:
        return _page("playground.html")

    @app.api_route("/dashboard", methods=_READ, include_in_schema=False)
    async def dashboard() -> Response:
        return _page("dashboard.html")

    @app.get("/dashboard/events", include_in_schema=False)
    async def events(request: Request, mine: str = "", engine: int = 0) -> Response:
        if mine and not OWN_PREFIX.fullmatch(mine):
            raise bad_request("mine must be 32 hexadecimal digits, which the ids of your requests start with", "mine")
        if feed.num_watchers >= MAX_WATCHERS:
            raise unavailable(f"{MAX_WATCHERS} pages are watching already.", "too_many_watchers")
        if not 0 <= engine < feed.num_engines:
            raise bad_request(f"engine must be below {feed.num_engines}, the number of engines", "engine")
        events = feed.events(request.state.key, mine, engine)
        return StreamingResponse(events, headers={"cache-control": "no-cache"}, media_type="text/event-stream")
