"""What a client sees of a server's speed."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

import httpx
import numpy as np

from servers import Running, Server

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Stream:
    """One streamed answer; instants are monotonic seconds."""

    sent_at: float
    token_times: list[float]

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.sent_at


def prompt_ids(length: int, vocab_size: int, seed: int) -> list[int]:
    """Return a random prompt, a new one for each seed, so that no server can reuse what it has cached."""
    ids: list[int] = np.random.default_rng(seed).integers(300, vocab_size, length).tolist()
    return ids


async def stream(client: httpx.AsyncClient, server: Server, prompt: list[int], num_tokens: int) -> Stream:
    """Send one request and note when each token arrives."""
    path, body = server.request(prompt, num_tokens)
    sent_at = time.monotonic()
    times: list[float] = []
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{server.name}: {response.status_code} {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times += [time.monotonic()] * server.num_tokens(json.loads(line[6:]))
    if len(times) < num_tokens - 1:
        raise SystemExit(f"{server.name} sent {len(times)} tokens instead of {num_tokens}")
    return Stream(sent_at, times)


def one_stream(running: Running, server: Server, vocab_size: int, length: int, num_tokens: int, seed: int) -> Stream:
    """Run one request alone."""

    async def ask() -> Stream:
        async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT_S) as client:
            return await stream(client, server, prompt_ids(length, vocab_size, seed), num_tokens)

    return asyncio.run(ask())


def many_streams(
    running: Running, server: Server, vocab_size: int, num_streams: int, length: int, num_tokens: int, seed: int
) -> list[Stream]:
    """Run ``num_streams`` requests at the same time."""

    async def ask() -> list[Stream]:
        limits = httpx.Limits(max_connections=num_streams)
        async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT_S, limits=limits) as client:
            prompts = [prompt_ids(length, vocab_size, seed * 1000 + number) for number in range(num_streams)]
            return list(await asyncio.gather(*(stream(client, server, prompt, num_tokens) for prompt in prompts)))

    return asyncio.run(ask())


def decode_tokens_per_s(answer: Stream) -> float:
    """Return the speed between the first and the last token."""
    return (len(answer.token_times) - 1) / (answer.token_times[-1] - answer.token_times[0])


def total_tokens_per_s(answers: list[Stream]) -> float:
    """Return all tokens over the time from the first request to the last token, prefill included."""
    start = min(answer.sent_at for answer in answers)
    end = max(answer.token_times[-1] for answer in answers)
    return sum(len(answer.token_times) for answer in answers) / (end - start)


def steady_tokens_per_s(answers: list[Stream]) -> float:
    """Return the tokens per second while every stream was decoding: after the last prefill, before the first end."""
    start = max(answer.token_times[0] for answer in answers)
    end = min(answer.token_times[-1] for answer in answers)
    count = sum(start < at <= end for answer in answers for at in answer.token_times)
    return count / (end - start) if end > start else float("nan")
