"""The real server process with the official Anthropic client, unmodified."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import pytest
from anthropic.types import MessageParam, TextBlock, ToolParam, ToolUseBlock

from corpus import held_out_turns
from pace import Pace
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason
from support import PATIENCE_S, ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.model]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def user(content: str) -> list[MessageParam]:
    return [{"role": "user", "content": content}]


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if isinstance(block, TextBlock))


def record_of(ledger: Path, request_id: str | None, server: ServerProcess) -> UsageRecord:
    """Return an invocation's record, waiting for it as long as the server lives."""
    assert request_id is not None
    with LedgerReader(ledger) as reader, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        while (record := reader.get(request_id)) is None:
            assert http.get("/livez").status_code == 200
    return record


def test_it_asks_and_gets_right_answers(client: anthropic.Anthropic) -> None:
    turns = held_out_turns("sum", 10)
    answers = [
        text_of(client.messages.create(model="demo", max_tokens=64, messages=user(turn.question))) for turn in turns
    ]
    assert sum(answer == turn.answer for answer, turn in zip(answers, turns, strict=True)) >= 8


def test_it_streams(client: anthropic.Anthropic, server: ServerProcess, ledger: Path) -> None:
    question = held_out_turns("story", 1)[0].question
    whole = client.messages.create(model="demo", max_tokens=200, system="Be kind.", messages=user(question))
    with client.messages.stream(model="demo", max_tokens=200, system="Be kind.", messages=user(question)) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
        request_id = stream.response.headers["request-id"]
    assert text == text_of(whole) == text_of(final)
    assert final.stop_reason == whole.stop_reason == "end_turn"
    assert final.usage.input_tokens == whole.usage.input_tokens
    record = record_of(ledger, request_id, server)
    assert (record.prompt_tokens, record.completion_tokens) == (final.usage.input_tokens, final.usage.output_tokens)
    counted = client.messages.count_tokens(model="demo", system="Be kind.", messages=user(question))
    assert counted.input_tokens == final.usage.input_tokens


def test_a_stop_sequence_and_a_limit_are_told_apart(client: anthropic.Anthropic) -> None:
    question = held_out_turns("story", 1)[0].question
    cut = client.messages.create(model="demo", max_tokens=3, messages=user(question))
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
    stopped = client.messages.create(model="demo", max_tokens=200, stop_sequences=["."], messages=user(question))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", ".")


ADD: ToolParam = {
    "name": "add",
    "description": "Adds two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"left": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["left"],
        "additionalProperties": False,
    },
}


def test_it_gets_the_calls_that_it_demands(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(
        model="demo", max_tokens=100, messages=user("3 + 4?"), tools=[ADD], tool_choice={"type": "tool", "name": "add"}
    )
    with client.messages.stream(
        model="demo", max_tokens=100, messages=user("3 + 4?"), tools=[ADD], tool_choice={"type": "tool", "name": "add"}
    ) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        (block,) = message.content
        assert isinstance(block, ToolUseBlock)
        assert 0 <= int(str(block.input["left"])) <= 99
    counted = client.messages.count_tokens(model="demo", messages=user("3 + 4?"), tools=[ADD])
    assert counted.input_tokens == whole.usage.input_tokens


def test_it_understands_our_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="other", max_tokens=8, messages=user("hi"))
    assert missing.value.request_id == missing.value.response.headers["request-id"]
    assert isinstance(missing.value.body, dict)
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="maximum context length is"):
        client.messages.create(model="demo", max_tokens=8, messages=user("word " * 2000))
    with pytest.raises(anthropic.APIStatusError) as large:
        client.messages.create(model="demo", max_tokens=8, messages=user("x" * 10_000_000))
    assert large.value.status_code == 413


def test_the_async_client_runs_several_at_once(server: ServerProcess, ledger: Path) -> None:
    turns = held_out_turns("sum", 6)

    async def scenario() -> list[anthropic.types.Message]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(client.messages.create(model="demo", max_tokens=64, messages=user(turn.question)) for turn in turns)
            )

    for message in asyncio.run(scenario()):
        record = record_of(ledger, message._request_id, server)
        assert record.completion_tokens == message.usage.output_tokens


def test_a_stream_that_is_closed_early_is_metered(server: ServerProcess, ledger: Path, pace: Pace) -> None:
    async def scenario() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client,
            client.messages.stream(
                model="demo", max_tokens=500, messages=user("hi"), extra_body={"ignore_eos": True}
            ) as stream,
        ):
            async for _ in stream.text_stream:
                break
            return stream.response.headers["request-id"]

    with pace.slow():
        record = record_of(ledger, asyncio.run(scenario()), server)
    assert record.finish_reason is FinishReason.CANCELLED
    assert 1 <= record.completion_tokens < 500


def test_an_answer_is_held_to_its_schema(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"total": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["total"],
        "additionalProperties": False,
    }
    message = client.messages.create(
        model="demo",
        max_tokens=50,
        messages=user("3 + 4?"),
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert 0 <= json.loads(text_of(message))["total"] <= 99


def test_arguments_are_streamed_to_the_async_client(server: ServerProcess) -> None:
    async def scenario() -> tuple[str, object]:
        async with (
            anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client,
            client.messages.stream(
                model="demo",
                max_tokens=100,
                messages=user("3 + 4?"),
                tools=[ADD],
                tool_choice={"type": "any", "disable_parallel_tool_use": True},
            ) as stream,
        ):
            written = "".join([event.partial_json async for event in stream if event.type == "input_json"])
            (block,) = (await stream.get_final_message()).content
            assert isinstance(block, ToolUseBlock)
            return written, block.input

    written, arguments = asyncio.run(scenario())
    assert json.loads(written) == arguments


def test_it_retries_until_there_is_room(server: ServerProcess, pace: Pace) -> None:
    """More at once than the queue holds."""

    async def hurry_once_it_is_full(response: httpx.Response) -> None:
        if response.status_code == 503:
            pace.hurry()

    async def scenario() -> list[int]:
        http = anthropic.DefaultAsyncHttpxClient(event_hooks={"response": [hurry_once_it_is_full]})
        async with anthropic.AsyncAnthropic(
            base_url=server.url, api_key="none", max_retries=100, http_client=http
        ) as client:
            create = client.messages.with_raw_response.create
            raws = await asyncio.gather(
                *(create(model="demo", max_tokens=20, messages=user("Hello!")) for _ in range(120))
            )
            assert {(await raw.parse()).stop_reason for raw in raws} == {"max_tokens"}
            return [raw.retries_taken for raw in raws]

    with pace.slow(pause_s=0.5):
        assert max(asyncio.run(scenario())) > 0
