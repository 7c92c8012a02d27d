"""The HTTP endpoints of Ollama's protocol.

Owns: paths, opening and closing a model on request, what is refused. Does not know: the fields of chats (ollama.py)
and of models (ollama_models.py).
"""

from asyncio import to_thread
from collections.abc import Callable, Iterator
from contextlib import aclosing
from threading import Event
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from edge_gemma import __version__
from edge_gemma.engine import Engine
from edge_gemma.server.about import about
from edge_gemma.server.bodies import Fields, json_body
from edge_gemma.server.desk import Desk
from edge_gemma.server.models import Offer, UnknownModelError
from edge_gemma.server.ollama import IMAGES, OllamaWriter, read_chat, read_generate, read_keep_alive
from edge_gemma.server.ollama_models import running, show, tagged, tags
from edge_gemma.server.refusals import Refusal
from edge_gemma.server.sending import client_of, json_line, respond
from edge_gemma.server.streams import unless_gone

API_VERSION = "0.40.12"  # of Ollama: clients that need a feature look at it
_EMBEDDINGS = "embeddings are not made here: take another server for them"
_FILES = "models are kept on the server's machine: use edge-gemma pull, models and models rm there"
_REFUSED = {
    "/api/embed": _EMBEDDINGS, "/api/embeddings": _EMBEDDINGS, "/api/create": _FILES, "/api/copy": _FILES,
    "/api/delete": _FILES, "/api/push": _FILES, "/api/blobs/{digest}": _FILES,
}  # fmt: skip


class Ollama:
    """Endpoints below /api, and what programs find at /."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def routes(self) -> list[Route]:
        """The routes of this protocol. A page at /, which browsers get, comes before them."""
        return [
            Route("/", self.root),
            Route("/api/version", self.version),
            Route("/api/tags", self.tags),
            Route("/api/ps", self.ps),
            Route("/api/show", self.show, methods=["POST"]),
            Route("/api/chat", self.chat, methods=["POST"]),
            Route("/api/generate", self.generate, methods=["POST"]),
            Route("/api/pull", self.pull, methods=["POST"]),
            *(Route(path, _refusing(why), methods=["POST", "DELETE", "HEAD"]) for path, why in _REFUSED.items()),
        ]

    async def root(self, request: Request) -> Response:
        """The words that clients look for."""
        return PlainTextResponse("Ollama is running")

    async def version(self, request: Request) -> Response:
        """The version of Ollama whose protocol this is."""
        return JSONResponse({"version": API_VERSION, "edge_gemma": __version__})

    async def tags(self, request: Request) -> Response:
        """All models."""
        return JSONResponse(await to_thread(lambda: tags(self._desk.models.offers())))

    async def ps(self, request: Request) -> Response:
        """The open model."""
        return JSONResponse(await to_thread(self._running))

    def _running(self) -> dict[str, Any]:
        loaded = self._desk.models.loaded
        return {"models": []} if loaded is None else running(self._desk.models.find(loaded.name), loaded)

    async def show(self, request: Request) -> Response:
        """One model in full."""
        name = _name(await json_body(request))
        return JSONResponse(await to_thread(lambda: show(self._desk.models.find(name))))

    async def chat(self, request: Request) -> Response:
        """A chat; without messages the model is opened or closed."""
        body = await json_body(request)
        offer = self._desk.models.find(body.text("model"))
        writer = self._writer(body, offer, chat=True)
        if not body.objects("messages"):
            return await self._nothing(request, body, offer, writer)
        ask = await to_thread(read_chat, body)
        return await respond(request, self._desk, ask, writer, stream=_streams(body))

    async def generate(self, request: Request) -> Response:
        """A generation; without a prompt the model is opened or closed."""
        body = await json_body(request)
        offer = self._desk.models.find(body.text("model"))
        writer = self._writer(body, offer, chat=False)
        if not body.text("prompt") and not body.take("images", list, IMAGES):
            return await self._nothing(request, body, offer, writer)
        has_chat = (await to_thread(about, offer)).template is not None
        ask = await to_thread(lambda: read_generate(body, has_chat=has_chat))
        return await respond(request, self._desk, ask, writer, stream=_streams(body))

    def _writer(self, body: Fields, offer: Offer, *, chat: bool) -> OllamaWriter:
        models = self._desk.models
        before = models.loaded

        def load_s() -> float:
            now = models.loaded
            return 0.0 if now is None or now is before else now.load_s

        return OllamaWriter(body.text("model") or tagged(offer.name), chat=chat, load_s=load_s)

    async def _nothing(self, request: Request, body: Fields, offer: Offer, writer: OllamaWriter) -> Response:
        keep_s = read_keep_alive(body)
        if keep_s == 0:
            self._desk.models.unload(offer.name)
            return JSONResponse(writer.nothing("unload"))
        await unless_gone(request, self._opened(offer, client_of(request), keep_s))
        return JSONResponse(writer.nothing("load"))

    async def _opened(self, offer: Offer, client: str, keep_s: float | None) -> None:
        def work(engine: Engine, stopping: Event) -> Iterator[None]:
            yield None

        async with aclosing(self._desk.run(work, offer.name, client, keep_s=keep_s)) as steps:
            async for _ in steps:
                pass

    async def pull(self, request: Request) -> Response:
        """Says that a model is there. Others are pulled on the server's machine."""
        body = await json_body(request)
        name = _name(body)
        try:
            self._desk.models.find(name)
        except UnknownModelError as error:
            told = f"{error}; pull it on the server's machine: edge-gemma pull NAME"
            raise Refusal(404, told, code="model_not_found", param="model") from None
        if not _streams(body):
            return JSONResponse({"status": "success"})
        lines = [{"status": status} for status in ("pulling manifest", "verifying sha256 digest", "success")]
        return Response(b"".join(map(json_line, lines)), media_type="application/x-ndjson")


def _refusing(why: str) -> Callable[[Request], Any]:
    async def refuse(request: Request) -> Response:
        raise Refusal(400, why, code="unsupported")

    return refuse


def _name(body: Fields) -> str | None:
    """The model's name, also under its older key."""
    return body.text("model") or body.text("name")


def _streams(body: Fields) -> bool:
    """Whether an answer comes in lines, which is the rule."""
    return bool(body.take("stream", bool, "true or false", True))
