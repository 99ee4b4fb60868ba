"""The clients that app backends have, unmodified, against the real server and the demo model.

litellm and langchain-openai want an older ``openai`` than the one that is tested here, so they run in an environment of
their own, which ``make clients`` makes.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from pace import Pace
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.request import FinishReason
from support import PATIENCE_S, ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.model]
ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
OTHER_CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
MESSAGES: list[Any] = [{"role": "user", "content": "Hello!"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class Sum(BaseModel):
    total: int = Field(ge=0, le=99)
    parts: tuple[bool, bool]


def test_openai_parses_structured_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Sum)
    assert isinstance(answer.choices[0].message.parsed, Sum)
    with client.chat.completions.stream(model="demo", messages=MESSAGES, response_format=Sum) as stream:
        events = [event.type for event in stream]
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Sum)
    assert "content.delta" in events


def test_openai_calls_tools(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Oslo")

    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    with client.chat.completions.stream(model="demo", messages=MESSAGES, tools=[TOOL], tool_choice=named) as stream:
        deltas = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (final,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert "".join(deltas) == final.function.arguments
    assert json.loads(final.function.arguments).keys() == {"city", "days"}

    history = [*MESSAGES, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "grey"}]
    after = client.chat.completions.create(model="demo", messages=history, tools=[TOOL], max_tokens=5)
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_openai_gets_choices_and_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, n=3, logprobs=True, top_logprobs=2, max_tokens=4, temperature=1, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in choice.logprobs.content)
    extra = {"ignore_eos": True}
    text = client.completions.create(model="demo", prompt="Once", logprobs=1, max_tokens=3, extra_body=extra)
    assert text.choices[0].logprobs is not None
    assert len(text.choices[0].logprobs.tokens or []) == 3


def test_openai_asynchronously_many_at_once_and_cancelled(server: ServerProcess, ledger: Path, pace: Pace) -> None:
    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=5) for _ in range(6))
            )
            assert len({answer.choices[0].message.content for answer in answers}) == 1
            extra = {"ignore_eos": True}
            with pace.slow():
                stream = await client.chat.completions.create(
                    model="demo", messages=MESSAGES, stream=True, max_tokens=400, extra_body=extra
                )
                async for chunk in stream:
                    await stream.close()
                    await asyncio.to_thread(assert_cancelled, server, ledger, chunk.id)
                    return
            raise AssertionError("nothing came")

    asyncio.run(scenario())


def assert_cancelled(server: ServerProcess, ledger: Path, request_id: str) -> None:
    """Assert that an answer whose reader left has ended early, waiting for its record as long as the server lives."""
    with LedgerReader(ledger) as reader, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        while (record := reader.get(request_id)) is None:
            client.models.list()
    assert record.finish_reason is FinishReason.CANCELLED
    assert record.completion_tokens < 400


def test_openai_raises_what_belongs_to_a_status(client: openai.OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=MESSAGES, response_format=schema)
    assert refused.value.param == "response_format.json_schema.schema.uniqueItems"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Sum, max_tokens=2)


def test_openai_retries_until_there_is_room(server: ServerProcess, pace: Pace) -> None:
    """More at once than the queue holds: 503 with Retry-After, and the client comes back by itself."""

    async def hurry_once_it_is_full(response: httpx.Response) -> None:
        if response.status_code == 503:
            pace.hurry()

    async def scenario() -> list[int]:
        http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [hurry_once_it_is_full]})
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=100, http_client=http) as client:
            create = client.chat.completions.with_raw_response.create
            raws = await asyncio.gather(
                *(create(model="demo", messages=MESSAGES, max_tokens=30, n=8) for _ in range(24))
            )
            assert {len(raw.parse().choices) for raw in raws} == {8}
            return [raw.retries_taken for raw in raws]

    with pace.slow(pause_s=0.5):
        assert max(asyncio.run(scenario())) > 0


def test_openai_is_told_in_the_stream_that_it_was_cancelled(
    client: openai.OpenAI, server: ServerProcess, pace: Pace
) -> None:
    extra = {"ignore_eos": True}
    with pace.slow():
        stream = client.chat.completions.create(
            model="demo", messages=MESSAGES, stream=True, max_tokens=400, extra_body=extra
        )
        first = next(stream)
        cancelled = httpx.post(f"{server.url}/v1/requests/{first.id}/cancel", timeout=PATIENCE_S)
        assert cancelled.status_code == 200
        with pytest.raises(openai.APIError) as told:
            list(stream)
    assert told.value.code == "request_cancelled"


def other_client(server: ServerProcess, pace: Pace, script: str) -> dict[str, Any]:
    if not OTHER_CLIENTS.exists():
        pytest.skip(f"no environment with litellm and langchain-openai at {OTHER_CLIENTS}: make clients")
    prelude = f"url = {server.url!r} + '/v1'\nmessages = {MESSAGES!r}\ntool = json.loads({json.dumps(TOOL)!r})\n"
    prelude += f"sys.path.append({str(TESTS)!r})\nfolder = {str(pace.folder)!r}\n"
    program = "import json, sys\n" + prelude + ALIKE + script
    command = [str(OTHER_CLIENTS), "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


ALIKE = """
import asyncio, logging, os, pathlib, urllib.error, urllib.request
from pace import Pace
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
pace = Pace(pathlib.Path(folder))
class Retries(logging.Handler):
    count = 0
    def emit(self, record):
        if record.getMessage().startswith("Retrying request"):
            Retries.count += 1
            pace.hurry()
logging.getLogger("openai._base_client").setLevel(logging.INFO)
logging.getLogger("openai._base_client").addHandler(Retries())
def ended(request_id):
    'Wait for the record of an answer that was left, while this process lives and could still read it.'
    while True:
        try:
            with urllib.request.urlopen(f"{url}/usage/{request_id}") as response:
                record = json.load(response)
            return [record["finish_reason"], record["completion_tokens"] < 400]
        except urllib.error.HTTPError as missing:
            assert missing.code == 404
"""

LITELLM = """
import litellm
common = dict(model="openai/demo", api_base=url, api_key="none", messages=messages, num_retries=0)
whole = litellm.completion(**common, max_tokens=8)
chunks = list(litellm.completion(**common, max_tokens=8, stream=True))
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
called = litellm.completion(**common, tools=[tool], tool_choice="required", parallel_tool_calls=False)
schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
held = litellm.completion(**common, response_format=wanted)
later = asyncio.run(litellm.acompletion(**common, max_tokens=8))
async def more():
    forced = dict(tools=[tool], tool_choice="required", parallel_tool_calls=False)
    stream = await litellm.acompletion(**common, stream=True, **forced)
    pieces = [delta async for chunk in stream for delta in (chunk.choices[0].delta.tool_calls or [])]
    with pace.slow():
        endless = await litellm.acompletion(**common, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
        async for chunk in endless:
            await endless.aclose()
            break
        left = await asyncio.to_thread(ended, chunk.id)
    many = [litellm.acompletion(**{**common, "num_retries": 100}, max_tokens=30, n=8) for _ in range(24)]
    with pace.slow(pause_s=0.5):
        answers = await asyncio.gather(*many)
    return "".join(piece.function.arguments or "" for piece in pieces), left, len(answers)
arguments, left, many = asyncio.run(more())
try:
    litellm.completion(**{**common, "model": "openai/nobody"})
    error = None
except litellm.NotFoundError as caught:
    error = caught.status_code
try:
    litellm.completion(**{**common, "messages": [{"role": "user", "content": "word " * 2000}]})
except litellm.ContextWindowExceededError as caught:
    too_long = caught.status_code
print(json.dumps({
    "whole": whole.choices[0].message.content, "streamed": text, "later": later.choices[0].message.content,
    "call": json.loads(called.choices[0].message.tool_calls[0].function.arguments),
    "held": json.loads(held.choices[0].message.content), "errors": [error, too_long],
    "tokens": whole.usage.completion_tokens,
    "arguments": json.loads(arguments), "left": left, "many": many, "retries": Retries.count,
}))
"""

LANGCHAIN = """
from pydantic import BaseModel
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI
import openai
class Answer(BaseModel):
    yes: bool
model = ChatOpenAI(model="demo", base_url=url, api_key="none", max_retries=0, max_tokens=200)
whole = model.invoke("Hello!")
streamed = "".join(chunk.content for chunk in model.stream("Hello!"))
called = model.bind_tools([tool], tool_choice="get_weather").invoke("Hello!")
by_schema = model.with_structured_output(Answer, method="json_schema").invoke("Hello!")
by_call = model.with_structured_output(Answer, method="function_calling", strict=True).invoke("Hello!")
async def more():
    later = (await model.ainvoke("Hello!")).content
    forced = model.bind_tools([tool], tool_choice="get_weather")
    pieces = [piece async for chunk in forced.astream("Hello!") for piece in chunk.tool_call_chunks]
    patient = ChatOpenAI(model="demo", base_url=url, api_key="none", max_retries=100, max_tokens=30, n=8)
    with pace.slow(pause_s=0.5):
        answers = await asyncio.gather(*(patient.ainvoke("Hello!") for _ in range(24)))
    with pace.slow():
        stream = endless("left-by-a-task").astream("Hello!")
        async for _ in stream:
            break
        await stream.aclose()
        left = await asyncio.to_thread(ended, "left-by-a-task")
    return later, "".join(piece["args"] or "" for piece in pieces), len(answers), left
def endless(request_id):
    headers = {"x-request-id": request_id}
    return ChatOpenAI(model="demo", base_url=url, api_key="none", max_retries=0, max_tokens=400,
                      default_headers=headers, extra_body={"ignore_eos": True})
later, arguments, many, left = asyncio.run(more())
with pace.slow():
    stream = endless("left-by-a-loop").stream("Hello!")
    next(stream)
    stream.close()
    left_by_a_loop = ended("left-by-a-loop")
try:
    ChatOpenAI(model="nobody", base_url=url, api_key="none", max_retries=0).invoke("Hello!")
    error = None
except openai.NotFoundError as caught:
    error = caught.status_code
try:
    model.invoke("word " * 2000)
except ContextOverflowError as caught:
    too_long = caught.status_code
print(json.dumps({
    "whole": whole.content, "streamed": streamed, "call": called.tool_calls[0]["args"],
    "errors": [error, too_long],
    "later": later, "arguments": json.loads(arguments), "many": many, "retries": Retries.count,
    "left": [left, left_by_a_loop],
    "kinds": [type(by_schema).__name__, type(by_call).__name__], "tokens": whole.usage_metadata["output_tokens"],
}))
"""


def test_litellm(server: ServerProcess, pace: Pace) -> None:
    found = other_client(server, pace, LITELLM)
    assert found["whole"] == found["streamed"] == found["later"]
    assert found["call"].keys() == {"city", "days"}
    assert found["held"].keys() == {"a"}
    assert found["errors"] == [404, 400]
    assert found["tokens"] > 0
    assert found["arguments"].keys() == {"city", "days"}
    assert found["many"] == 24
    assert found["retries"] > 0
    assert found["left"] == ["cancelled", True]


def test_langchain(server: ServerProcess, pace: Pace) -> None:
    found = other_client(server, pace, LANGCHAIN)
    assert found["whole"] == found["streamed"] == found["later"]
    assert found["arguments"].keys() == {"city", "days"}
    assert found["many"] == 24
    assert found["call"].keys() == {"city", "days"}
    assert found["kinds"] == ["Answer", "Answer"]
    assert found["errors"] == [404, 400]
    assert found["tokens"] > 0
    assert found["retries"] > 0
    assert found["left"] == [["cancelled", True], ["cancelled", True]]
