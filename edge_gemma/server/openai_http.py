"""The HTTP endpoints of OpenAI's protocol that answer in text.

Owns: paths, whole and streamed responses. Does not know: the fields of a request (openai_chat.py).
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge_gemma.generation.generate import Result
from edge_gemma.server.ask import Ask, Step
from edge_gemma.server.bodies import Fields, json_body
from edge_gemma.server.desk import Desk
from edge_gemma.server.guard import openai_error
from edge_gemma.server.models import Offer
from edge_gemma.server.openai_chat import ChatWriter, read_chat
from edge_gemma.server.refusals import refusal_of
from edge_gemma.server.streams import DONE, PING, Streamed, event, paced, unless_gone


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
        ]

    async def models(self, request: Request) -> Response:
        """All models."""
        return JSONResponse({"object": "list", "data": [_entry(offer) for offer in self._desk.models.offers()]})

    async def model(self, request: Request) -> Response:
        """One model."""
        return JSONResponse(_entry(self._desk.models.find(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        """Chat completions."""
        body = await json_body(request)
        ask = read_chat(body)
        options = body.object("stream_options") or Fields({})
        writer = ChatWriter(self._desk.models.find(ask.model).name, usage=options.flag("include_usage"))
        if not body.flag("stream"):
            steps, result = await unless_gone(request, whole(self._desk, ask, client_of(request)))
            return JSONResponse(writer.whole(steps, result))
        steps_of = paced(self._desk.answer(ask, client_of(request)))
        first = await unless_gone(request, anext(steps_of))
        return Streamed(_events(writer, first, steps_of), "text/event-stream")


async def whole(desk: Desk, ask: Ask, client: str) -> tuple[list[Step], Result]:
    """An answer, once it is finished."""
    steps: list[Step] = []
    async with aclosing(desk.answer(ask, client)) as parts:
        async for part in parts:
            if isinstance(part, Result):
                return steps, part
            steps.append(part)
    raise RuntimeError("an answer has ended without its result")


async def _events(
    writer: ChatWriter, first: Step | Result | None, rest: AsyncGenerator[Step | Result | None, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield event(writer.begin())
        try:
            for chunk in _chunks(writer, first):
                yield chunk
            async for part in rest:
                for chunk in _chunks(writer, part):
                    yield chunk
        except Exception as error:
            yield event({"error": openai_error(refusal_of(error))})
        yield DONE


def _chunks(writer: ChatWriter, part: Step | Result | None) -> list[bytes]:
    if part is None:
        return [PING]
    entries = writer.end(part) if isinstance(part, Result) else writer.step(part)
    return [event(entry) for entry in entries]


def client_of(request: Request) -> str:
    """Who asks, for a fair order."""
    return request.client.host if request.client else "-"


def _entry(offer: Offer) -> dict[str, object]:
    return {"id": offer.name, "object": "model", "created": offer.created, "owned_by": "edge-gemma"}
