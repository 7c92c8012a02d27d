"""The HTTP endpoints of OpenAI's protocol that answer in text.

Owns: paths. Does not know: the fields of a request (openai_chat.py), how answers are sent (sending.py).
"""

from asyncio import (
    to_thread,  # requests are read in threads, for a schema may take a second, and so are models' folders
)

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge_gemma.errors import EdgeGemmaError
from edge_gemma.server.about import about
from edge_gemma.server.bodies import json_body
from edge_gemma.server.desk import Desk
from edge_gemma.server.models import Offer
from edge_gemma.server.openai_chat import ChatWriter, read_chat, read_usage
from edge_gemma.server.openai_completions import CompletionWriter, read_completion
from edge_gemma.server.openai_response_events import ResponseWriter
from edge_gemma.server.openai_responses import NOT_STORED, read_response
from edge_gemma.server.refusals import Refusal
from edge_gemma.server.sending import respond


class OpenAI:
    """Endpoints below /v1."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def routes(self) -> list[Route]:
        """The routes of this protocol."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
            Route("/v1/responses/{rest:path}", self.stored, methods=["GET", "POST", "DELETE"]),
        ]

    async def models(self, request: Request) -> Response:
        """All models."""
        return JSONResponse(await to_thread(self._list))

    def _list(self) -> dict[str, object]:
        return {"object": "list", "data": [_entry(offer) for offer in self._desk.models.offers()]}

    async def model(self, request: Request) -> Response:
        """One model."""
        return JSONResponse(await to_thread(lambda: _entry(self._desk.models.find(request.path_params["name"]))))

    async def chat(self, request: Request) -> Response:
        """Chat completions."""
        body = await json_body(request)
        ask = await to_thread(read_chat, body)
        writer = ChatWriter(self._desk.models.find(ask.model).name, usage=read_usage(body))
        return await respond(request, self._desk, ask, writer, stream=body.flag("stream"))

    async def completions(self, request: Request) -> Response:
        """Continuations of a text."""
        body = await json_body(request)
        ask = await to_thread(read_completion, body)
        writer = CompletionWriter(self._desk.models.find(ask.model).name, usage=read_usage(body))
        return await respond(request, self._desk, ask, writer, stream=body.flag("stream"))

    async def responses(self, request: Request) -> Response:
        """Responses."""
        body = await json_body(request)
        ask = await to_thread(read_response, body)
        writer = ResponseWriter(self._desk.models.find(ask.model).name, body.values)
        return await respond(request, self._desk, ask, writer, stream=body.flag("stream"))

    async def stored(self, request: Request) -> Response:
        """Responses that were made before: there are none."""
        raise Refusal(404, NOT_STORED, code="not_stored")


def _entry(offer: Offer) -> dict[str, object]:
    return {"id": offer.name, "object": "model", "created": offer.created, "owned_by": "edge-gemma"} | _able(offer)


def _able(offer: Offer) -> dict[str, object]:
    """What a model reads, in llama.cpp's words, and what it can do, in Ollama's. A broken folder tells when used."""
    try:
        model = about(offer)
    except (EdgeGemmaError, OSError):
        return {}
    return {
        "architecture": {
            "input_modalities": ["text", *["image"] * model.sees, *["audio"] * model.hears],
            "output_modalities": ["text"],
        },
        "capabilities": model.capabilities,
    }
