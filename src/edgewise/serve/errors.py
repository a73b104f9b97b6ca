"""Every error as an HTTP answer in OpenAI's form. The only place where a status is chosen."""

from __future__ import annotations

import logging
import math
import secrets
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from edgewise.errors import (
    ContextFull,
    DeadlineExceeded,
    EdgewiseError,
    EngineClosed,
    Forbidden,
    Overloaded,
    RemoteBroken,
    RemoteRefused,
    RemoteTimeout,
    RequestError,
    TailLost,
    UnknownModel,
    Unreachable,
    UnsupportedField,
)
from edgewise.wire.answers import ErrorBody, encode_error

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1  # for clients that may try again, where nobody knows better
MOST_RETRY_AFTER_S = 120  # openai-python does not retry at all if it should wait longer

# First match counts; what is not here is a 500.
STATUS: Final[tuple[tuple[type[EdgewiseError], int, str | None], ...]] = (
    (ContextFull, 400, "context_length_exceeded"),
    (Forbidden, 403, "privacy_rule"),
    (UnsupportedField, 400, "unsupported_parameter"),
    (UnknownModel, 404, "model_not_found"),
    (RequestError, 400, None),
    (Overloaded, 429, "overloaded"),
    (EngineClosed, 503, "shutting_down"),
    (DeadlineExceeded, 504, "deadline_exceeded"),
    (Unreachable, 502, "remote_unreachable"),
    (RemoteTimeout, 504, "remote_timeout"),
    (RemoteRefused, 502, "remote_refused"),
    (RemoteBroken, 502, "remote_broken"),
    (TailLost, 502, "tail_lost"),
)
OPENAI_NAMES: Final = {"prompt_ids": "prompt"}  # of fields that are called otherwise in Request
HTTP_CODES: Final[Mapping[int, str]] = {
    401: "invalid_api_key",
    404: "unknown_path",
    405: "method_not_allowed",
    408: "body_too_slow",
    413: "body_too_large",
    415: "unsupported_media_type",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """What a client is told of an error."""

    status: int
    body: ErrorBody
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        return Response(encode_error(self.body), self.status, self.headers, media_type="application/json")


def failure_of(error: Exception) -> Failure:
    """The answer to an error. One that clients cannot understand is logged, and they get the number of the log line."""
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, EdgewiseError):
        for kind, status, code in STATUS:
            if isinstance(error, kind):
                return _of_ours(error, status, code)
    return _of_bug(error)


async def answer_error(request: Request, error: Exception) -> Response:
    """For starlette's table of exception handlers."""
    return failure_of(error).response()


def _of_ours(error: EdgewiseError, status: int, code: str | None) -> Failure:
    body = ErrorBody(message=str(error), type=_type(status), code=code)
    if isinstance(error, RequestError):
        body.param = OPENAI_NAMES.get(error.param or "", error.param)
    if isinstance(error, ContextFull):
        body.n_prompt_tokens, body.n_ctx = error.needed, error.limit
    if isinstance(error, RemoteRefused) and error.retryable:
        status = 503
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if error.retryable and status in (429, 503):
        headers["retry-after"] = str(_retry_after_s(error))
    return Failure(status, body, headers)


def _retry_after_s(error: EdgewiseError) -> int:
    wish = error.retry_after_s if isinstance(error, RemoteRefused) else None
    return RETRY_AFTER_S if wish is None else min(math.ceil(wish), MOST_RETRY_AFTER_S)


def _of_http(error: HTTPException) -> Failure:
    code = HTTP_CODES.get(error.status_code)
    body = ErrorBody(message=error.detail, type=_type(error.status_code), code=code)
    return Failure(error.status_code, body, {"x-should-retry": "false", **(error.headers or {})})


def _of_bug(error: Exception) -> Failure:
    """The log gets the kind of error and where it arose. The text of a foreign error stays out: it may repeat what a
    user wrote."""
    number = secrets.token_hex(6)
    text = str(error) if isinstance(error, EdgewiseError) else "(text withheld)"
    stack = "".join(traceback.format_tb(error.__traceback__))
    log.error("error %s: %s %s\n%s", number, type(error).__qualname__, text, stack)
    message = f"something went wrong inside the server; its log has more under {number}"
    return Failure(500, ErrorBody(message=message, type=_type(500), code="internal_error"), {"x-should-retry": "false"})


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
