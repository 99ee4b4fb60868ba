"""How much sooner a second prompt's first token comes where it begins as the first one, over HTTP.

``python bench/shared_prefix.py URL MODEL`` asks a running server for prompts of token ids. In every round a new prefix
is read, then asked again with another end.
"""

from __future__ import annotations

import random
import statistics
import sys
import time

import httpx

PREFIX_TOKENS = 1000
OWN_TOKENS = 24
ROUNDS = 7


def first_token_s(client: httpx.Client, model: str, prompt: list[int]) -> float:
    """Return the seconds until the first token's frame has come."""
    body = {"model": model, "prompt": prompt, "max_tokens": 2, "stream": True, "ignore_eos": True}
    begun_at = time.perf_counter()
    with client.stream("POST", "/v1/completions", json={**body, "return_token_ids": True}) as response:
        response.raise_for_status()
        lines = response.iter_lines()
        found = next(time.perf_counter() for line in lines if '"token_ids":[' in line)
        for _ in lines:
            pass
    return found - begun_at


def main(url: str, model: str) -> None:
    rng = random.Random(time.time_ns())
    ids = range(300, 480)
    pairs = []
    with httpx.Client(base_url=url, timeout=120) as client:
        first_token_s(client, model, rng.choices(ids, k=PREFIX_TOKENS))  # wakes the function
        time.sleep(3)  # until it has moved to its whole session
        for _ in range(ROUNDS):
            prefix = rng.choices(ids, k=PREFIX_TOKENS)
            pairs.append([first_token_s(client, model, [*prefix, *rng.choices(ids, k=OWN_TOKENS)]) for _ in range(2)])
    ratios = [second / first for first, second in pairs]
    first, second = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
    print(
        f"first {first:.0f} ms, second {second:.0f} ms, ratio {statistics.median(ratios):.3f}, worst {max(ratios):.3f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
