"""The demo: start the server, ask one question with the official ``openai`` client, show the tokens and the bill."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

QUESTION = "Tell me a story about Mira and the lantern at the harbour."

CONFIG = """
[host]
port = 0
ledger = "usage.db"

[functions.demo]
artifact = {artifact}

[functions.demo.prices]
prompt_per_million_tokens = "0.10"
completion_per_million_tokens = "0.40"
per_invocation = "0.000001"
"""


@contextmanager
def server(artifact: Path) -> Iterator[str]:
    """Serve ``artifact`` on a free port and yield the base URL."""
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "pilotlight.toml"
        config.write_text(CONFIG.format(artifact=json.dumps(str(artifact))))
        command = [sys.executable, "-m", "pilotlight", "serve", "--config", str(config)]
        process = subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, text=True)  # noqa: S603
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="")
                if match := re.search(r"serving (\S+)", line):
                    yield match[1]
                    break
            else:
                raise SystemExit("the server did not start")
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    with server(Path(sys.argv[1]).resolve()) as base_url:
        client = OpenAI(base_url=base_url, api_key="none")
        print(f"\n> {QUESTION}\n")
        stream = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            request_id = chunk.id
        record = client.get(f"/usage/{request_id}", cast_to=dict[str, object])
    print("\n\nusage record")
    for name in ("prompt_tokens", "completion_tokens", "ttft_ms", "cold_start_ms", "total_ms", "finish_reason"):
        print(f"  {name:<18} {record[name]}")
    print(f"  {'cost':<18} {record['cost_micros']} micro-{record['currency']} (a millionth of a unit)")


if __name__ == "__main__":
    main()
