"""What a client is told when something cannot be done: a status, one line, and words for programs.

Owns: which error has which status. Does not know: how a protocol writes it down.
"""

from dataclasses import dataclass, field

from edge_gemma.errors import (
    AudioError,
    ContextFullError,
    EdgeGemmaError,
    ModelFolderError,
    TemplateError,
    UsageError,
)
from edge_gemma.server.desk import NotReadyError, TooManyLiveError
from edge_gemma.server.models import BusyModelError, UnknownModelError
from edge_gemma.server.queue import RETRY_S, QueueFull


@dataclass(eq=False)  # not frozen: contextlib sets __traceback__
class Refusal(Exception):
    """status: of HTTP. kind, code: OpenAI's words for it. param: the field that is wrong."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error. Of one that is ours it learns nothing."""
    message = " ".join(str(error).split())
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UnknownModelError):
        return Refusal(404, message, code="model_not_found", param="model")
    if isinstance(error, QueueFull):
        told = "too many requests wait: ask again in a few seconds"
        return Refusal(429, told, "rate_limit_error", "queue_full", headers={"Retry-After": str(RETRY_S)})
    if isinstance(error, NotReadyError):
        told = "the model is being loaded: ask again in a few seconds"
        return Refusal(503, told, "server_error", "loading", headers={"Retry-After": str(RETRY_S)})
    if isinstance(error, TooManyLiveError):
        told = "as many live streams are heard as can be: try again later"
        return Refusal(429, told, "rate_limit_error", "too_many_live", headers={"Retry-After": str(RETRY_S)})
    if isinstance(error, BusyModelError):
        return Refusal(503, message, "server_error", "model_busy", headers={"Retry-After": str(RETRY_S)})
    if isinstance(error, ContextFullError):
        return Refusal(400, message, code="context_length_exceeded", param="messages")
    if isinstance(error, UsageError | AudioError | TemplateError):
        return Refusal(400, message)
    if isinstance(error, ModelFolderError | MemoryError):
        told = message or "there is not enough memory"
        return Refusal(503, f"the model cannot be opened: {told}", "server_error", "model_unavailable")
    if isinstance(error, EdgeGemmaError):
        return Refusal(400, message)
    return Refusal(500, "something went wrong in the server: its log says more", "server_error", "internal")
