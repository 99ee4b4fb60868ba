"""Events into requests: function URLs, HTTP APIs, plain invokes, and everything else, which is refused."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from event import Call, Reading, UnsupportedEvent, parse_event
from fake_runtime_api import url_event

RECORDED = Path(__file__).parents[3] / "shared" / "data" / "lambda_events"
HTTP_EVENTS = {
    "apiGatewayProxyV2Event": Reading.HTTP_OBJECT,
    "lambdaFunctionUrlEvent": Reading.HTTP_STREAM,
    "lambdaFunctionUrlEventWithHeaders": Reading.HTTP_STREAM,
    "lambdaFunctionUrlIAMEvent": Reading.HTTP_STREAM,
}
REFUSALS = {
    "albEvent": "a request of a load balancer or of a REST API",
    "eventBridgeEvent": "the event 'EC2 Instance State-change Notification' of aws.ec2",
    "s3Event": "records of aws:s3",
    "sqsEvent": "records of aws:sqs",
}


def recorded(name: str) -> bytes:
    if not RECORDED.is_dir():
        pytest.skip("the recorded Lambda events are not in ../shared/data/lambda_events")
    return (RECORDED / f"{name}.json").read_bytes()


def parsed(event: object, url_reading: Reading = Reading.HTTP_STREAM) -> Call:
    return parse_event(event if isinstance(event, bytes) else json.dumps(event).encode(), "aws-1", url_reading)


def headers_of(call: Call) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in call.scope["headers"]}


@pytest.mark.parametrize(("name", "reading"), HTTP_EVENTS.items())
def test_recorded_http_events_are_requests(name: str, reading: Reading) -> None:
    call = parsed(recorded(name))
    assert call.reading is reading
    assert call.scope["path"] in ("/", "/my/path")
    assert headers_of(call)["x-request-id"] == "aws-1"


def test_a_recorded_request_arrives_whole() -> None:
    call = parsed(recorded("lambdaFunctionUrlIAMEvent"))
    assert (call.scope["method"], call.scope["path"], call.body) == ("POST", "/my/path", b"Hello from client!")
    assert call.scope["query_string"] == b"parameter1=value1&parameter1=value2&parameter2=value"
    assert headers_of(call)["header2"] == "value1,value2"
    assert headers_of(call)["cookie"] == "cookie1; cookie2"
    assert call.scope["client"] == ("123.123.123.123", 0)


@pytest.mark.parametrize(("name", "described"), REFUSALS.items())
def test_recorded_events_of_other_services_are_refused_by_name(name: str, described: str) -> None:
    with pytest.raises(UnsupportedEvent) as refusal:
        parsed(recorded(name))
    assert refusal.value.message.startswith(f"cannot answer {described}; send requests through a function URL")
    assert (refusal.value.reading is not None) is (name == "albEvent")


def test_every_recorded_event_is_covered() -> None:
    recorded("sqsEvent")
    assert {path.stem for path in RECORDED.glob("*.json")} == HTTP_EVENTS.keys() | REFUSALS.keys()


def test_a_base64_body_is_decoded() -> None:
    encoded = base64.b64encode("ü".encode()).decode()
    assert parsed(url_event("POST", "/", encoded, isBase64Encoded=True)).body == "ü".encode()
    with pytest.raises(UnsupportedEvent, match="whose body is not base64"):
        parsed(url_event("POST", "/", "%", isBase64Encoded=True))


def test_the_clients_own_request_id_wins() -> None:
    assert headers_of(parsed(url_event("GET", "/", headers={"X-Request-Id": "mine"})))["x-request-id"] == "mine"


def test_under_iam_the_key_is_in_x_api_key() -> None:
    signed = {"authorization": "AWS4-HMAC-SHA256 Credential=1", "x-api-key": "secret"}
    event = url_event("GET", "/", headers=signed)
    assert headers_of(parsed(event))["authorization"] == signed["authorization"]
    event["requestContext"]["authorizer"] = {"iam": {"accountId": "1"}}
    assert headers_of(parsed(event))["authorization"] == "Bearer secret"
    del event["headers"]["x-api-key"]
    assert "authorization" not in headers_of(parsed(event))


def test_a_path_is_decoded_once_and_a_stage_is_no_part_of_it() -> None:
    event = url_event("GET", "/live/v1/models/a%20b")
    event["requestContext"]["stage"] = "live"
    call = parsed(event)
    assert (call.scope["path"], call.scope["raw_path"]) == ("/v1/models/a b", b"/v1/models/a%20b")


def test_only_a_function_url_streams() -> None:
    event = url_event("GET", "/")
    assert parsed(event, Reading.HTTP_OBJECT).reading is Reading.HTTP_OBJECT
    event["requestContext"]["domainName"] = "abc.execute-api.us-east-1.amazonaws.com"
    assert parsed(event).reading is Reading.HTTP_OBJECT


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"model": "toy", "messages": []}, "/v1/chat/completions"),
        ({"model": "toy", "prompt": "hi"}, "/v1/completions"),
    ],
)
def test_a_plain_invoke_is_a_body(body: dict[str, Any], path: str) -> None:
    call = parsed(body)
    assert (call.scope["method"], call.scope["path"], json.loads(call.body)) == ("POST", path, body)
    assert call.reading is Reading.PAYLOAD


@pytest.mark.parametrize(
    "raw", [b"", b"\xff", b"nonsense", b"null", b"[]", b"{}", b'"text"', b"[" * 10_000, b'{"version": "2.0"}']
)
def test_what_is_no_event_is_refused(raw: bytes) -> None:
    with pytest.raises(UnsupportedEvent):
        parsed(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted({*url_event("GET", "/"), "body", "cookies", "Records", "detail-type", "httpMethod", "messages"})


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.booleans())
def test_no_event_is_a_crash(changes: dict[str, Any], whole: bool) -> None:
    event = {**(url_event("GET", "/") if whole else {}), **changes}
    with suppress(UnsupportedEvent):
        assert parsed(event).scope["type"] == "http"
