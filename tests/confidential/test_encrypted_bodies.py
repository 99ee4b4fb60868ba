"""Encrypted bodies: what the server makes of good ones, of altered, cut and repeated ones, and what leaves a trace."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp

from pilotlight.api.encrypted_bodies import EncryptedBodies
from pilotlight.artifact import Artifact
from pilotlight.confidential.ehbp import (
    ENCAPSULATED_KEY,
    KEYS_PATH,
    RESPONSE_NONCE,
    EncryptedBodyRefused,
    Frames,
    ResponseCipher,
    Sent,
    ServerKey,
    decode_key,
    encode_key,
    framed,
)
from support import Serving, events, serving

SECRET = "velvet anchor"


Scenario = Callable[["Client", Serving, ServerKey], Awaitable[None]]


Runner = Callable[[Scenario], None]


@pytest.fixture
def run(toy_artifact: Artifact, tmp_path: Path) -> Runner:
    """Returns what runs a scenario against a server that takes encrypted bodies only."""

    def run_one(scenario: Scenario) -> None:
        asyncio.run(_with_server(toy_artifact, tmp_path, scenario))

    return run_one


async def _with_server(artifact: Artifact, directory: Path, scenario: Scenario) -> None:
    key = ServerKey()

    def encrypted(app: ASGIApp) -> EncryptedBodies:
        return EncryptedBodies(app, key, 100_000, required=True)

    async with serving(artifact, directory, middleware=[encrypted]) as server:
        await scenario(Client(server, key), server, key)


class Client:
    """The client's side by hand, so that every byte of it can be chosen."""

    def __init__(self, server: Serving, key: ServerKey) -> None:
        self._server = server
        self.sent = Sent(key.public)

    def frames(self, content: str = SECRET, stream: bool = False, num_frames: int = 3) -> list[bytes]:
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"model": "toy", "messages": messages, "max_tokens": 6, "stream": stream}).encode()
        size = -(-len(body) // num_frames)
        return [self.sent.seal(body[start : start + size]) for start in range(0, len(body), size)]

    async def post(self, body: bytes, header: str | None = None, **headers: str) -> httpx.Response:
        given = {ENCAPSULATED_KEY: self.sent.header if header is None else header, **headers}
        return await self._server.client.post("/v1/chat/completions", content=body, headers=given)

    def open(self, response: httpx.Response) -> tuple[bytes, ResponseCipher]:
        cipher = self.sent.response(response.headers[RESPONSE_NONCE])
        frames = Frames()
        text = b"".join(cipher.open(frame) for frame in frames.feed(response.content))
        frames.finish()
        return text, cipher


def test_an_answer_comes_back_encrypted_and_whole(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        response = await client.post(b"".join(client.frames()))
        assert response.status_code == 200
        assert "content-length" not in response.headers
        text, cipher = client.open(response)
        assert cipher.ended
        assert json.loads(text)["choices"][0]["finish_reason"] == "length"
        assert b"choices" not in response.content

    run(scenario)


def test_a_stream_is_sealed_event_by_event(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        response = await client.post(b"".join(client.frames(stream=True)))
        assert response.headers["content-type"].startswith("text/event-stream")
        assert len(list(Frames().feed(response.content))) > 3
        text, cipher = client.open(response)
        assert cipher.ended
        assert text.endswith(b"data: [DONE]\n\n")
        assert len(events(text.decode())) > 3

    run(scenario)


def test_errors_of_the_api_come_back_encrypted(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        response = await client.post(client.sent.seal(b'{"model": "nobody", "messages": []}'))
        assert 400 <= response.status_code < 500
        text, _ = client.open(response)
        assert "error" in json.loads(text)

    run(scenario)


def test_a_flipped_bit_in_any_frame_is_refused(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        for number in range(3):
            for at in (4, -1):  # the first byte behind the length, and the last one of the tag
                client = Client(server, key)
                frames = client.frames()
                altered = bytearray(frames[number])
                altered[at] ^= 1
                frames[number] = bytes(altered)
                response = await client.post(b"".join(frames))
                assert response.status_code == (422 if number == 0 else 400)
        assert server.function.num_running == 0

    run(scenario)


def test_frames_cannot_be_moved_doubled_or_left_out(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        def moved(frames: list[bytes]) -> list[bytes]:
            return [frames[0], frames[2], frames[1]]

        def doubled(frames: list[bytes]) -> list[bytes]:
            return [frames[0], frames[1], frames[1], frames[2]]

        def without_the_middle(frames: list[bytes]) -> list[bytes]:
            return [frames[0], frames[2]]

        def without_the_last(frames: list[bytes]) -> list[bytes]:
            return frames[:2]

        def cut(frames: list[bytes]) -> list[bytes]:
            return [*frames[:2], frames[2][:-1]]

        for tamper in (moved, doubled, without_the_middle, without_the_last, cut):
            client = Client(server, key)
            response = await client.post(b"".join(tamper(client.frames())))
            assert response.status_code == 400, tamper.__name__

    run(scenario)


def test_a_request_is_taken_once(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        body = b"".join(client.frames())
        assert (await client.post(body)).status_code == 200
        again = await client.post(body)
        assert again.status_code == 409
        assert again.json()["error"]["code"] == "request_replayed"
        assert again.headers["x-should-retry"] == "false"
        assert RESPONSE_NONCE not in again.headers

    run(scenario)


def test_a_key_that_is_used_up_is_renewed_and_the_old_one_is_of_no_use(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        told: list[bytes] = []
        key = ServerKey(max_seen=2, on_renewal=lambda public: told.append(public.public_bytes_raw()))
        first = key.public.public_bytes_raw()
        old = Sent(key.public)
        frame = old.seal(b"x")[4:]
        key.receive(old.header, frame)
        other = Sent(key.public)
        key.receive(other.header, other.seal(b"y")[4:])
        assert told == [key.public.public_bytes_raw()]
        assert told != [first]
        with pytest.raises(EncryptedBodyRefused):
            key.receive(old.header, frame)

    run(scenario)


def test_a_stale_key_is_said_to_be_one(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        stale = Client(server, ServerKey())
        response = await stale.post(b"".join(stale.frames()))
        assert response.status_code == 422
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["type"] == "urn:ietf:params:ehbp:error:key-config"

    run(scenario)


@pytest.mark.parametrize("header", ["", "zz", "00", "00" * 32, "ff" * 33])
def test_a_header_that_is_no_key_is_refused(run: Runner, header: str) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        response = await client.post(b"".join(client.frames()), header)
        assert response.status_code in (400, 422)

    run(scenario)


def test_a_body_in_clear_is_refused_where_encryption_is_required(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        response = await server.chat(SECRET)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "encryption_required"
        assert (await server.client.get("/v1/models")).status_code == 200
        kept = await server.client.get("/v1/responses/resp_1")
        assert kept.json()["error"]["code"] == "encryption_required"
        cancelled = await server.client.post("/v1/requests/nobody/cancel")
        assert cancelled.status_code == 404

    run(scenario)


def test_a_frame_that_claims_to_be_huge_is_refused_before_it_is_read(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        assert (await client.post(b"\xff\xff\xff\xff" + bytes(100))).status_code == 400
        assert (await client.post(b"")).status_code == 400

    run(scenario)


def test_an_answer_is_never_kept_for_an_encrypted_request(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        """An idempotency key would write the answer to the ledger."""
        response = await client.post(b"".join(client.frames()), **{"idempotency-key": "a"})
        assert response.status_code == 400
        assert "idempotency-key" in json.loads(client.open(response)[0])["error"]["message"]

    run(scenario)


def test_nothing_on_the_disk_holds_prompt_or_answer(run: Runner, tmp_path: Path) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        response = await client.post(b"".join(client.frames(stream=True)))
        frames = events(client.open(response)[0].decode())
        answer = "".join(choice["delta"].get("content") or "" for frame in frames for choice in frame["choices"])
        record = (await server.client.get(f"/v1/usage/{response.headers['x-request-id']}")).json()
        assert record["completion_tokens"] == 6
        written = _everything_in(tmp_path)
        assert b"completion_tokens" in written
        assert SECRET.encode() not in written
        assert len(answer) > 3
        assert answer.encode() not in written

    run(scenario)


def test_the_key_is_where_clients_look_for_it(run: Runner) -> None:
    async def scenario(client: Client, server: Serving, key: ServerKey) -> None:
        response = await server.client.get(KEYS_PATH)
        assert response.headers["content-type"] == "application/ohttp-keys"
        assert decode_key(response.content).public_bytes_raw() == key.public.public_bytes_raw()

    run(scenario)


def _everything_in(directory: Path) -> bytes:
    return b"".join(file.read_bytes() for file in directory.rglob("*") if file.is_file())


def _response(num_frames: int) -> tuple[ResponseCipher, list[bytes]]:
    key = ServerKey()
    sent = Sent(key.public)
    received, _ = key.receive(sent.header, sent.seal(b"q")[4:])
    nonce, sealing = received.respond()
    frames = [sealing.seal(b"%d" % number) for number in range(1, num_frames)] + [sealing.seal(b"")]
    return sent.response(nonce), frames


@given(st.integers(1, 6), st.data())
def test_a_response_opens_as_it_was_sealed_or_not_at_all(num_frames: int, data: st.DataObject) -> None:
    opener, frames = _response(num_frames)
    whole = b"".join(frames)
    at = data.draw(st.integers(0, len(whole) - 1))
    altered = bytearray(whole)
    altered[at] ^= 1 << data.draw(st.integers(0, 7))
    expected = b"".join(b"%d" % number for number in range(1, num_frames))
    opened = b""
    try:
        cut = Frames()
        for frame in cut.feed(bytes(altered)):
            opened += opener.open(frame)
        cut.finish()
    except EncryptedBodyRefused:
        assert expected.startswith(opened)
        return
    assert not opener.ended, "an altered response looks complete"


@given(st.lists(st.binary(max_size=40), max_size=6), st.randoms(use_true_random=False))
def test_frames_are_the_same_however_they_arrive(texts: list[bytes], rng: random.Random) -> None:
    whole = b"".join(map(framed, texts))
    frames, at = Frames(), 0
    found: list[bytes] = []
    while at < len(whole):
        size = rng.randint(1, 12)
        found += frames.feed(whole[at : at + size])
        at += size
    frames.finish()
    assert found == [text for text in texts if text]


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_refused(content: bytes) -> None:
    frames = Frames(64)
    try:
        found = list(frames.feed(content))
        frames.finish()
    except EncryptedBodyRefused:
        return
    assert all(0 < len(frame) <= 64 for frame in found)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_key_or_refused(content: bytes) -> None:
    try:
        found = decode_key(content)
    except EncryptedBodyRefused:
        return
    assert encode_key(found)[1:] == content[1:]
