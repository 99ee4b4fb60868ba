"""Streams one answer through tinfoil-ehbp and the official openai client, and prints what came as JSON."""

import json
import sys

import httpx
from ehbp import EHBPTransport, ServerIdentity
from openai import OpenAI


def main(url: str) -> dict[str, str]:
    config = httpx.get(f"{url}/.well-known/hpke-keys", timeout=60).content
    transport = EHBPTransport(ServerIdentity.unmarshal_public_config(config))
    with httpx.Client(transport=transport) as http:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0)
        messages = [{"role": "user", "content": "What is 47 plus 38?"}]
        stream = client.chat.completions.create(model="toy", messages=messages, max_tokens=12, stream=True)
        choices = [chunk.choices[0] for chunk in stream if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    return {"text": text, "num_parts": str(len(choices)), "finish_reason": "".join(reasons)}


if __name__ == "__main__":
    try:
        print(json.dumps(main(sys.argv[1])))
    except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
        print(json.dumps({"error": type(error).__name__, "message": str(error)[:300]}))
