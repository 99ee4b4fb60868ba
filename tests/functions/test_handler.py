"""The whole way of an invocation, with the fake session: what the platform gets, when, and what is metered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from event import Reading
from fake_runtime_api import Exchange, url_event
from handler import DEADLINE_MARGIN_S
from lambda_support import GatedSession, OnLambda, on_lambda
from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason
from runtime_client import HTTP_INTEGRATION
from support import VOCAB_SIZE, events, expected_tokens, named_events, run_out_of_time, toy_tokenizer

PROMPT_IDS = toy_tokenizer().encode("hi", add_special_tokens=False).ids
COMPLETIONS = "/v1/completions"
LEFT_S = 60.0
"""How long an invocation has that runs out of time; the tests let it pass at once."""


def body(**params: Any) -> dict[str, Any]:
    return {"model": "toy", "prompt": "hi", "max_tokens": 4, "ignore_eos": True, "return_token_ids": True, **params}


def chosen(frames: list[dict[str, Any]]) -> list[int]:
    """Return the token ids of all frames, in order."""
    choices = [choice for frame in frames for choice in frame["choices"]]
    return [token_id for choice in choices for token_id in choice.get("token_ids", [])]


async def wait_for(blocking: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(blocking)


async def ran(session: GatedSession, num_runs: int) -> None:
    """Wait until the model has begun so many runs."""
    while session.num_runs < num_runs:
        await asyncio.sleep(0)


async def first_token(exchange: Exchange) -> bytes:
    """Take the prelude and the first frame with a token."""
    prelude: bytes = await wait_for(exchange.chunk)
    assert prelude.endswith(bytes(8))
    frame: bytes = await wait_for(exchange.chunk)
    return frame


def test_the_first_token_leaves_before_the_last_is_generated(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        session = GatedSession()
        async with on_lambda(toy_artifact, tmp_path, session) as aws:
            exchange = aws.platform.invoke_http("POST", COMPLETIONS, body(stream=True))
            session.permit(1)
            frame = await first_token(exchange)
            assert session.num_runs == 1
            session.permit(3)
            rest = await wait_for(exchange.body)
            frames = events((frame + rest).decode())
            assert chosen(frames) == expected_tokens(PROMPT_IDS, 4, frozenset())
            assert rest.endswith(b"data: [DONE]\n\n")
            await wait_for(exchange.wait)
            assert exchange.trailers == {}

    asyncio.run(scenario())


def test_a_streamed_response_has_the_platforms_form(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path) as aws:
            exchange = aws.platform.invoke_http("POST", COMPLETIONS, body(stream=True), invocation_id="attempt-7")
            prelude, _ = await wait_for(exchange.http)
            assert prelude["statusCode"] == 200
            assert prelude["headers"]["content-type"].startswith("text/event-stream")
            assert prelude["headers"]["x-request-id"] == exchange.request_id
            assert prelude["cookies"] == []
            assert exchange.headers["content-type"] == HTTP_INTEGRATION
            assert exchange.headers["lambda-runtime-invocation-id"] == "attempt-7"
            record = aws.toy.ledger.get(exchange.request_id)
            assert record is not None
            assert (record.finish_reason, record.completion_tokens) == (FinishReason.LENGTH, 4)

    asyncio.run(scenario())


def test_errors_have_their_status_and_envelope(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path) as aws:
            refusals: list[tuple[tuple[Any, ...], int, str]] = [
                (("POST", COMPLETIONS, body(model="other")), 404, "model_not_found"),
                (("POST", COMPLETIONS, body(max_tokens=-1)), 400, "invalid_value"),
                (("POST", COMPLETIONS, "no json"), 400, "invalid_json"),
                (("GET", "/nowhere"), 404, "not_found"),
                (("GET", COMPLETIONS), 405, "method_not_allowed"),
            ]
            for request, status, code in refusals:
                prelude, payload = await wait_for(aws.platform.invoke_http(*request).http)
                assert (prelude["statusCode"], json.loads(payload)["error"]["code"]) == (status, code)

    asyncio.run(scenario())


def test_usage_is_asked_for_by_the_request_id(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path) as aws:
            exchange = aws.platform.invoke_http("POST", COMPLETIONS, body())
            await wait_for(exchange.http)
            _, payload = await wait_for(aws.platform.invoke_http("GET", f"/v1/usage/{exchange.request_id}").http)
            assert json.loads(payload)["completion_tokens"] == 4

    asyncio.run(scenario())


USER = [{"role": "user", "content": "hi"}]
OTHER_APIS = {
    "/v1/responses": {"model": "toy", "input": "hi", "max_output_tokens": 4},
    "/v1/messages": {"model": "toy", "messages": USER, "max_tokens": 4},
}


@pytest.mark.parametrize("path", OTHER_APIS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("url_reading", [Reading.HTTP_STREAM, Reading.HTTP_OBJECT])
def test_the_other_apis_answer_as_they_do_on_a_host(
    toy_artifact: Artifact, tmp_path: Path, path: str, stream: bool, url_reading: Reading
) -> None:
    """Through a function URL, streamed and buffered; what the API itself says without Lambda is what is expected."""
    asked = {**OTHER_APIS[path], "ignore_eos": True, "stream": stream}

    def essence(payload: str) -> Any:
        """Return what does not differ from request to request."""
        if stream:
            names = [name for name, _ in named_events(payload)]
            return names, "".join(str(event.get("delta")) for _, event in named_events(payload))
        answer = json.loads(payload)
        return answer.get("output", [{}])[0].get("content"), answer.get("content"), answer["usage"]["output_tokens"]

    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path, url_reading=url_reading) as aws:
            expected = (await aws.toy.client.post(path, json=asked)).text
            exchange = aws.platform.invoke_http("POST", path, asked)
            if url_reading is Reading.HTTP_STREAM:
                prelude, payload = await wait_for(exchange.http)
            else:
                prelude = json.loads(await wait_for(exchange.body))
                payload = prelude["body"]
            assert prelude["statusCode"] == 200
            assert essence(payload) == essence(expected)
            record = aws.toy.ledger.get(prelude["headers"]["x-request-id"])
            assert record is not None
            assert record.completion_tokens == 4

    asyncio.run(scenario())


def test_the_other_apis_refuse_in_their_own_words(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path) as aws:
            exchange = aws.platform.invoke_http("POST", "/v1/messages", {**OTHER_APIS["/v1/messages"], "messages": []})
            prelude, payload = await wait_for(exchange.http)
            refusal = json.loads(payload)
            assert prelude["statusCode"] == 400
            assert (refusal["type"], refusal["error"]["type"]) == ("error", "invalid_request_error")
            assert refusal["request_id"] == prelude["headers"]["request-id"] == exchange.request_id
            asked = {**OTHER_APIS["/v1/responses"], "previous_response_id": "resp_gone"}
            prelude, payload = await wait_for(aws.platform.invoke_http("POST", "/v1/responses", asked).http)
            assert prelude["statusCode"] == 400
            assert json.loads(payload)["error"]["code"] == "previous_response_not_found"

    asyncio.run(scenario())


def test_a_sandbox_goes_on_from_a_response_that_it_made(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path) as aws:
            asked = {"model": "toy", "input": "a", "max_output_tokens": 2, "ignore_eos": True}
            _, payload = await wait_for(aws.platform.invoke_http("POST", "/v1/responses", asked).http)
            first = json.loads(payload)
            kept = aws.platform.invoke_http("GET", f"/v1/responses/{first['id']}")
            assert json.loads((await wait_for(kept.http))[1]) == first
            asked = {**asked, "previous_response_id": first["id"], "max_output_tokens": 1}
            prelude, payload = await wait_for(aws.platform.invoke_http("POST", "/v1/responses", asked).http)
            assert prelude["statusCode"] == 200, payload
            assert json.loads(payload)["usage"]["input_tokens"] > 2 * first["usage"]["input_tokens"]

    asyncio.run(scenario())


@pytest.mark.parametrize(("path", "last"), [("/v1/responses", "response.failed"), ("/v1/messages", "error")])
def test_a_failure_in_a_stream_of_the_other_apis_is_an_event_and_a_trailer(
    toy_artifact: Artifact, tmp_path: Path, path: str, last: str
) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path, failing_session(2)) as aws:
            exchange = aws.platform.invoke_http("POST", path, {**OTHER_APIS[path], "ignore_eos": True, "stream": True})
            prelude, payload = await wait_for(exchange.http)
            await wait_for(exchange.wait)
            assert prelude["statusCode"] == 200
            assert named_events(payload)[-1][0] == last
            assert exchange.trailer_error["errorType"] == "Pilotlight.EngineError"

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_plain_invoke_gets_the_payload_alone(toy_artifact: Artifact, tmp_path: Path, stream: bool) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path) as aws:
            exchange = aws.platform.invoke(body(stream=stream))
            payload = (await wait_for(exchange.body)).decode()
            frames = events(payload) if stream else [json.loads(payload)]
            assert chosen(frames) == expected_tokens(PROMPT_IDS, 4, frozenset())
            assert exchange.headers.get("content-type") != HTTP_INTEGRATION

    asyncio.run(scenario())


def test_a_buffered_url_gets_one_object(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path, url_reading=Reading.HTTP_OBJECT) as aws:
            exchange = aws.platform.invoke_http("POST", COMPLETIONS, body(stream=True))
            answer = json.loads(await wait_for(exchange.body))
            assert (answer["statusCode"], answer["isBase64Encoded"]) == (200, False)
            assert chosen(events(answer["body"])) == expected_tokens(PROMPT_IDS, 4, frozenset())
            assert "lambda-runtime-function-response-mode" not in exchange.headers

    asyncio.run(scenario())


def test_other_events_fail_and_the_next_one_is_answered(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path) as aws:
            message = aws.platform.invoke({"Records": [{"eventSource": "aws:sqs"}]})
            await wait_for(message.wait)
            assert message.error is not None
            assert message.error["errorType"] == "Pilotlight.UnsupportedEvent"
            assert message.error["errorMessage"].startswith("cannot answer records of aws:sqs")
            balanced = aws.platform.invoke({"requestContext": {"elb": {}}, "httpMethod": "GET", "path": "/"})
            answer = json.loads(await wait_for(balanced.body))
            assert (answer["statusCode"], json.loads(answer["body"])["error"]["code"]) == (501, "unsupported_event")
            assert await status_of(aws, "/livez") == 200

    asyncio.run(scenario())


async def status_of(aws: OnLambda, path: str) -> int:
    prelude, _ = await wait_for(aws.platform.invoke_http("GET", path).http)
    status: int = prelude["statusCode"]
    return status


def failing_session(num_good_runs: int) -> FakeSession:
    def before_run() -> None:
        if session.num_runs >= num_good_runs:
            raise RuntimeError("no such kernel")

    session = FakeSession(VOCAB_SIZE, before_run=before_run)
    return session


def test_a_failure_in_the_stream_is_a_frame_and_a_trailer(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path, failing_session(2)) as aws:
            exchange = aws.platform.invoke_http("POST", COMPLETIONS, body(stream=True))
            prelude, payload = await wait_for(exchange.http)
            await wait_for(exchange.wait)
            frames = events(payload)
            assert prelude["statusCode"] == 200
            assert frames[-1]["error"]["code"] == "engine_error"
            assert sum("error" in frame for frame in frames) == 1
            assert "[DONE]" not in payload
            assert exchange.trailer_error["errorType"] == "Pilotlight.EngineError"
            assert exchange.trailer_error["errorMessage"] == frames[-1]["error"]["message"]
            record = aws.toy.ledger.get(exchange.request_id)
            assert record is not None
            assert (record.finish_reason, record.completion_tokens) == (FinishReason.ERROR, 2)

    asyncio.run(scenario())


def test_a_defect_in_the_stream_is_a_frame_and_a_trailer_too(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> Any:
        yield b"data: {}\n\n"
        raise ZeroDivisionError

    async def scenario() -> None:
        monkeypatch.setattr("pilotlight.api.app.stream", broken)
        async with on_lambda(toy_artifact, tmp_path) as aws:
            exchange = aws.platform.invoke_http("POST", COMPLETIONS, body(stream=True))
            _, payload = await wait_for(exchange.http)
            await wait_for(exchange.wait)
            assert events(payload)[-1]["error"]["message"] == "an internal error occurred"
            assert exchange.trailer_error["errorMessage"] == "an internal error occurred"
            assert await status_of(aws, "/livez") == 200

    asyncio.run(scenario())


def test_a_response_that_comes_too_late_ends_nothing(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path) as aws:
            late = aws.platform.invoke_http("POST", COMPLETIONS, body(stream=True), status=410)
            await wait_for(late.wait)
            assert await status_of(aws, "/livez") == 200
            assert aws.toy.ledger.get(late.request_id) is not None

    asyncio.run(scenario())


def cancelled(aws: OnLambda, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Return an event that is set when the function is told to end a generation."""
    told = asyncio.Event()
    cancel = aws.toy.function.cancel

    def noticed(request_id: str) -> bool:
        told.set()
        return cancel(request_id)

    monkeypatch.setattr(aws.toy.function, "cancel", noticed)
    return told


def test_a_platform_that_hangs_up_ends_the_generation(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        session = GatedSession(max_context_tokens=10_000)
        async with on_lambda(toy_artifact, tmp_path, session) as aws:
            ended = cancelled(aws, monkeypatch)
            request = body(stream=True, max_tokens=9000)
            exchange = aws.platform.invoke_http("POST", COMPLETIONS, request, max_chunks=2)
            session.permit(1)
            await wait_for(exchange.wait)
            while not ended.is_set():  # a write has to fail before anybody can know
                session.permit(1)
                await asyncio.sleep(0.005)
            session.permit(50)
            assert await status_of(aws, "/livez") == 200
            record = aws.toy.ledger.get(exchange.request_id)
            assert record is not None
            assert record.finish_reason is FinishReason.CANCELLED
            assert record.completion_tokens < 9000

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_generation_ends_before_the_deadline(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async def scenario() -> None:
        session = GatedSession()
        async with on_lambda(toy_artifact, tmp_path, session) as aws:
            options = {"stream": stream, "max_tokens": 40, "stop": "never"}
            if stream:
                options["stream_options"] = {"include_usage": True}
            expired = cancelled(aws, monkeypatch)
            session.permit(3)  # of 40; then the model hangs until the deadline has come
            exchange = aws.platform.invoke_http("POST", COMPLETIONS, body(**options), left_s=DEADLINE_MARGIN_S + LEFT_S)
            await ran(session, 3)
            await run_out_of_time(aws.toy.function, exchange.request_id, LEFT_S)
            await expired.wait()
            session.permit(40)
            prelude, payload = await wait_for(exchange.http)
            frames = events(payload) if stream else [json.loads(payload)]
            finish = [choice["finish_reason"] for frame in frames for choice in frame["choices"]][-1]
            assert (prelude["statusCode"], finish) == (200, "length")
            assert frames[-1]["usage"]["completion_tokens"] <= 4
            record = aws.toy.ledger.get(exchange.request_id)
            assert record is not None
            assert record.finish_reason is FinishReason.DEADLINE
            assert record.delivered_tokens == record.completion_tokens == frames[-1]["usage"]["completion_tokens"]

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_the_next_invocation_goes_on_where_the_deadline_came(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The second invocation runs in another sandbox, which knows the secret and the token only."""
    asked = {"stream": stream, "max_tokens": 40}
    frames: list[list[dict[str, Any]]] = []

    async def ask(aws: OnLambda, **params: Any) -> UsageRecord:
        exchange = aws.platform.invoke_http("POST", COMPLETIONS, body(**asked, **params))
        prelude, payload = await wait_for(exchange.http)
        frames.append(events(payload) if stream else [json.loads(payload)])
        record = aws.toy.ledger.get(prelude["headers"]["x-request-id"])
        assert record is not None
        return record

    async def scenario() -> None:
        session = GatedSession()
        async with on_lambda(toy_artifact, tmp_path, session) as aws:
            expired = cancelled(aws, monkeypatch)
            session.permit(3)
            exchange = aws.platform.invoke_http("POST", COMPLETIONS, body(**asked), left_s=DEADLINE_MARGIN_S + LEFT_S)
            await ran(session, 3)
            await run_out_of_time(aws.toy.function, exchange.request_id, LEFT_S)
            await expired.wait()
            session.permit(40)
            _, payload = await wait_for(exchange.http)
            frames.append(events(payload) if stream else [json.loads(payload)])
        usage = frames[0][-1]["usage"]
        async with on_lambda(toy_artifact, tmp_path) as aws:
            record = await ask(aws, resume_token=usage["pilotlight"]["resume_token"])
        assert chosen(frames[0] + frames[1]) == expected_tokens(PROMPT_IDS, 40, frozenset())
        assert (record.prompt_tokens, record.resumed_tokens) == (0, usage["total_tokens"])
        assert record.completion_tokens == 40 - usage["completion_tokens"]

    asyncio.run(scenario())


def test_several_invocations_run_at_the_same_time(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        session = GatedSession()
        async with on_lambda(toy_artifact, tmp_path, session, num_pollers=2) as aws:
            first = aws.platform.invoke_http("POST", COMPLETIONS, body(stream=True))
            session.permit(1)
            frame = await first_token(first)
            assert await status_of(aws, "/livez") == 200
            second = aws.platform.invoke_http("POST", COMPLETIONS, body(stream=True))
            session.permit(20)
            for payload in (frame + await wait_for(first.body), (await wait_for(second.http))[1].encode()):
                assert chosen(events(payload.decode())) == expected_tokens(PROMPT_IDS, 4, frozenset())

    asyncio.run(scenario())


def test_a_running_invocation_is_cancelled_through_another(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        session = GatedSession()
        async with on_lambda(toy_artifact, tmp_path, session, num_pollers=2) as aws:
            exchange = aws.platform.invoke_http("POST", COMPLETIONS, body(stream=True))
            session.permit(1)
            await first_token(exchange)
            cancel = aws.platform.invoke_http("POST", f"/v1/requests/{exchange.request_id}/cancel")
            assert (await wait_for(cancel.http))[0]["statusCode"] == 200
            session.permit(20)
            assert events((await wait_for(exchange.body)).decode())[-1]["error"]["code"] == "request_cancelled"

    asyncio.run(scenario())


def test_a_head_without_a_body_still_has_a_byte(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path) as aws:
            prelude, payload = await wait_for(aws.platform.invoke(url_event("HEAD", "/livez")).http)
            assert prelude["statusCode"] == 200
            assert payload
            assert "content-length" not in prelude["headers"]

    asyncio.run(scenario())
