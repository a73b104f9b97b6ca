"""The chat completions API of OpenAI: JSON bytes to our types and back, for both ends of the wire.

`ChatBody` is the table of request fields, and there is no other: what it types is honoured, NEUTRAL fields are taken at
the one value that changes nothing, IGNORED ones have no effect here, REFUSED ones are known and not served. Whatever is
not in it is refused too. The types of answers serve for writing (every field that clients count on is there, null
included) and for reading, where any field may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, get_type_hints

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edgewise.errors import RemoteBroken, RequestError, UnsupportedField
from edgewise.types import Candidate, Chunk, Decision, Message, Request, Sampling, Timings, Token, Usage, Wish
from edgewise.wire import sse

NEUTRAL: Final = "neutral"
IGNORED: Final = "ignored"
REFUSED: Final = "refused"
HONOURED: Final = "honoured"

_REQUEST, _SAMPLING = Request(), Sampling()  # the defaults

LEAST_LOGPROB = -9999.0  # what OpenAI sends for "next to impossible"; JSON has no infinity

_Refused = Annotated[None, Meta(extra={"treatment": REFUSED})]
_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_StopText = Annotated[str, Meta(min_length=1)]
_NoBias = Annotated[dict[str, float], Meta(max_length=0)]
_Zero = Annotated[float, Meta(ge=0, le=0)]


def _neutral(only: str) -> Meta:
    """Marks a field that is taken at one value alone; null and absence mean the same."""
    return Meta(extra={"treatment": NEUTRAL, "only": only})


_ignored = Meta(extra={"treatment": IGNORED})


# --- requests ---------------------------------------------------------------------------------------------------------


class TextPart(Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class TextFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text"]


class StreamOptions(Struct, forbid_unknown_fields=True, omit_defaults=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Turn(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A message. Clients send our own answers back, with the nulls that they found in them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Meta(min_length=1)]
    name: _Refused = None
    refusal: _Refused = None
    audio: _Refused = None
    function_call: _Refused = None
    tool_calls: _Refused = None
    annotations: Annotated[list[None], Meta(max_length=0)] | None = None

    def message(self) -> Message:
        """Text parts become paragraphs of one text; `developer` is the newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message(role, text)


class ChatBody(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The body of POST /v1/chat/completions. Null counts as absent, except for `messages` and `model`."""

    messages: Annotated[list[Turn], Meta(min_length=1)]
    model: Annotated[str, Meta(min_length=1, max_length=256)]
    max_tokens: _Positive | None = None
    max_completion_tokens: _Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stop: _StopText | Annotated[list[_StopText], Meta(max_length=4)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None  # not OpenAI's; vLLM and llama-server know it, benchmarks need it

    n: Annotated[Literal[1] | None, _neutral("1")] = None
    presence_penalty: Annotated[_Zero | None, _neutral("0")] = None
    frequency_penalty: Annotated[_Zero | None, _neutral("0")] = None
    logit_bias: Annotated[_NoBias | None, _neutral("{}")] = None
    response_format: Annotated[TextFormat | None, _neutral('{"type": "text"}')] = None
    modalities: Annotated[list[Literal["text"]] | None, _neutral('["text"]')] = None
    store: Annotated[bool | None, _neutral("false")] = None
    service_tier: Annotated[Literal["auto"] | None, _neutral('"auto"')] = None

    user: Annotated[str | None, _ignored] = None
    metadata: Annotated[dict[str, str] | None, _ignored] = None
    parallel_tool_calls: Annotated[bool | None, _ignored] = None  # there are no tools that it could be about

    audio: _Refused = None
    function_call: _Refused = None
    functions: _Refused = None
    moderation: _Refused = None
    prediction: _Refused = None
    prompt_cache_key: _Refused = None
    prompt_cache_options: _Refused = None
    prompt_cache_retention: _Refused = None
    reasoning_effort: _Refused = None
    safety_identifier: _Refused = None
    tool_choice: _Refused = None
    tools: _Refused = None
    verbosity: _Refused = None
    web_search_options: _Refused = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def request(self, *, route: Wish = "auto", deadline_ms: float | None = None, hops: int = 0) -> Request:
        """The same wish in our own terms. Where the body is silent, the defaults of `types` hold."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return Request(
            messages=tuple(turn.message() for turn in self.messages),
            sampling=Sampling(
                temperature=_SAMPLING.temperature if self.temperature is None else self.temperature,
                top_p=_SAMPLING.top_p if self.top_p is None else self.top_p,
                seed=self.seed,
            ),
            max_tokens=_REQUEST.max_tokens if limit is None else limit,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            stream=bool(self.stream),
            route=route,
            deadline_ms=deadline_ms,
            ignore_eos=bool(self.ignore_eos),
            hops=hops,
        )


_chat_decoder = msgspec.json.Decoder(ChatBody)


def _markers() -> dict[str, dict[str, str]]:
    marks: dict[str, dict[str, str]] = {}
    for name, hint in get_type_hints(ChatBody, include_extras=True).items():
        metas = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, Meta) and meta.extra]
        marks[name] = metas[0].extra if metas and metas[0].extra else {"treatment": HONOURED}
    return marks


_MARKERS = _markers()
TREATMENT: dict[str, str] = {name: mark["treatment"] for name, mark in _MARKERS.items()}


def decode_chat(data: bytes) -> ChatBody:
    """RequestError for anything that is not a chat request, `param` naming the place; UnsupportedField where the
    request is a valid one that asks for something we do not serve."""
    try:
        body = _chat_decoder.decode(data)
    except msgspec.ValidationError as e:
        raise _refusal(str(e)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise RequestError(f"the body is not JSON: {e}", hint="send one JSON object in UTF-8") from None
    _check_together(body)
    return body


def _check_together(body: ChatBody) -> None:
    """Rules that one field alone cannot tell."""
    options = body.stream_options
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise RequestError(
            f"max_tokens is {body.max_tokens} and max_completion_tokens is {body.max_completion_tokens}: "
            "they mean the same and must not differ",
            param="max_tokens",
            hint="send max_completion_tokens alone",
        )
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    if options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    if options is not None and options.include_obfuscation:
        raise UnsupportedField(
            "stream_options.include_obfuscation is served at false alone", param="stream_options.include_obfuscation"
        )
    if body.store:
        raise UnsupportedField("store is served at false alone: answers are not kept", param="store")


_PLACE = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_NAMED = re.compile(r"Object (?P<fault>contains unknown|missing required) field `(?P<name>.*)`", re.DOTALL)
_ALLOWED = {
    "role": "allowed are system, developer, user and assistant",
    "type": "only text is served",
    "model": "GET /v1/models lists the models",
}
_JSON_WORDS = {"float": "number", "int": "integer", "str": "string", "bool": "boolean"}


def _refusal(complaint: str) -> RequestError:
    """What msgspec says, with the field's name at the front and in JSON's own words."""
    found = _PLACE.fullmatch(_short(complaint))
    what, param = (found["what"], found["path"] or "") if found else (_short(complaint), "")
    if named := _NAMED.fullmatch(what):
        return _refusal_of_name(named["name"], param, known=named["fault"] != "contains unknown")
    field = re.split(r"[.\[]", param, maxsplit=1)[0]
    if only := _MARKERS.get(field, {}).get("only"):
        return UnsupportedField(f"{field} is served at {only} alone", param=param)
    if what.startswith("Expected `null`, got"):
        return UnsupportedField(f"{param} is not supported", param=param, hint="leave it out")
    for ours, theirs in _JSON_WORDS.items():
        what = re.sub(rf"\b{ours}\b", theirs, what)
    hint = _ALLOWED.get(param.rpartition(".")[2])
    return RequestError(f"{param or 'the body'}: {what[:1].lower()}{what[1:]}", param=param or None, hint=hint)


def _refusal_of_name(name: str, place: str, *, known: bool) -> RequestError:
    param = f"{place}.{name}" if place else name
    if known:
        return RequestError(f"{param} is missing", param=param)
    return UnsupportedField(f"{param} is not a field that is known here", param=param, hint="leave it out")


def _short(text: str, most: int = 400) -> str:
    """Without the middle of an overlong text: a complaint repeats names and values of the sender."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def encode_chat(request: Request, model: str) -> bytes:
    """The request as a streaming one, with its usage; `prompt_ids` have no place in this API."""
    sampling = request.sampling
    return msgspec.json.encode(
        ChatBody(
            messages=[Turn(message.role, message.content) for message in request.messages],
            model=model,
            max_tokens=request.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=list(request.stop) or None,
            seed=sampling.seed,
            logprobs=request.logprobs or None,
            top_logprobs=request.top_logprobs or None,
            stream=True,
            stream_options=StreamOptions(include_usage=True),
            ignore_eos=request.ignore_eos or None,
        )
    )


# --- answers ----------------------------------------------------------------------------------------------------------

_Byte = Annotated[int, Meta(ge=0, le=255)]


class Alternative(Struct):
    token: str
    logprob: float | None = None
    bytes: list[_Byte] | None = None
    id: int | UnsetType = UNSET  # not OpenAI's; llama-server sends it

    def candidate(self) -> Candidate:
        return Candidate(_id(self), _raw(self), LEAST_LOGPROB if self.logprob is None else self.logprob)


class TokenBody(Alternative):
    top_logprobs: list[Alternative] | None = None

    def value(self) -> Token:
        top = tuple(alternative.candidate() for alternative in self.top_logprobs or ())
        return Token(_id(self), _raw(self), self.logprob, top)


class LogprobsBody(Struct):
    content: list[TokenBody] | None = None
    refusal: None = None


class CachedTokens(Struct):
    cached_tokens: int | None = None


class ReasoningTokens(Struct):
    reasoning_tokens: int | None = None


class UsageBody(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: CachedTokens | None = None
    completion_tokens_details: ReasoningTokens | None = None

    @classmethod
    def of(cls, usage: Usage) -> UsageBody:
        total = usage.prompt_tokens + usage.completion_tokens
        cached = CachedTokens(usage.cached_tokens)
        return cls(usage.prompt_tokens, usage.completion_tokens, total, cached, ReasoningTokens(0))

    def value(self) -> Usage:
        details = self.prompt_tokens_details
        return Usage(self.prompt_tokens, self.completion_tokens, (details and details.cached_tokens) or 0)


class EdgewiseBody(Struct):
    """Our own field of an answer; `timings` are there once the answer is complete."""

    route: str
    confidence: float | None = None
    reason: str = ""
    timings: Timings | None = None


class ErrorBody(Struct):
    message: str | None = None
    type: str | None = None
    param: Any = None
    code: str | int | None = None
    n_prompt_tokens: int | UnsetType = UNSET  # of a full context, as llama-server has it
    n_ctx: int | UnsetType = UNSET


class ErrorAnswer(Struct):
    error: ErrorBody | str


class AnswerMessage(Struct):
    role: str = "assistant"
    content: str | None = None
    refusal: str | None = None


class Choice(Struct):
    index: int = 0
    message: AnswerMessage = msgspec.field(default_factory=AnswerMessage)
    logprobs: LogprobsBody | None = None
    finish_reason: str | None = None


class Completion(Struct):
    """A whole answer."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody | None = None
    system_fingerprint: str | None = None
    x_edgewise: EdgewiseBody | UnsetType = UNSET


class Delta(Struct):
    role: str | UnsetType | None = UNSET
    content: str | UnsetType | None = UNSET


class ChunkChoice(Struct):
    index: int = 0
    delta: Delta | None = msgspec.field(default_factory=Delta)
    logprobs: LogprobsBody | None = None
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return (self.delta and self.delta.content) or ""

    def tokens(self) -> tuple[Token, ...]:
        """Those that the server told; where it told none, the text of this piece as one token of unknown id."""
        if self.logprobs is not None and self.logprobs.content is not None:
            return tuple(token.value() for token in self.logprobs.content)
        return (Token(UNKNOWN_ID, self.text.encode(), None),) if self.text else ()


class ChunkBody(Struct):
    """A piece of a streamed answer, or an error that comes when the status 200 has long been sent."""

    id: str | None = None
    object: str = "chat.completion.chunk"
    created: int | float | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    choices: list[ChunkChoice] | None = None
    usage: UsageBody | UnsetType | None = UNSET
    x_edgewise: EdgewiseBody | UnsetType = UNSET
    error: ErrorBody | str | UnsetType | None = UNSET


class ModelBody(Struct):
    id: str
    object: str = "model"
    created: int | None = 0
    owned_by: str | None = "edgewise"


class ModelList(Struct):
    object: str = "list"
    data: list[ModelBody] | None = None


UNKNOWN_ID = -1


def _id(body: Alternative) -> int:
    return UNKNOWN_ID if isinstance(body.id, UnsetType) else body.id


def _raw(body: Alternative) -> bytes:
    return body.token.encode() if body.bytes is None else bytes(body.bytes)


_chunk_decoder = msgspec.json.Decoder(ChunkBody)
_error_decoder = msgspec.json.Decoder(ErrorAnswer)
_models_decoder = msgspec.json.Decoder(ModelList)
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode_chunk(data: bytes) -> ChunkBody:
    """RemoteBroken if it is no piece of an answer."""
    try:
        return _chunk_decoder.decode(data)
    except _MALFORMED as e:
        raise RemoteBroken(f"a piece of the stream makes no sense: {e}") from None


def decode_models(data: bytes) -> list[str]:
    """Names of the models. RemoteBroken if it is no list of them."""
    try:
        return [model.id for model in _models_decoder.decode(data).data or ()]
    except _MALFORMED as e:
        raise RemoteBroken(f"the list of models makes no sense: {e}") from None


def decode_error(data: bytes) -> ErrorBody:
    """What an error answer says; text that is not in OpenAI's form becomes the message."""
    try:
        error = _error_decoder.decode(data).error
    except _MALFORMED:
        error = data[:500].decode("utf-8", "replace").strip()
    return error if isinstance(error, ErrorBody) else ErrorBody(message=error)


def encode_error(error: ErrorBody) -> bytes:
    return msgspec.json.encode(ErrorAnswer(error))


def encode_model(name: str) -> bytes:
    return msgspec.json.encode(ModelBody(name))


def encode_models(names: Iterable[str]) -> bytes:
    return msgspec.json.encode(ModelList(data=[ModelBody(name) for name in names]))


@dataclass(frozen=True, slots=True)
class Stamp:
    """What each piece of one answer repeats; `created` in Unix seconds, `model` the one that answered."""

    id: str
    created: int
    model: str
    fingerprint: str


def encode_completion(stamp: Stamp, chunks: Sequence[Chunk], decision: Decision, *, logprobs: bool) -> bytes:
    """The whole answer; the last chunk carries the finish reason, the usage and the timings."""
    last = chunks[-1]
    tokens = [token for chunk in chunks for token in chunk.tokens]
    choice = Choice(
        message=AnswerMessage(content="".join(chunk.text for chunk in chunks)),
        logprobs=_logprobs(tokens) if logprobs else None,
        finish_reason=last.finish_reason,
    )
    return msgspec.json.encode(
        Completion(
            id=stamp.id,
            object="chat.completion",
            created=stamp.created,
            model=stamp.model,
            choices=[choice],
            usage=UsageBody.of(last.usage) if last.usage else None,
            system_fingerprint=stamp.fingerprint,
            x_edgewise=_edgewise(decision, last.timings),
        )
    )


class StreamEncoder:
    """Events of one streamed answer: `opening`, any number of `content`, `closing`; or `failure` in its place."""

    def __init__(self, stamp: Stamp, *, logprobs: bool, include_usage: bool) -> None:
        self._stamp = stamp
        self._logprobs = logprobs
        self._include_usage = include_usage

    def opening(self, decision: Decision) -> bytes:
        """The role alone, and the route that was taken."""
        return self._event(ChunkChoice(delta=Delta("assistant", "")), x_edgewise=_edgewise(decision))

    def content(self, chunk: Chunk) -> bytes:
        """The chunk's text and tokens; nothing if it has neither to show."""
        if not chunk.text and not (chunk.tokens and self._logprobs):
            return b""
        logprobs = _logprobs(chunk.tokens) if self._logprobs else None
        return self._event(ChunkChoice(delta=Delta(content=chunk.text), logprobs=logprobs))

    def closing(self, last: Chunk, decision: Decision) -> bytes:
        """The finish reason in a piece of its own, the usage if it was asked for, and the end mark."""
        edgewise = _edgewise(decision, last.timings)
        events = self._event(ChunkChoice(finish_reason=last.finish_reason), x_edgewise=edgewise)
        if self._include_usage and last.usage is not None:
            events += self._event(None, usage=UsageBody.of(last.usage), x_edgewise=edgewise)
        return events + sse.event(b"[DONE]")

    def failure(self, error: ErrorBody) -> bytes:
        """The last event of a broken answer: clients raise it, and no end mark may follow."""
        return sse.event(encode_error(error))

    def _event(
        self,
        choice: ChunkChoice | None,
        *,
        usage: UsageBody | None = None,
        x_edgewise: EdgewiseBody | UnsetType = UNSET,
    ) -> bytes:
        body = ChunkBody(
            id=self._stamp.id,
            created=self._stamp.created,
            model=self._stamp.model,
            system_fingerprint=self._stamp.fingerprint,
            choices=[] if choice is None else [choice],
            usage=usage if self._include_usage else UNSET,
            x_edgewise=x_edgewise,
        )
        return sse.event(msgspec.json.encode(body))


def _edgewise(decision: Decision, timings: Timings | None = None) -> EdgewiseBody:
    return EdgewiseBody(decision.route, decision.confidence, decision.reason, timings)


def _logprobs(tokens: Iterable[Token]) -> LogprobsBody | None:
    """None, as if they had not been asked for, where the engine could not tell all of them."""
    content = []
    for token in tokens:
        if token.logprob is None:
            return None
        top = [Alternative(*_told(candidate.raw, candidate.logprob)) for candidate in token.top]
        content.append(TokenBody(*_told(token.raw, token.logprob), top_logprobs=top))
    return LogprobsBody(content)


def _told(raw: bytes, logprob: float) -> tuple[str, float, list[int]]:
    """`token` replaces what is not a whole character; `bytes` are exact."""
    return raw.decode("utf-8", "replace"), max(logprob, LEAST_LOGPROB), list(raw)
