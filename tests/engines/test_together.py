"""Many requests at one Generator."""

import pytest

from edgewise.engines.fake import FakeGenerator, Script
from edgewise.engines.together import answers
from edgewise.errors import ContextFull
from edgewise.types import Message, Request


def ask(text: str) -> Request:
    return Request((Message("user", text),), max_tokens=8)


async def test_in_the_order_of_the_requests() -> None:
    texts = [f"answer number {n}" for n in range(7)]
    scripts = {text: Script(Script.of(text).tokens, delay_s=0.001 * (7 - n)) for n, text in enumerate(texts)}
    generator = FakeGenerator(lambda request: scripts[request.messages[0].content])
    found = await answers(generator, [ask(text) for text in texts], at_once=3)
    assert [one.text for one in found] == texts
    assert {one.finish_reason for one in found} == {"stop"}
    assert [token.raw for token in found[0].tokens] == [b"answer ", b"number ", b"0"]


async def test_no_more_at_once_than_there_is_room_for() -> None:
    most = 0

    def script(request: Request) -> Script:
        nonlocal most
        most = max(most, generator.active + 1)
        return Script(Script.of("one two three").tokens, delay_s=0.001)

    generator = FakeGenerator(script)
    await answers(generator, [ask("x")] * 20, at_once=4)
    assert most == 4
    assert generator.finished == 20


async def test_the_first_error_ends_all() -> None:
    def script(request: Request) -> Script:
        if request.messages[0].content == "bad":
            return Script((), error=ContextFull(9, 8))
        return Script(Script.of("a b c").tokens, hangs=True)

    generator = FakeGenerator(script)
    with pytest.raises(ContextFull):
        await answers(generator, [ask("good"), ask("bad"), ask("good")], at_once=3)
    await generator.close()
    assert generator.finished == 0
    assert generator.active == 0


async def test_none_at_all() -> None:
    assert await answers(FakeGenerator(), [], at_once=1) == []
