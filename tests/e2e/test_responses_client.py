"""The real server process with the official OpenAI client on the Responses API, unmodified."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseCompletedEvent

from corpus import held_out_turns
from pace import Pace
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason
from support import PATIENCE_S, ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.model]


def record_of(ledger: Path, response_id: str, server: ServerProcess) -> UsageRecord:
    """Return the record behind a response, waiting for it as long as the server lives."""
    with LedgerReader(ledger) as reader, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        while (record := reader.get(response_id.removeprefix("resp_"))) is None:
            assert http.get("/livez").status_code == 200
    return record


def test_it_asks_and_gets_right_answers(client: openai.OpenAI) -> None:
    turns = held_out_turns("sum", 10)
    answers = [client.responses.create(model="demo", input=turn.question) for turn in turns]
    assert all(answer.status == "completed" for answer in answers)
    assert sum(answer.output_text == turn.answer for answer, turn in zip(answers, turns, strict=True)) >= 8


def test_it_streams(client: openai.OpenAI, server: ServerProcess, ledger: Path) -> None:
    question = held_out_turns("story", 1)[0].question
    whole = client.responses.create(model="demo", input=question)
    with client.responses.stream(model="demo", input=question) as stream:
        events = list(stream)
        final = stream.get_final_response()
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert isinstance(events[-1], ResponseCompletedEvent)
    assert final.usage is not None
    record = record_of(ledger, final.id, server)
    assert (record.prompt_tokens, record.completion_tokens) == (final.usage.input_tokens, final.usage.output_tokens)


def test_it_goes_on_from_a_response_and_forgets_it(client: openai.OpenAI) -> None:
    first = client.responses.create(model="demo", input="Hello!", metadata={"topic": "greeting"})
    second = client.responses.create(model="demo", input="And again?", previous_response_id=first.id)
    alone = client.responses.create(model="demo", input="And again?", store=False)
    assert first.usage is not None
    assert second.usage is not None
    assert alone.usage is not None
    assert second.usage.input_tokens > alone.usage.input_tokens + first.usage.output_tokens
    assert client.responses.retrieve(first.id) == first
    (item,) = client.responses.input_items.list(first.id)
    assert item.type == "message"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as gone:
        client.responses.retrieve(first.id)
    assert gone.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as late:
        client.responses.create(model="demo", input="And again?", previous_response_id=first.id)
    assert late.value.param == "previous_response_id"


def test_a_limit_makes_an_answer_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="demo", input=held_out_turns("story", 1)[0].question, max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 3


class Sum(pydantic.BaseModel):
    left: int = pydantic.Field(ge=0, le=99)
    right: int = pydantic.Field(ge=0, le=99)


def test_it_parses_structured_answers(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model="demo", input="What is 3 + 4?", text_format=Sum)
    assert isinstance(answer.output_parsed, Sum)


def test_it_gets_the_calls_that_it_demands(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Sum, name="add")["function"]
    with client.responses.stream(
        model="demo",
        input="What is 3 + 4?",
        tools=[{"type": "function", "name": "add", "parameters": tool["parameters"], "strict": True}],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        final = stream.get_final_response()
    (call,) = final.output
    assert call.type == "function_call"
    Sum.model_validate_json(call.arguments)
    after = client.responses.create(
        model="demo",
        previous_response_id=final.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "7"}],
        max_output_tokens=20,
    )
    assert after.status in ("completed", "incomplete")


def test_it_understands_our_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="other", input="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model="demo", input="word " * 2000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")


def test_the_async_client_runs_several_at_once(server: ServerProcess, ledger: Path) -> None:
    turns = held_out_turns("sum", 6)

    async def scenario() -> list[Response]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(client.responses.create(model="demo", input=turn.question) for turn in turns))

    for response in asyncio.run(scenario()):
        assert response.usage is not None
        assert record_of(ledger, response.id, server).completion_tokens == response.usage.output_tokens


def test_a_stream_that_is_closed_early_is_metered(server: ServerProcess, ledger: Path, pace: Pace) -> None:
    async def scenario() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.responses.create(
                model="demo", input="hi", max_output_tokens=500, stream=True, extra_body={"ignore_eos": True}
            )
            response_id = ""
            async for event in stream:
                if event.type == "response.created":
                    response_id = event.response.id
                if event.type == "response.output_text.delta":
                    break
            await stream.close()
            return response_id

    with pace.slow():
        record = record_of(ledger, asyncio.run(scenario()), server)
    assert record.finish_reason is FinishReason.CANCELLED
    assert 1 <= record.completion_tokens < 500
