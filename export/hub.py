"""A model hub: which files a repository has at a commit, and ranges of their bytes.

Owns: talking to the hub through huggingface_hub, so that tokens, mirrors (HF_ENDPOINT) and proxies work as people know
them; every error in one line; going on after a lost connection. Does not know: what the files are.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from edge_gemma import __version__
from edge_gemma.errors import HubError
from edge_gemma.export.source_file import few, show

PATIENCE_S = 300.0  # how long the hub may give nothing before it is given up
_TIMEOUT_S = 30.0  # without a byte: the connection counts as lost
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_CHUNK = 1 << 20
ANEW = "the same command begins anew"
_MAX_FILES = 10_000
_MAX_LISTING = 32 << 20  # bytes


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at a commit."""

    name: str
    size: int  # bytes
    sha256: str | None  # of large files, as the hub states it


@dataclass(frozen=True)
class Repository:
    """A repository, pinned to a commit."""

    repo_id: str  # "owner/repo"
    commit: str  # 40 hexadecimal digits
    files: dict[str, HubFile] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {"repo_id": self.repo_id, "commit": self.commit, "files": [vars(file) for file in self.files.values()]}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Repository":
        files = [HubFile(**file) for file in value["files"]]
        return cls(value["repo_id"], value["commit"], {file.name: file for file in files})


class ChangedError(HubError):
    """A file has changed since the pull began, so what has arrived of it is of no use."""


class Hub:
    """The hub that HF_ENDPOINT names, or huggingface.co.

    A request that fails for a reason that may pass (the network, 429, 5xx) is tried again, after what the hub asks for
    or a growing pause, until it has given nothing for `patience_s`. `fetched` counts the bytes that came.
    """

    def __init__(self, *, note: Callable[[str], None] = lambda text: None, patience_s: float | None = None) -> None:
        """note is told of pauses."""
        import huggingface_hub.constants

        self.endpoint = huggingface_hub.constants.ENDPOINT
        self.fetched = 0
        self._patience = _Patience(PATIENCE_S if patience_s is None else patience_s, note)
        self._tags: dict[tuple[str, str], str] = {}  # (commit, file) -> its first ETag

    def repository(self, repo_id: str, revision: str | None = None) -> Repository:
        """The repository as it is now; revision: a branch, tag or commit. Raises HubError."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        what = f"{repo_id}{f'@{revision}' if revision else ''}"
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise _told(error, repo_id, self.endpoint) from error
        commit, files = self._patiently(lambda: self._listing(repo_id, revision), what)
        return Repository(repo_id, commit, {file.name: file for file in files})

    def _listing(self, repo_id: str, revision: str | None) -> tuple[str, list[HubFile]]:
        """Commit and files, as the hub lists them."""
        from huggingface_hub import get_session

        url = f"{self.endpoint}/api/models/{repo_id}"
        url += f"/revision/{quote(revision, safe='')}" if revision else ""
        with get_session().stream(
            "GET", url, headers=_headers(), params={"blobs": True}, follow_redirects=True, timeout=_TIMEOUT_S
        ) as response:
            _raise_for_status(response)
            data = _body(response, _MAX_LISTING)
        try:
            listing = json.loads(data)
            commit, siblings = listing["sha"], listing["siblings"]
            if not re.fullmatch(r"[0-9a-f]{40}", commit) or len(siblings) > _MAX_FILES:
                raise ValueError
            return commit, [file for sibling in siblings if (file := _hub_file(sibling)) is not None]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise HubError(
                f"{self.endpoint} does not list the files of {repo_id} at a commit: it is no model hub, or a broken one"
            ) from error

    def read(self, repository: Repository, file: HubFile, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) of a file in pieces of up to 1 MB; 0 and its size ask for all. Raises HubError."""
        at = start
        while at < stop:
            if self._patience.closed.is_set():
                raise HubError(f"{show(file.name, 160)} was given up")
            try:
                for chunk in self._stream(repository, file, at, stop):
                    at += len(chunk)
                    self.fetched += len(chunk)
                    self._patience.renew()
                    yield chunk
                if at < stop:
                    raise _Lost("the connection ended early")
            except _Lost as lost:
                self._patience.wait(lost, f"{file.name} at {at / 1e6:.1f} of {file.size / 1e6:.1f} MB")

    def _stream(self, repository: Repository, file: HubFile, start: int, stop: int) -> Iterator[bytes]:
        """One request. Raises _Lost where another may help, HubError where none will."""
        import httpx2
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.errors import RevisionNotFoundError

        url = hf_hub_url(repository.repo_id, file.name, revision=repository.commit, endpoint=self.endpoint)
        headers = _headers()
        if (start, stop) != (0, file.size):
            headers["Range"] = f"bytes={start}-{stop - 1}"
        try:
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S
            ) as response:
                _raise_for_status(response)
                self._check(response, repository, file, start, stop)
                left = stop - start
                for data in response.iter_raw():  # as it comes: what has come counts when the rest does not
                    if len(data) > left:
                        raise self._changed(file, "it is longer than before")
                    left -= len(data)
                    yield from (data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK))
        except httpx2.TransportError as error:
            raise _Lost(show(error) or type(error).__name__) from error
        except RevisionNotFoundError as error:
            raise ChangedError(f"{self.endpoint} no longer has the commit the pull began with: {ANEW}") from error
        except Exception as error:
            raise _told(error, repository.repo_id, self.endpoint) from error

    def _check(self, response: Any, repository: Repository, file: HubFile, start: int, stop: int) -> None:
        """That the answer is about these bytes of the file as it was."""
        answers = [*response.history, response]
        tags = [tag for r in answers if (tag := r.headers.get("X-Linked-Etag"))] or [response.headers.get("ETag")]
        if tags[0] and self._tags.setdefault((repository.commit, file.name), tags[0]) != tags[0]:
            raise self._changed(file, "its ETag differs")
        asked_whole = (start, stop) == (0, file.size)
        if response.status_code == 200 and not asked_whole:
            raise HubError(f"{response.url.host} sends whole files only, no ranges: pull cannot go on where it stopped")
        if response.status_code != 206 and not (response.status_code == 200 and asked_whole):
            raise HubError(f"{response.url.host} answers {response.status_code} for {show(file.name, 160)}")
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise HubError(f"{response.url.host} sends {show(file.name, 160)} encoded ({show(encoding)}), unasked")
        whole = file.size
        if response.status_code == 206:
            given = re.fullmatch(
                r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", response.headers.get("Content-Range", "")
            )
            if not given or (int(given[1]), int(given[2])) != (start, stop - 1):
                raise _Lost(f"bytes {start} to {stop - 1} were asked for, the answer is about others")
            whole = int(given[3])
        elif (length := response.headers.get("Content-Length")) is not None and re.fullmatch(r"[0-9]{1,18}", length):
            whole = int(length)
        if whole != file.size:
            raise self._changed(file, f"it has {whole} bytes, expected {file.size}")

    def _changed(self, file: HubFile, how: str) -> ChangedError:
        return ChangedError(f"{file.name} changed on the hub while it was fetched: {how}; {ANEW}")

    def close(self) -> None:
        """Wake the threads that pause. There are no more tries."""
        self._patience.closed.set()

    def _patiently(self, ask: Callable[[], Any], what: str) -> Any:
        while True:
            try:
                answer = ask()
            except Exception as error:
                told = _told(error, what, self.endpoint)
                if not isinstance(told, _Lost):
                    raise told from error
                self._patience.wait(told, what)
            else:
                self._patience.renew()
                return answer


class _Lost(Exception):
    """A request that another try may answer. after_s: seconds to wait, if the hub says so."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


class _Patience:
    """Pauses between tries, and the end of them."""

    def __init__(self, seconds: float, note: Callable[[str], None]) -> None:
        self._seconds, self._note = seconds, note
        self._since: float | None = None  # when the first of the tries in vain ended
        self.closed = threading.Event()
        self.renew()

    def renew(self) -> None:
        """A byte came."""
        self._since, self._pause = None, _FIRST_WAIT_S

    def wait(self, lost: _Lost, what: str) -> None:
        """Pause before the next try. Raises HubError when nothing came for too long."""
        pause = min(self._pause if lost.after_s is None else lost.after_s, 10 * _LONGEST_WAIT_S)
        self._pause = min(2 * self._pause, _LONGEST_WAIT_S)
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now + pause - self._since > self._seconds:
            raise HubError(f"{show(what, 160)}: {lost}; the same command goes on from here when the network is back")
        self._note(f"{show(what, 160)}: {lost}; trying again in {pause:.0f} s")
        if self.closed.wait(pause):
            raise HubError(f"{show(what, 160)} was given up")


def _hub_file(sibling: dict[str, Any]) -> HubFile | None:
    """A file as the hub lists it, None without a size. Raises HubError for a name that no file beside others has."""
    name, size = sibling["rfilename"], sibling.get("size")
    if not isinstance(name, str) or not name.isprintable() or {"", ".", ".."} & set(re.split(r"[/\\]", name)):
        raise HubError(f"the hub lists a file {show(repr(name))}, expected a path inside the repository")
    digest = str((sibling.get("lfs") or {}).get("sha256")).lower()
    digest_known = re.fullmatch(r"[0-9a-f]{64}", digest)
    return HubFile(name, size, digest if digest_known else None) if type(size) is int and size >= 0 else None


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="edge_gemma", library_version=__version__)
    return headers | {"Accept-Encoding": "identity"}


def _body(response: Any, limit: int) -> bytes:
    """An answer of at most `limit` bytes, within the time that a connection may be silent. Raises HubError, _Lost."""
    data, begin = bytearray(), time.monotonic()
    for chunk in response.iter_bytes(1 << 16):
        data += chunk
        if len(data) > limit:
            raise HubError(f"{response.url.host} answers with more than {limit} bytes, where few were expected")
        if time.monotonic() - begin > _TIMEOUT_S:
            raise _Lost(f"{response.url.host} answers too slowly")
    return bytes(data)


def _raise_for_status(response: Any) -> None:
    """huggingface_hub's own, without the body of a refusal: it has no bound, and the headers say what is needed."""
    import httpx2
    from huggingface_hub.utils import hf_raise_for_status

    framing = ("content-encoding", "content-length", "transfer-encoding")
    headers = {name: value for name, value in response.headers.items() if name.lower() not in framing}
    if response.is_error:
        hf_raise_for_status(httpx2.Response(response.status_code, headers=headers, request=response.request))


def _told(error: Exception, what: str, endpoint: str) -> Exception:
    """An error of the hub's client, as a HubError of one line or as _Lost."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, HubError | _Lost):
        return error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, httpx2.TransportError) or status in (408, 425, 429) or (status or 0) >= 500:
        reason = f"{endpoint} answers {status}" if status else show(error) or type(error).__name__
        return _Lost(reason, _retry_after(error) if status else None)
    token = "make one at the hub's settings/tokens and set HF_TOKEN to it, or run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{what} is gated: accept its terms at {endpoint}/{what.partition('@')[0]} in a browser, then let the hub "
            f"know you by a token ({token})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{endpoint} has no such revision of {what}: expected a branch, a tag or a commit after the @")
    if isinstance(error, errors.EntryNotFoundError):
        return ChangedError(f"{endpoint} no longer has a file of {what}: {ANEW}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(f"{endpoint} shows no model {what}: check the name; a private one needs a token ({token})")
    if status in (401, 403):
        check = f"check the name, the token in HF_TOKEN, and what it may read ({token})"
        return HubError(f"{endpoint} refuses {what} ({status}): {check}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set: unset it to pull")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{show(what)} is no name of a repository: expected owner/repo")
    if isinstance(error, errors.HfHubHTTPError | httpx2.HTTPError | httpx2.InvalidURL | ValueError):
        return HubError(f"{endpoint} answers {status or ''} {few([' '.join(str(error).split())])}")
    return error


def _retry_after(error: Exception) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date."""
    response: Any = getattr(error, "response", None)
    given = response.headers.get("Retry-After")
    if given is None:
        return None
    if given.strip().isdecimal():
        return float(given)
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except ValueError:
        return None
