"""The parts of the server put together.

Owns: the application, what it answers by itself. Does not know: sockets (run.py), protocols.
"""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from edge_gemma import __version__
from edge_gemma.server.desk import Desk
from edge_gemma.server.guard import Guard, Rules, told
from edge_gemma.server.live import Live
from edge_gemma.server.ollama_http import Ollama
from edge_gemma.server.openai_audio import OpenAIAudio
from edge_gemma.server.openai_http import OpenAI
from edge_gemma.server.openapi import document
from edge_gemma.server.pages import Pages
from edge_gemma.server.realtime import Realtime
from edge_gemma.server.refusals import Refusal


def application(desk: Desk, rules: Rules, live: Live) -> Starlette:
    """The server's HTTP side."""

    async def health(request: Request) -> Response:
        ready = desk.ready.is_set()
        body = {"status": "ok" if ready else "loading", "version": __version__, "model": desk.models.default.name}
        return JSONResponse(body, 200 if ready else 503)

    async def metrics(request: Request) -> Response:
        return Response(desk.watch.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(request: Request) -> Response:
        return JSONResponse(document())

    routes: list[BaseRoute] = [Route("/health", health), Route("/metrics", metrics), Route("/openapi.json", openapi)]
    # the page first: at / it leaves clients that do not ask for HTML to Ollama
    for door in (Pages(), Ollama(desk), OpenAI(desk), OpenAIAudio(desk), Realtime(desk, live)):
        routes += door.routes()
    middleware = [Middleware(Guard, rules=rules, count=desk.watch.requested)]
    if rules.origins:  # around the guard: a page may read refusals, too
        middleware.insert(
            0, Middleware(CORSMiddleware, allow_origins=list(rules.origins), allow_methods=["*"], allow_headers=["*"])
        )
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is nothing at {request.url.path:.100}", 405: f"{request.method} is not for this path"}
    refusal = Refusal(error.status_code, words.get(error.status_code, error.detail), headers=dict(error.headers or {}))
    return told(refusal, request.url.path)
