"""A repository of the Hugging Face hub: what it holds, and one request for a part of a file.

`huggingface_hub` gives the session (proxies, offline mode), the token (HF_TOKEN, or the one that
`hf auth login` stored), the address (HF_ENDPOINT), the listing with its checksums, and the meaning
of refusals. The loop over a file's bytes is ours (`pull.transfer`): `hf_hub_download` of 2.4 begins
a file anew in every process, checks no checksum over plain HTTP, and knows no part of a file.

Files come by plain HTTP with ranges, over several connections; HF_HUB_DISABLE_XET has nothing to
turn off. The hub serves what it stores in Xet that way too, up to 50 GB per file
(MAX_HTTP_DOWNLOAD_SIZE in huggingface_hub 2.4); the largest file of a Wan repository has 11.4 GB.
Xet's own protocol gives no file that grows from its begin on, by which a killed download continues,
and a model that is new here shares no chunk with anything. Which of the two is faster was not
measured.

A token goes to the hub alone: httpx2 drops it where a redirect leaves the origin, and the address
that it led to is used without it. No message here quotes a header or the query of an address.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    get_token,
    hf_hub_url,
    hf_raise_for_status,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented

from wanfit.errors import (
    BadDownload,
    BadOption,
    DownloadFailed,
    HubFailed,
    NoAccess,
    NotOnHub,
)

BUSY_STATUSES = (408, 425, 429, 500, 502, 503, 504)  # worth another try after a while
_ENDPOINT = "Check HF_ENDPOINT and what stands between here and there"
_TOKEN = "Set HF_TOKEN to a token that may read it (hf.co/settings/tokens)"
_OFFLINE_HINT = "Unset HF_HUB_OFFLINE, or fetch the model where there is a network"
_CHANGING = "The repository may be changing; try again later"
_RATE_RESET = re.compile(r";\s*t\s*=\s*(\d+)")  # of the hub's "ratelimit" header: seconds to go
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository at a commit, as the hub lists it."""

    name: str  # its path in the repository, with "/"
    num_bytes: int
    sha256: str | None  # of a large file (LFS)
    blob_id: str  # git's SHA-1 of it; of a large file, of its pointer

    @property
    def etag(self) -> str:
        """The name that the hub's cache gives its content."""
        return self.sha256 or self.blob_id


class TryAgain(Exception):
    """A request failed in a way that may pass. `wait_s`: as long as the server asked for."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait_s = wait_s


class Repository:
    """A repository at one commit. Threads may share it."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        """No request is made. Raises NoAccess for a token that no header can carry."""
        self.name = name
        self.revision = revision or constants.DEFAULT_REVISION
        self.commit = ""  # known once listed
        token = get_token()
        if token is not None and not (token.isascii() and token.isprintable()):
            raise NoAccess("The Hugging Face token has characters that no token has", hint=_TOKEN)
        self._headers = build_hf_headers(library_name="wanfit") | {"Accept-Encoding": "identity"}
        self._locations: dict[str, str] = {}  # file -> where a redirect led to

    @property
    def offline(self) -> bool:
        """Whether HF_HUB_OFFLINE asks for no request at all."""
        return constants.is_offline_mode()

    def list_files(self) -> dict[str, RemoteFile]:
        """Name -> file; pins the commit. One request: `TryAgain` where another may help.

        Raises DownloadFailed, and BadOption for a name that no repository has.
        """
        with self._errors("the list of files"):
            try:
                info = HfApi(library_name="wanfit").model_info(
                    self.name,
                    revision=self.revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                )
                files = [_remote_file(sibling) for sibling in info.siblings or ()]
            except (HFValidationError, HfHubHTTPError):
                raise
            except (AttributeError, KeyError, TypeError, ValueError):
                raise HubFailed(
                    f"{host()} answers with something else than a list of files", hint=_ENDPOINT
                ) from None
        if not _SHA1.fullmatch(info.sha or ""):
            raise HubFailed(f"{host()} lists {self.name} without a commit", hint=_ENDPOINT)
        self.commit = str(info.sha)
        return {file.name: file for file in files}

    def read(self, file: RemoteFile, start: int, stop: int, sink: Callable[[bytes], None]) -> None:
        """Gives bytes [start, stop) of a file to `sink`, piece by piece: one request.

        Whatever comes in the end, `sink` has got nothing but the file's bytes from `start` on.
        Raises TryAgain where the rest may come by another request, DownloadFailed where not.
        """
        moved = self._locations.get(file.name)
        url = moved or hf_hub_url(self.name, file.name, revision=self.commit)
        headers = self._headers | {"Range": f"bytes={start}-{stop - 1}"}
        if moved:
            headers.pop("authorization", None)
        try:
            with (
                self._errors(file.name),
                get_session().stream(
                    "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
                ) as response,
            ):
                if moved and response.is_error and response.status_code not in BUSY_STATUSES:
                    raise TryAgain(f"an address that answered {response.status_code}")  # expired
                hf_raise_for_status(response)
                if response.url.origin != httpx2.URL(constants.ENDPOINT).origin:
                    self._locations[file.name] = str(response.url)
                _check_range(file, start, stop, response)
                left = stop - start
                for piece in response.iter_raw():
                    if len(piece) > left:
                        raise BadDownload(f"{host()} sent more of {file.name} than asked for")
                    sink(piece)
                    left -= len(piece)
                if left:
                    raise TryAgain("a connection that was cut")
        except (TryAgain, DownloadFailed):
            self._locations.pop(file.name, None)
            raise

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns what the library raises into ours, or TryAgain."""
        try:
            yield
        except OfflineModeIsEnabled:
            raise HubFailed(
                f"HF_HUB_OFFLINE is set, and {what} of {self.name} is not in the cache",
                hint=_OFFLINE_HINT,
            ) from None
        except HFValidationError:
            raise BadOption(
                f"{self.name!r} is not the name of a repository",
                hint="It is OWNER/NAME, as in Wan-AI/Wan2.2-TI2V-5B",
            ) from None
        except HfHubHTTPError as error:
            raise self._refused(error, what) from None
        except httpx2.TimeoutException as error:
            seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
            raise TryAgain(f"{seconds} s without a byte from {_asked(error)}") from None
        except httpx2.ConnectError as error:
            raise TryAgain(f"no connection to {_asked(error)} ({error})") from None
        except (httpx2.TransportError, httpx2.TooManyRedirects) as error:
            kind = type(error).__name__
            raise TryAgain(f"a connection to {_asked(error)} that broke ({kind})") from None

    def _refused(self, error: HfHubHTTPError, what: str) -> DownloadFailed | TryAgain:
        status = error.response.status_code
        match error:
            case GatedRepoError():
                return NoAccess(
                    f"{self.name} is gated, and its owner has not let you in ({status})",
                    hint=f"Accept its terms at {constants.ENDPOINT}/{self.name}, and set HF_TOKEN",
                )
            case RepositoryNotFoundError():
                return NotOnHub(
                    f"{host()} has no repository {self.name}, or hides it from you ({status})",
                    hint="Check the name; for a private one set HF_TOKEN",
                )
            case RevisionNotFoundError():
                return NotOnHub(
                    f"{self.name} has no revision {self.revision!r}",
                    hint="Leave --revision out for the newest",
                )
            case EntryNotFoundError():
                return NotOnHub(f"{self.name} has no {what} at {self.revision}")
        if status in BUSY_STATUSES:
            reason = "was asked too often" if status == 429 else "is out of order"
            return TryAgain(f"{host()}, which {reason} ({status})", _wait_s(error.response))
        if status == 401:
            return NoAccess(f"{host()} does not know who asks for {self.name} (401)", hint=_TOKEN)
        if status in (403, 451):
            return NoAccess(
                f"{host()} keeps {what} of {self.name} from you ({status})", hint=_TOKEN
            )
        if status == 416:
            return BadDownload(
                f"{what} of {self.name} is shorter than {host()} lists", hint=_CHANGING
            )
        if status == 404:
            return NotOnHub(f"{host()} has no {what} of {self.name} (404)", hint=_ENDPOINT)
        return HubFailed(f"{host()} answers {status} for {what} of {self.name}", hint=_ENDPOINT)


def host() -> str:
    """Of the hub in use, for a message."""
    return httpx2.URL(constants.ENDPOINT).host


def _remote_file(sibling: RepoSibling) -> RemoteFile:
    """Raises ValueError for a listing that names no content, or that would leave its folder."""
    parts = sibling.rfilename.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise ValueError(sibling.rfilename)
    num_bytes, blob_id = sibling.size, sibling.blob_id
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    if num_bytes is None or num_bytes < 0 or not _SHA1.fullmatch(blob_id or ""):
        raise ValueError(sibling)
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ValueError(sibling)
    return RemoteFile(sibling.rfilename, num_bytes, sha256, str(blob_id))


def _asked(error: httpx2.RequestError) -> str:
    """The host that a request went to, for a message."""
    return error.request.url.host


def _check_range(file: RemoteFile, start: int, stop: int, response: Any) -> None:
    """Raises BadDownload unless the answer holds just bytes [start, stop) of such a file."""
    whole = response.status_code == 200
    if whole and (start, stop) != (0, file.num_bytes):
        raise HubFailed(
            f"{host()} gives {file.name} only as a whole, not from byte {start} on", hint=_ENDPOINT
        )
    length = response.headers.get("Content-Length")
    if whole:
        total = length
    else:
        sent, _, total = response.headers.get("Content-Range", "").partition("/")
        if total == str(file.num_bytes) and sent != f"bytes {start}-{stop - 1}":
            raise BadDownload(f"{host()} sent {sent} of {file.name} instead of {start}-{stop - 1}")
    if total is not None and total != str(file.num_bytes):
        raise BadDownload(
            f"{file.name} has {total or 'an unknown number of'} bytes, and {host()} lists"
            f" {file.num_bytes}",
            hint=_CHANGING,
        )
    if not whole and length is not None and length != str(stop - start):
        raise BadDownload(
            f"{host()} sends {length} bytes of {file.name} instead of {stop - start}",
            hint=_CHANGING,
        )


def _wait_s(response: Any) -> float | None:
    """What the server asks for: Retry-After in seconds, or the reset of the hub's rate limit."""
    after = response.headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    reset = _RATE_RESET.search(response.headers.get("ratelimit", ""))
    return float(reset[1]) if reset and response.status_code == 429 else None
