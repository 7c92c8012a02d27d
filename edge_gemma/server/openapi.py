"""The server's description for programs: OpenAPI 3.1, at /openapi.json.

Owns: which fields a request may have, in JSON Schema. Does not know: what they do. tests/server/test_openapi.py sends
what this allows, and what it does not.
"""

from typing import Any

from edge_gemma import __version__

Schema = dict[str, Any]


def _text(about: str = "", **more: Any) -> Schema:
    return {"type": "string", **({"description": about} if about else {}), **more}


def _number(least: float | None = None, most: float | None = None, about: str = "") -> Schema:
    bounds = {"minimum": least, "maximum": most, "description": about or None}
    return {"type": "number"} | {name: value for name, value in bounds.items() if value is not None}


def _whole(least: int, most: int | None = None, about: str = "") -> Schema:
    return _number(least, most, about) | {"type": "integer"}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _object(properties: dict[str, Schema], required: tuple[str, ...] = (), **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


FLAG: Schema = {"type": "boolean"}
ANYTHING: Schema = {"type": "object"}
TEXTS: Schema = {"oneOf": [_text(), _list(_text())]}
SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 2), "top_p": _number(0.01, 1), "top_k": _whole(0), "min_p": _number(0, 1),
    "repetition_penalty": _number(0.1, 10), "seed": {"type": "integer"}, "stop": TEXTS,
}  # fmt: skip
TOOL = _object(
    {
        "type": {"const": "function"},
        "function": _object(
            {"name": _text(pattern=r"^[A-Za-z0-9_\-]{1,64}$"), "description": _text(), "parameters": ANYTHING},
            ("name",),
        ),
    },
    ("type", "function"),
)
PARTS = _list(
    {
        "oneOf": [
            _object({"type": {"const": "text"}, "text": _text()}, ("type", "text")),
            _object(
                {"type": {"const": "input_audio"}, "input_audio": _object({"data": _text("base64")}, ("data",))},
                ("type", "input_audio"),
            ),
            _object(
                {
                    "type": {"const": "image_url"},
                    "image_url": _object({"url": _text(), "detail": _text(enum=["auto", "low", "high"])}, ("url",)),
                },
                ("type", "image_url"),
            ),
        ]
    },
    minItems=1,
)
MESSAGE = _object(
    {
        "role": _text(enum=["system", "developer", "user", "assistant", "tool"]),
        "content": {"oneOf": [_text(), PARTS, {"type": "null"}]},
        "reasoning_content": _text(),
        "tool_calls": _list(ANYTHING),
        "tool_call_id": _text(),
        "name": _text(),
    },
    ("role", "content"),
)
FORMAT = {
    "oneOf": [
        _object({"type": {"enum": ["text", "json_object"]}}, ("type",)),
        _object(
            {"type": {"const": "json_schema"}, "json_schema": _object({"schema": ANYTHING}, ("schema",))},
            ("type", "json_schema"),
        ),
    ]
}
CHAT = _object(
    {
        "model": _text("A name that GET /v1/models tells; the default without one"),
        "messages": _list(_ref("Message"), minItems=1),
        "stream": FLAG,
        "stream_options": _object({"include_usage": FLAG}),
        "max_tokens": _whole(1),
        "max_completion_tokens": _whole(1),
        "tools": _list(_ref("Tool")),
        "tool_choice": {"oneOf": [{"enum": ["none", "auto", "required"]}, ANYTHING]},
        "parallel_tool_calls": FLAG,
        "response_format": FORMAT,
        "logprobs": FLAG,
        "top_logprobs": _whole(0, 20),
        "reasoning_effort": _text(enum=["none", "minimal", "low", "medium", "high", "xhigh"]),
        "n": {"const": 1},
        **SAMPLING,
    },
    ("messages",),
)
COMPLETION = _object(
    {
        "model": _text(), "prompt": {"oneOf": [_text(), _list(_text(), minItems=1, maxItems=1)]}, "stream": FLAG,
        "max_tokens": _whole(1), "logprobs": _whole(0, 5), **SAMPLING,
    },
    ("prompt",),
)  # fmt: skip
RESPONSE = _object(
    {
        "model": _text(),
        "input": {"oneOf": [_text(), _list(ANYTHING)]},
        "instructions": _text(),
        "stream": FLAG,
        "max_output_tokens": _whole(1),
        "tools": _list(ANYTHING),
        "tool_choice": {"oneOf": [{"enum": ["none", "auto", "required"]}, ANYTHING]},
        "text": ANYTHING,
        "reasoning": _object({"effort": _text()}),
        "temperature": _number(0, 2),
        "top_p": _number(0.01, 1),
    },
    ("input",),
)
OLLAMA_COMMON: dict[str, Schema] = {
    "model": _text(), "stream": FLAG, "format": {"oneOf": [_text(), ANYTHING]}, "options": ANYTHING,
    "think": {"oneOf": [FLAG, _text()]}, "keep_alive": {"oneOf": [_text(), {"type": "number"}]},
}  # fmt: skip
OLLAMA_CHAT = _object(OLLAMA_COMMON | {"messages": _list(ANYTHING), "tools": _list(ANYTHING)}, ("model",))
OLLAMA_GENERATE = _object(
    OLLAMA_COMMON | {"prompt": _text(), "system": _text(), "raw": FLAG, "images": _list(_text())}, ("model",)
)
OLLAMA_NAME = _object({"model": _text(), "name": _text(), "stream": FLAG})
TRANSCRIPTION = _object(
    {
        "file": _text("A sound file", format="binary"),
        "model": _text(),
        "language": _text(),
        "prompt": _text(),
        "response_format": _text(enum=["json", "text", "srt", "vtt", "verbose_json"]),
        "temperature": _number(0, 1),
        "stream": FLAG,
    },
    ("file",),
)


def _operation(about: str, schema: Schema | None = None, kind: str = "application/json") -> Schema:
    body = {} if schema is None else {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}
    refused = {"description": "What was got, what was expected"}
    return {"summary": about, "responses": {"200": {"description": "Done"}, "4XX": refused, "503": refused}} | body


def document() -> Schema:
    """The whole description."""
    posts = {
        "/v1/chat/completions": _operation("Answer a conversation", _ref("Chat")),
        "/v1/completions": _operation("Go on with a text", COMPLETION),
        "/v1/responses": _operation("Answer, in the form of OpenAI's responses", RESPONSE),
        "/v1/audio/transcriptions": _operation("Write down speech", TRANSCRIPTION, "multipart/form-data"),
        "/v1/audio/translations": _operation("Translate speech into English", TRANSCRIPTION, "multipart/form-data"),
        "/api/chat": _operation("Answer a conversation, as Ollama", OLLAMA_CHAT),
        "/api/generate": _operation("Answer a prompt, as Ollama", OLLAMA_GENERATE),
        "/api/show": _operation("What a model is", OLLAMA_NAME),
        "/api/pull": _operation("Whether a model is there", OLLAMA_NAME),
    }
    gets = {
        "/v1/models": "All models", "/health": "Whether requests are answered", "/metrics": "Figures for Prometheus",
        "/api/tags": "All models, as Ollama", "/api/ps": "The model that is open", "/api/version": "The version",
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "edge-gemma serve", "version": __version__},
        "paths": {path: {"post": operation} for path, operation in posts.items()}
        | {path: {"get": _operation(about)} for path, about in gets.items()},
        "components": {"schemas": {"Message": MESSAGE, "Tool": TOOL, "Chat": CHAT}},
    }
