"""The document and the server agree: requests made from the one are sent to the other."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from edgewise.engines.fake import FakeGenerator
from edgewise.serve.openapi import document
from edgewise.wire.openai import CHAT_TREATMENT, REFUSED
from served import Served

SCHEMA = schemathesis.openapi.from_dict(json.loads(document("1")))
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(FakeGenerator("fine")) as it:
        yield it


@SCHEMA.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_server_does_what_the_document_says(case: schemathesis.Case, served: Served) -> None:
    case.call_and_validate(base_url=served.url, checks=list(CHECKS))


def test_the_document_tells_every_field() -> None:
    schemas = json.loads(document("1"))["components"]["schemas"]
    fields = schemas["ChatBody"]["properties"]
    assert set(fields) == set(CHAT_TREATMENT)
    assert schemas["ChatBody"]["additionalProperties"] is False
    assert [name for name, field in fields.items() if field.get("type") == "null"] == [
        name for name, treatment in CHAT_TREATMENT.items() if treatment == REFUSED
    ]
