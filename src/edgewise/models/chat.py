"""Chat templates: jinja from the model's files, rendered as code of a stranger.

Besides jinja's immutable sandbox (no attributes that lead out of it, no changes to what we pass in) a template gets a
budget. Every loop turn, macro call, filter, test and call takes a step of it, every value it makes costs its size, and
values that could explode in one operation (repetition, powers, joins, replacements, padding) are measured before they
are made or are not on offer. So rendering ends, in bounded time and memory, whatever the template says.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, ClassVar, Final

from jinja2 import Template, TemplateError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.visitor import NodeTransformer

from edgewise.errors import ModelError, RequestError
from edgewise.types import Message

MAX_TEMPLATE_CHARS: Final = 1 << 18  # the longest published ones have about 2**15
MAX_MESSAGE_CHARS: Final = 1 << 21  # of all messages together; more than any context holds
MAX_VALUE: Final = 1 << 22  # characters of the rendered text or of any value on the way
BUDGET: Final = 1 << 28  # characters made, and steps taken
STEP_COST: Final = 512  # so at most 2**19 steps
ITEM_COST: Final = 64  # of a list item or dict entry, in characters
MAX_SECONDS: Final = 5.0
MAX_INTEGER_BITS: Final = 256
MAX_JSON_INDENT: Final = 8

CHATML: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_FILTERS: Final = (
    "abs capitalize count d default dictsort e escape first float groupby int items last length list lower map max min "
    "reject rejectattr reverse round safe select selectattr sort string title trim unique upper wordcount"
)
_STRING_METHODS: Final = (
    "capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper "
    "join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper"
)
_PADDED_DATE: Final = re.compile(r"%[^a-zA-Z%]*\d")


class ChatTemplate:
    """A compiled chat template. ModelError if it is too long or no valid template. Safe for concurrent use."""

    def __init__(self, source: str, *, bos: str | None = None, eos: str | None = None) -> None:
        """`bos` and `eos` are the texts of the tokens, as the template's `bos_token` and `eos_token`."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(
                f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are allowed",
                hint="the model's files look damaged",
            )
        self._tokens = {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text is not None}
        self._template = _compile(source)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text, up to where the assistant's answer begins. RequestError if there is no message, if they
        are too long or if the template refuses them; ModelError if the template fails or does too much."""
        length = sum(len(message.content) for message in messages)
        if not messages or length > MAX_MESSAGE_CHARS:
            raise RequestError(
                f"the conversation has {len(messages)} messages with {length} characters, "
                f"allowed are 1 message or more and at most {MAX_MESSAGE_CHARS} characters",
                param="messages",
            )
        variables = {
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._tokens,
        }
        spent = _METER.set(_Meter())
        try:
            return _collect(self._template.generate(variables))
        except _Refusal as refusal:
            raise RequestError(
                f"the model's chat template refuses these messages: {refusal.message}",
                param="messages",
                hint="change the order or the roles of the messages",
            ) from refusal
        except Exception as error:  # the template is foreign code: whatever it raises is its own failure
            raise ModelError(
                f"the model's chat template failed: {type(error).__name__}: {error}",
                hint="send token ids or use a model with another template",
            ) from error
        finally:
            _METER.reset(spent)


class _Refusal(TemplateError):
    """The template called raise_exception."""


class _Meter:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.left = BUDGET
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, cost: int) -> None:
        self.left -= cost + STEP_COST
        if self.left < 0:
            raise SecurityError(f"it makes more than {BUDGET} characters or {BUDGET // STEP_COST} steps")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS} seconds")


_METER: ContextVar[_Meter] = ContextVar("meter")  # of the rendering under way


def _step(cost: int) -> bool:
    """True, so that it can stand before a condition. A template can call it too, but not to get anything back."""
    _METER.get().step(max(cost, 0))
    return True


def _made(value: Any) -> Any:
    """The value, paid for. Lists nested in themselves print exponentially, so the limit counts their full depth;
    the budget counts what was newly allocated."""
    _refuse_size(_full_size(value))
    if isinstance(value, str):
        _step(len(value))
    elif isinstance(value, list | tuple | dict):
        _step(ITEM_COST * len(value))
    else:
        _step(0)
    return value


def _full_size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(ITEM_COST + _full_size(key) + _full_size(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return sum(ITEM_COST + _full_size(item) for item in value)
    return ITEM_COST


def _refuse_size(size: int) -> None:
    if size > MAX_VALUE:
        raise SecurityError(f"it makes a value of {size} characters, at most {MAX_VALUE} are allowed")


def _collect(pieces: Iterable[str]) -> str:
    texts, length = [], 0
    for piece in pieces:
        length += len(piece)
        _refuse_size(length)
        texts.append(piece)
    return "".join(texts)


def _metered(function: Any) -> Callable[..., Any]:
    """A jinja filter or test that takes a step, and that neither takes nor gives lazy sequences (they would do their
    work outside of the step)."""
    at = int(hasattr(function, "jinja_pass_arg"))  # jinja passes its context first

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = (*args[:at], _eager(args[at]), *args[at + 1 :])
        return _made(_eager(function(*given, **kwargs)))

    return run


def _eager(value: Any) -> Any:
    return _made(list(value)) if isinstance(value, Iterator) else value


def _join(items: Iterable[object], d: str = "") -> str:
    values = _made(list(items))
    _refuse_size(len(d) * len(values))
    return d.join(str(_printable(value)) for value in values)


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    _refuse_size(str(text).count(old) * len(new))
    return str(text).replace(old, new, -1 if count is None else count)


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    _refuse_size(text.count("\n") * int(width))
    return FILTERS["indent"](text, width, first, blank)  # type: ignore[no-any-return]


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As chat templates expect it: no HTML escapes."""
    if indent is not None and indent > MAX_JSON_INDENT:
        raise SecurityError(f"tojson asks for an indent of {indent}, at most {MAX_JSON_INDENT} is allowed")
    _made(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    if _PADDED_DATE.search(form):
        raise SecurityError(f"strftime_now asks for padding: {form[:40]!r}")
    return datetime.now().strftime(form)


def _printable(value: Any) -> Any:
    if isinstance(value, str | int | float | list | tuple | dict | Undefined | None):
        return _made(value)
    raise SecurityError(f"it prints a {type(value).__name__}")


@pass_context
def _printed(context: Context, value: Any) -> Any:
    """Everything that `{{ … }}` prints passes here. The context is unused; asking for it keeps jinja from calling
    this at compile time."""
    return _printable(value)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops: ClassVar[frozenset[str]] = frozenset({"+", "*", "**", "%"})  # type: ignore[misc]

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # or jinja would run parts of the template while compiling, where nothing is metered
            extensions=[loopcontrols, _Generation],
            finalize=_printed,
        )
        own = {"join": _join, "replace": _replace, "indent": _indent, "tojson": _tojson, "made": _made}
        self.filters = {name: _metered(FILTERS[name]) for name in _FILTERS.split()}
        self.filters |= {name: _metered(function) for name, function in own.items()}
        self.filters["step"] = _step
        self.tests = {name: _metered(function) for name, function in TESTS.items()}
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _STRING_METHODS.split():
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` gets no wrapper: like other methods that pad, it is not on offer."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"it asks for {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _refuse_size(_result_size(operator, left, right))
        return _made(super().call_binop(context, operator, left, right))

    # jinja's own names of the first two parameters keep them apart from a template's keyword arguments.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ == "join":
            return _made(_join(args[0], owner))
        if isinstance(owner, str) and __obj.__name__ == "replace":
            return _made(_replace(owner, *args, **kwargs))
        return _made(_eager(super().call(__context, __obj, *args, **kwargs)))


def _result_size(operator: str, left: Any, right: Any) -> int:
    """An upper bound, in characters, of what an operator is about to make."""
    sizes = [_full_size(side) for side in (left, right)]
    if operator == "+":
        return sum(sizes)
    if operator == "%" and isinstance(left, str):
        raise SecurityError("it formats with %, use ~ instead")
    if isinstance(left, float) or isinstance(right, float) or operator == "%":
        return ITEM_COST
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        return ITEM_COST if bits <= MAX_INTEGER_BITS else MAX_VALUE + bits
    return sizes[0] * right if isinstance(right, int) else sizes[1] * left if isinstance(left, int) else 0


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Instrument(NodeTransformer):
    """Puts a step into every body that can run more than once, and a measure onto every value made by syntax alone."""

    def _repeated(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        step = _filter(nodes.Const(text), "step", node)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = _repeated

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._repeated(node)
        if node.test is not None:  # a turn that fails the test never reaches the body
            node.test = nodes.And(_filter(nodes.Const(0), "step", node), node.test, lineno=node.lineno)
        return node

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        return node if is_target else _filter(node, "made", node)

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "join", node)


def _filter(value: nodes.Expr, name: str, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None).set_lineno(at.lineno)  # type: ignore[return-value]


def _compile(source: str) -> Template:
    environment = _Environment()
    try:
        tree = _Instrument().visit(environment.parse(source))
        code = environment.compile(tree)
    except (TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ModelError(
            f"the model's chat template is not valid: {type(error).__name__}: {error}",
            hint="the model's files look damaged, or the template needs something that templates here may not do",
        ) from error
    return Template.from_code(environment, code, environment.make_globals(None))
