"""Requests of OpenAI's chat and text completions: JSON bytes to our types and back. Answers are in wire/answers.py.

`ChatBody` and `TextBody` are the tables of request fields, and there are no others: what they type is honoured, NEUTRAL
fields are taken at the one value that changes nothing, IGNORED ones have no effect here, REFUSED ones are known and not
served. Whatever is not in the table is refused too.

Fields that OpenAI does not have, in the spelling of vLLM: `top_k` (0 and -1 are all), `min_p`, `repetition_penalty`,
`ignore_eos`. llama.cpp's `repeat_penalty` is understood as well.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Annotated, Any, Final, Literal, TypeVar, get_type_hints

import msgspec
from msgspec import Meta, Struct

from edgewise.errors import RequestError, UnsupportedField
from edgewise.types import RANGES, Message, Request, Sampling

NEUTRAL: Final = "neutral"
IGNORED: Final = "ignored"
REFUSED: Final = "refused"
HONOURED: Final = "honoured"

_REQUEST, _SAMPLING = Request(), Sampling()  # the defaults

TEXT_MAX_TOKENS: Final = 16  # of a text completion that does not say; OpenAI's default, on which clients rely

_Refused = Annotated[None, Meta(extra={"treatment": REFUSED})]
_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_StopText = Annotated[str, Meta(min_length=1)]


def _range(name: str) -> Meta:
    low, high = RANGES[name]
    return Meta(ge=low, le=high)


_Repetition = Annotated[float, _range("repetition_penalty")]


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


class Body(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What both kinds of request have. Null counts as absent, except for `model`."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    max_tokens: _Positive | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, _range("temperature")] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, _range("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, _range("frequency_penalty")] | None = None
    logit_bias: dict[_TokenId, Annotated[float, _range("logit_bias")]] | None = None
    stop: _StopText | Annotated[list[_StopText], Meta(max_length=4)] | None = None
    seed: Annotated[int, _range("seed")] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Meta(ge=-1, le=RANGES["top_k"][1])] | None = None
    min_p: Annotated[float, _range("min_p")] | None = None
    repetition_penalty: _Repetition | None = None
    repeat_penalty: _Repetition | None = None
    ignore_eos: bool | None = None  # benchmarks need it

    user: Annotated[str | None, _ignored] = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def choices(self) -> int:
        """To each prompt."""
        return self.n or 1

    @property
    def prompt_count(self) -> int:
        return 1

    def echoed(self, index: int) -> str:
        """What goes before the text of this choice."""
        return ""

    def _request(self, limit: int | None, came: Request) -> Request:
        """The same wish in our own terms, all but its prompt. Where the body is silent, `types` has the defaults."""
        return replace(
            came,
            sampling=self._sampling(),
            max_tokens=_REQUEST.max_tokens if limit is None else limit,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stream=bool(self.stream),
            ignore_eos=bool(self.ignore_eos),
        )

    def _sampling(self) -> Sampling:
        repetition = self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty
        return Sampling(
            temperature=_SAMPLING.temperature if self.temperature is None else self.temperature,
            top_p=_SAMPLING.top_p if self.top_p is None else self.top_p,
            seed=self.seed,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=_SAMPLING.repetition_penalty if repetition is None else repetition,
            logit_bias=tuple((self.logit_bias or {}).items()),
        )


class ChatBody(Body):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Turn], Meta(min_length=1)]
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    response_format: Annotated[TextFormat | None, _neutral('{"type": "text"}')] = None
    modalities: Annotated[list[Literal["text"]] | None, _neutral('["text"]')] = None
    store: Annotated[bool | None, _neutral("false")] = None
    service_tier: Annotated[Literal["auto"] | None, _neutral('"auto"')] = None

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

    def requests(self, came: Request = _REQUEST) -> tuple[Request, ...]:
        """One for each choice, in the order of their indexes. `came` holds what the body does not say: how it came."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        request = replace(
            self._request(limit, came),
            messages=tuple(turn.message() for turn in self.messages),
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
        )
        return _several(request, self.choices)


class TextBody(Body):
    """The body of POST /v1/completions: the model goes on from a text or from token ids, without a template."""

    prompt: str | Annotated[list[str | _TokenId | Annotated[list[_TokenId], Meta(min_length=1)]], Meta(min_length=1)]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None

    best_of: Annotated[_Positive | None, _neutral("the value of n")] = None
    suffix: _Refused = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt: a text, or token ids. A list of numbers is one prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]

    @property
    def prompt_count(self) -> int:
        return len(self.prompts)

    def echoed(self, index: int) -> str:
        prompt = self.prompts[index // self.choices]
        return prompt if self.echo and isinstance(prompt, str) else ""

    def requests(self, came: Request = _REQUEST) -> tuple[Request, ...]:
        """One for each choice of each prompt, in the order of their indexes. `came` is as in ChatBody."""
        limit = TEXT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        request = replace(
            self._request(limit, came),
            logprobs=self.logprobs is not None,
            top_logprobs=self.logprobs or 0,
        )
        return tuple(one for prompt in self.prompts for one in _several(_asking(request, prompt), self.choices))


def _asking(request: Request, prompt: str | list[int]) -> Request:
    if isinstance(prompt, str):
        return replace(request, prompt=prompt)
    return replace(request, prompt_ids=tuple(prompt))


def _several(request: Request, count: int) -> tuple[Request, ...]:
    """The request `count` times. Each has a seed of its own that follows from the seed; the first keeps it, so that a
    choice does not depend on how many others were asked for."""
    seed = request.sampling.seed
    if count == 1 or seed is None:
        return (request,) * count
    return (
        request,
        *(
            replace(request, sampling=replace(request.sampling, seed=_derived(seed, index)))
            for index in range(1, count)
        ),
    )


def _derived(seed: int, index: int) -> int:
    digest = hashlib.blake2b(b"%d/%d" % (seed, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


Markers = dict[str, dict[str, str]]
BodyType = TypeVar("BodyType", ChatBody, TextBody)


def _markers(body: type[Body]) -> Markers:
    marks: Markers = {}
    for name, hint in get_type_hints(body, include_extras=True).items():
        metas = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, Meta) and meta.extra]
        marks[name] = metas[0].extra if metas and metas[0].extra else {"treatment": HONOURED}
    return marks


_CHAT_MARKERS, _TEXT_MARKERS = _markers(ChatBody), _markers(TextBody)
CHAT_TREATMENT: dict[str, str] = {name: mark["treatment"] for name, mark in _CHAT_MARKERS.items()}
TEXT_TREATMENT: dict[str, str] = {name: mark["treatment"] for name, mark in _TEXT_MARKERS.items()}
_chat_decoder = msgspec.json.Decoder(ChatBody)
_text_decoder = msgspec.json.Decoder(TextBody)


def decode_chat(data: bytes) -> ChatBody:
    """RequestError for anything that is not a chat request, `param` naming the place; UnsupportedField where the
    request is a valid one that asks for something we do not serve."""
    body = _decoded(_chat_decoder, data, _CHAT_MARKERS)
    _check_common(body)
    _check_chat(body)
    return body


def decode_text(data: bytes) -> TextBody:
    """The same for a text completion."""
    body = _decoded(_text_decoder, data, _TEXT_MARKERS)
    _check_common(body)
    _check_text(body)
    return body


def _decoded(decoder: msgspec.json.Decoder[BodyType], data: bytes, markers: Markers) -> BodyType:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as e:
        raise _refusal(str(e), markers, data) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise RequestError(f"the body is not JSON: {e}", hint="send one JSON object in UTF-8") from None


# Rules that one field alone cannot tell.


def _check_common(body: Body) -> None:
    options = body.stream_options
    _check_twins(body, "repetition_penalty", "repeat_penalty")
    if options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    if options is not None and options.include_obfuscation:
        raise UnsupportedField(
            "stream_options.include_obfuscation is served at false alone", param="stream_options.include_obfuscation"
        )


def _check_chat(body: ChatBody) -> None:
    _check_twins(body, "max_completion_tokens", "max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    if body.store:
        raise UnsupportedField("store is served at false alone: answers are not kept", param="store")


def _check_text(body: TextBody) -> None:
    if not isinstance(body.prompt, str) and len({type(part) for part in body.prompt}) > 1:
        raise RequestError("prompt mixes texts, numbers and lists of numbers: send one kind", param="prompt")
    if not all(body.prompts):
        raise RequestError("prompt holds an empty text", param="prompt", hint="send one character or more")
    if body.best_of is not None and body.best_of != body.choices:
        raise UnsupportedField(f"best_of is served at the value of n alone, which is {body.choices}", param="best_of")
    if body.echo and body.logprobs is not None:
        raise UnsupportedField(
            "echo is not served together with logprobs: those of the prompt are not computed", param="echo"
        )
    if body.echo and any(not isinstance(prompt, str) for prompt in body.prompts):
        raise UnsupportedField("echo is served for prompts of text alone", param="echo", hint="leave it out")


def _check_twins(body: Body, preferred: str, other: str) -> None:
    """Two names for one thing."""
    one, two = getattr(body, preferred), getattr(body, other)
    if one is not None and two is not None and one != two:
        raise RequestError(
            f"{other} is {two} and {preferred} is {one}: they mean the same and must not differ",
            param=other,
            hint=f"send {preferred} alone",
        )


_PLACE = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)
_NAMED = re.compile(r"Object (?P<fault>contains unknown|missing required) field `(?P<name>.*)`", re.DOTALL)
_ALLOWED = {
    "role": "allowed are system, developer, user and assistant",
    "type": "only text is served",
    "model": "GET /v1/models lists the models",
}
_JSON_WORDS = {"float": "number", "int": "integer", "str": "string", "bool": "boolean"}


def _refusal(complaint: str, markers: Markers, data: bytes) -> RequestError:
    """What msgspec says, with the field's name at the front, in JSON's own words, and with the value that was sent."""
    found = _PLACE.fullmatch(_short(complaint))
    what, param = (found["what"], found["path"] or "") if found else (_short(complaint), "")
    if named := _NAMED.fullmatch(what):
        return _refusal_of_name(named["name"], param, known=named["fault"] != "contains unknown")
    field = re.split(r"[.\[]", param, maxsplit=1)[0]
    if only := markers.get(field, {}).get("only"):
        return UnsupportedField(f"{field} is served at {only} alone", param=param)
    if what.startswith("Expected `null`, got"):
        return UnsupportedField(f"{param} is not supported", param=param, hint="leave it out")
    for ours, theirs in _JSON_WORDS.items():
        what = re.sub(rf"\b{ours}\b", theirs, what)
    hint = _ALLOWED.get(param.rpartition(".")[2])
    seen = _seen(param, data)
    return RequestError(f"{param or 'the body'}: {what[:1].lower()}{what[1:]}{seen}", param=param or None, hint=hint)


def _seen(place: str, data: bytes) -> str:
    """The number or word that stands at that place (`messages[0].role`), if one does; a long text is not repeated."""
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
        try:
            found = found[key or int(index)]
        except (KeyError, IndexError, TypeError):
            return ""
    shown = "" if found is None or isinstance(found, dict | list) else msgspec.json.encode(found).decode()
    return f"; it is {shown}" if 0 < len(shown) <= 40 else ""


def _refusal_of_name(name: str, place: str, *, known: bool) -> RequestError:
    param = f"{place}.{name}" if place else name
    if known:
        return RequestError(f"{param} is missing", param=param)
    return UnsupportedField(f"{param} is not a field that is known here", param=param, hint="leave it out")


def _short(text: str, most: int = 400) -> str:
    """Without the middle of an overlong text: a complaint repeats names and values of the sender."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def encode_request(request: Request, model: str) -> bytes:
    """The request as a streaming one, with its usage: a chat one for messages, else one for a text completion."""
    common = _common_fields(request, model)
    if request.messages:
        turns = [Turn(message.role, message.content) for message in request.messages]
        wanted, top = request.logprobs or None, request.top_logprobs or None
        return msgspec.json.encode(ChatBody(messages=turns, logprobs=wanted, top_logprobs=top, **common))
    prompt: Any = list(request.prompt_ids or ()) if request.prompt is None else request.prompt
    count = request.top_logprobs if request.logprobs else None
    return msgspec.json.encode(TextBody(prompt=prompt, logprobs=count, **common))


def _common_fields(request: Request, model: str) -> dict[str, Any]:
    """What is at its default stays out, but for what servers have different defaults for."""
    sampling = request.sampling
    repetition = None if sampling.repetition_penalty == _SAMPLING.repetition_penalty else sampling.repetition_penalty
    return {
        "model": model,
        "max_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or None,
        "min_p": sampling.min_p or None,
        "presence_penalty": sampling.presence_penalty or None,
        "frequency_penalty": sampling.frequency_penalty or None,
        "repetition_penalty": repetition,
        "repeat_penalty": repetition,
        "logit_bias": dict(sampling.logit_bias) or None,
        "stop": list(request.stop) or None,
        "seed": sampling.seed,
        "stream": True,
        "stream_options": StreamOptions(include_usage=True),
        "ignore_eos": request.ignore_eos or None,
    }
