from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from edgewise.errors import ModelError, RequestError
from edgewise.models import chat
from edgewise.models.chat import CHATML, MAX_MESSAGE_CHARS, MAX_TEMPLATE_CHARS, MAX_VALUE, ChatTemplate
from edgewise.models.gguf import GGUF
from edgewise.types import Message

BOS, EOS = "<bos>", "<eos>"

QWEN = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}{{- raise_exception('no tools here') }}{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') if '</think>' in message.content else message.content %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>' ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501
LLAMA_3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content }}
{%- endfor %}
{{- "Year: " ~ strftime_now("%Y") }}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""  # noqa: E501
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("user and assistant must take turns") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}
"""
PHI = """\
{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}\
{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}\
{% elif message['role'] == 'assistant' %}{% generation %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}\
{% endgeneration %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}
"""
EVERYTHING = """\
{%- macro shown(message, mark='#') -%}
  {{ mark ~ message.role|upper|replace('E', '3') }}: {{ message|tojson }} {{ caller() if caller else '' }}
{%- endmacro %}
{%- for message in messages|rejectattr('role', 'equalto', 'tool') recursive %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- call shown(message, mark=loop.cycle('a', 'b')) %}{{ loop.length - loop.revindex }}{% endcall %}
    {%- for key, value in message|dictsort if key != 'x' %}{{ [key, value|length, none, true, 1.5] }}{% else %}-{% endfor %}
{%- endfor %}
{% set block %}{{ messages|map(attribute='role')|join(', ') }}{{ "a,b".split(",")|join("-") }}{% endset %}
{{ block * 2 }} {{ {'a': (1, 2)} | tojson(indent=2) }} {{ 7 // 2 ** 2 % 3 }} {{ messages|length * '=' }}
{{ messages|selectattr('role', 'in', ['user'])|list|last is defined }} {{ undefined }} {{ 'äé'|tojson }}
{{ ', '.join(['x', 'y']) }} {{ 'aXb'.replace('X', '--') }} {{ "one\ntwo"|indent(4, first=true) }} {{ range(3)|list }}
{{ messages[0].content[:3] ~ messages[0].content|wordcount ~ none ~ 1.0 }} {{ dict(a=1).items()|list }}
"""  # noqa: E501
TEMPLATES = {
    "chatml": CHATML,
    "qwen": QWEN,
    "llama 3": LLAMA_3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi": PHI,
    "everything": EVERYTHING,
}

USER, ANSWER = Message("user", " Hi <there> & 'you'\n"), Message("assistant", "<think>\nhm</think>\n\nHello 🙂 ")
CONVERSATIONS = {
    "one": (USER,),
    "three": (USER, ANSWER, Message("user", "नमस्ते\u2028{{ 7 * 7 }}{% raw %}")),
    "five": (USER, ANSWER, USER, ANSWER, Message("user", "")),
    "system": (Message("system", " Be \\brief. "), USER),
    "system, three": (Message("system", "s"), USER, ANSWER, USER),
}


def reference(source: str, messages: tuple[Message, ...]) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token=BOS, eos_token=EOS)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    rendered: Any = tokenizer.apply_chat_template(
        turns, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    return str(rendered)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str, conversation: str) -> None:
    source, messages = TEMPLATES[name], CONVERSATIONS[conversation]
    template = ChatTemplate(source, bos=BOS, eos=EOS)
    if name == "gemma" and messages[0].role == "system":
        with pytest.raises(RequestError, match="System role not supported") as refused:
            template.render(messages)
        assert refused.value.param == "messages"
        return
    rendered = template.render(messages)
    assert rendered == reference(source, messages)
    assert rendered == template.render(messages), "nothing is kept between renderings"


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_smollm2s_template(conversation: str, smollm2_gguf: Path) -> None:
    source = str(GGUF.open(smollm2_gguf).fields["tokenizer.chat_template"])
    messages = CONVERSATIONS[conversation]
    assert ChatTemplate(source, bos=BOS, eos=EOS).render(messages) == reference(source, messages)


def test_a_template_may_refuse_an_order() -> None:
    with pytest.raises(RequestError, match="must take turns") as refused:
        ChatTemplate(MISTRAL, bos=BOS, eos=EOS).render((USER, USER))
    assert refused.value.param == "messages"
    assert refused.value.hint


def test_long_conversations_render() -> None:
    messages = (USER, ANSWER) * 1500 + (Message("user", "x" * 1_000_000),)
    for source in (MISTRAL, QWEN, CHATML):
        assert len(ChatTemplate(source, bos=BOS, eos=EOS).render(messages)) > 1_000_000


@pytest.mark.parametrize("messages", [(), (Message("user", "x" * (MAX_MESSAGE_CHARS + 1)),)], ids=["none", "too long"])
def test_conversations_have_limits(messages: tuple[Message, ...]) -> None:
    with pytest.raises(RequestError, match=f"{len(messages)} messages.*{MAX_MESSAGE_CHARS}") as refused:
        ChatTemplate(CHATML).render(messages)
    assert refused.value.param == "messages"


INVALID = {
    "too long": "x" * (MAX_TEMPLATE_CHARS + 1),
    "syntax": "{% for %}",
    "unknown tag": "{% do x %}",
    "unknown filter": "{{ x|attr('y') }}",
    "padding filter": "{{ 'x'|center(10**9) }}",
    "unclosed": "{{ '",
    "deep expression": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "deep blocks": "{% if x %}" * 2000 + "{% endif %}" * 2000,
    "long number": "{{ " + "9" * 100_000 + " }}",
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_templates_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(INVALID[name])


ESCAPES = (
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '%s'.format_map(messages) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ namespace.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ loop.__class__ }}{% for m in messages %}{{ loop.__init__ }}{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].clear() }}",
    "{{ cycler() }}",
    "{{ lipsum(n=1000000) }}",
    "{{ joiner() }}",
    "{{ raise_exception }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ step(1) }}",
    "{% set messages = 1 %}{{ messages.x.y }}",
)


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_are_refused(source: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(source).render((USER,))


N = "range(100000)"
HANGS = {
    "nested loops": f"{{% for a in {N} %}}{{% for b in {N} %}}{{% endfor %}}{{% endfor %}}",
    "loops that skip": f"{{% for a in {N} %}}{{% for b in {N} if false %}}{{% endfor %}}{{% endfor %}}",
    "recursive loop": f"{{% for a in {N} recursive %}}{{{{ loop({N}) }}}}{{% endfor %}}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching macro": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "callers": "{% macro m(n) %}{% if n %}{% call m(n-1) %}{% endcall %}{{ m(n-1) }}{% endif %}{%endmacro%}{{m(60)}}",
    "steps given back": f"{{% for a in {N} %}}{{% for b in {N} %}}{{{{ (0 - 999)|step }}}}{{% endfor %}}{{% endfor %}}",
    "filters in a loop": f"{{% for a in {N} %}}{{{{ {N}|map('string')|select('none')|list|length }}}}{{% endfor %}}",
    "tests in a loop": f"{{% for a in {N} %}}{{{{ {N}|select('divisibleby', 7)|list|length }}}}{{% endfor %}}",
}


@pytest.mark.parametrize("name", HANGS)
def test_every_template_ends(name: str) -> None:
    template = ChatTemplate(HANGS[name])
    with pytest.raises(ModelError, match="chat template failed"):
        template.render((USER,))


def test_the_clock_ends_what_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% for a in range(10) %}{% endfor %}done")
    assert template.render((USER,)) == "done"
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr(chat, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(ticks))}))
    with pytest.raises(ModelError, match=r"takes more than 5\.0 seconds"):
        template.render((USER,))


BIG = "{% set big = 'a' * 1000000 %}"
DOUBLE = "{{% set ns = namespace(x='ab') %}}{{% for a in range(60) %}}{}{{% endfor %}}{{{{ ns.x|length }}}}"
FLOODS = {
    "repeated text": "{{ 'a' * 10000000000 }}",
    "repeated list": "{{ ([0] * 10000000000)|length }}",
    "repeated from the left": "{{ 10000000000 * 'a' }}",
    "doubled by +": DOUBLE.format("{% set ns.x = ns.x + ns.x %}"),
    "doubled by ~": DOUBLE.format("{% set ns.x = ns.x ~ ns.x %}"),
    "doubled by a block": DOUBLE.format("{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"),
    "doubled by a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLE.format("{% set ns.x = m(ns.x) %}"),
    "doubled list": DOUBLE.format("{% set ns.x = [ns.x, ns.x] %}"),
    "doubled dict": DOUBLE.format("{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
    "doubled tuple": DOUBLE.format("{% set ns.x = (ns.x, ns.x) %}"),
    "doubled namespace": DOUBLE.format("{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "squared number": "{% set ns = namespace(x=3) %}{% for a in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "formatted": "{{ '%1000000000d' % 1 }}",
    "padded": "{{ 'a'.ljust(1000000000) }}",
    "zeros": "{{ 'a'.zfill(1000000000) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "date": "{{ strftime_now('%1000000000Y') }}",
    "range": "{{ range(1000000000)|list }}",
    "many values": BIG
    + "{% set ns = namespace(x=[]) %}{% for a in range(1000) %}{% set ns.x = ns.x + [big ~ a] %}{% endfor %}",
    "join filter": BIG + "{{ (range(1000)|join(big))|length }}",
    "join method": BIG + "{{ big.join(['a'] * 1000)|length }}",
    "replace filter": BIG + "{{ big|replace('a', big) }}",
    "replace method": BIG + "{{ big.replace('a', big) }}",
    "replace nothing": BIG + "{{ big.replace('', 'bbbbbbbb') }}",
    "indent": "{{ 'a\n\n\n\n'|indent(1000000000, blank=true) }}",
    "json indent": "{{ [[[1]]]|tojson(indent=1000000000) }}",
    "default": BIG + "{{ range(100000)|map(attribute='x', default=big)|list|length }}",
    "printed": "{% for a in range(100000) %}" + "x" * 1000 + "{% endfor %}",
    "captured": "{% set x %}{% for a in range(100000) %}" + "x" * 10_000 + "{% endfor %}{% endset %}",
}


@pytest.mark.parametrize("name", FLOODS)
def test_memory_is_bounded(name: str) -> None:
    template = ChatTemplate(FLOODS[name])
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="chat template failed"):
            template.render((USER,))
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_VALUE
    finally:
        tracemalloc.stop()
