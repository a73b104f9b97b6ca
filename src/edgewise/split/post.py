"""The way to a BackHalf behind HTTP (serve/halves.py): features there, answers back, on connections that are kept."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

import httpx2

from edgewise.devices.address import is_loopback
from edgewise.engines.openai import ERRORS, VENDOR_ERRORS
from edgewise.errors import RemoteBroken, RemoteRefused

PATH: Final = "/edgewise/half"
CONNECT_S: Final = 5.0
READ_S: Final = 60.0  # of silence; whoever calls waits for as long as it pays
MOST_BYTES: Final = 64 << 20  # of an answer


class Post:
    """What a SplitPredictor calls as `there`. `url` is a node's address, with or without the path; `key` goes into the
    Authorization header and nowhere else. For one event loop."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        self.url = root if root.endswith(PATH) else root + PATH
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/octet-stream"}
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(READ_S, connect=CONNECT_S),
            trust_env=not is_loopback(urlsplit(root).hostname or ""),
            headers=headers | ({"Authorization": f"Bearer {key}"} if key else {}),
        )

    async def __call__(self, payload: bytes) -> bytes:
        """RemoteError where nobody answers, or says no: RemoteRefused with the status for a wrong key or features that
        are not of its file. ConfigError if the address is none."""
        try:
            async with self._client.stream("POST", self.url, content=payload) as response:
                body = await _body(response)
        except VENDOR_ERRORS as error:
            ours, text = next((ours, text) for vendor, ours, text in ERRORS if isinstance(error, vendor))
            what = text.format(connect=CONNECT_S, read=READ_S)
            raise ours(f"{self.url}: {what} ({type(error).__name__})", hint="check that a worker runs there") from None
        if response.status_code == 200:
            return body
        said = f"{self.url} answered {response.status_code}: {' '.join(body[:300].decode(errors='replace').split())}"
        if 400 <= response.status_code < 500:
            raise RemoteRefused(said, status=response.status_code)
        raise RemoteBroken(said)

    async def close(self) -> None:
        await self._client.aclose()


async def _body(response: httpx2.Response) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > MOST_BYTES:
            raise RemoteBroken(f"the answer is longer than {MOST_BYTES} bytes")
    return bytes(body)
