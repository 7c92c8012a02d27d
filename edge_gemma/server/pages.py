"""The page for people: its files, and the headers that keep it from harm.

Owns: which files there are, what browsers may do with them. Does not know: what the page does (page/), models.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

_FOLDER = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml", ".LICENSE": "text/plain; charset=utf-8",
}  # fmt: skip
# Nothing from elsewhere and nothing written into the page; text becomes elements through the sanitiser alone.
_POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:",
        "media-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "require-trusted-types-for 'script'", "trusted-types dompurify",
    )
)  # fmt: skip
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(self), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",  # asked for again each time; the tag saves sending it
}


@dataclass(frozen=True)
class _File:
    data: bytes
    media_type: str
    tag: str


class Pages:
    """Endpoints of the page: `/` and what lies below `/page/`."""

    def __init__(self) -> None:
        self._files = {str(path.relative_to(_FOLDER)): _read(path) for path in _FOLDER.rglob("*") if path.is_file()}

    def routes(self) -> list[BaseRoute]:
        """The routes. `/` is only for clients that read HTML: a route after these answers the others."""
        return [_ForBrowsers("/", self.index), Route("/page/{name:path}", self.file)]

    async def index(self, request: Request) -> Response:
        """The page itself."""
        return self._response(request, "index.html", {"Vary": "Accept"})

    async def file(self, request: Request) -> Response:
        """A file that the page needs."""
        return self._response(request, request.path_params["name"], {})

    def _response(self, request: Request, name: str, more: dict[str, str]) -> Response:
        file = self._files.get(name)
        if file is None:
            raise HTTPException(404)
        headers = _HEADERS | more | {"ETag": file.tag}
        known = (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(","))
        if file.tag in known:
            return Response(status_code=304, headers=headers)
        return Response(file.data, media_type=file.media_type, headers=headers)


class _ForBrowsers(Route):
    """A route for clients that say they accept HTML."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        headers = dict(scope.get("headers", ()))
        if b"text/html" not in headers.get(b"accept", b""):
            return Match.NONE, {}
        return super().matches(scope)


def _read(path: Path) -> _File:
    data = path.read_bytes()
    return _File(
        data, _TYPES.get(path.suffix, "application/octet-stream"), f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    )
