"""onnxruntime-genai as a peer: its own builder's graph, int4, with activations in int8 (accuracy level 4).

python genai_worker.py prepare SOURCE TARGET --block-size 32    make its model from a Hugging Face directory
python genai_worker.py                                          answer lines (line_protocol.py)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from line_protocol import Load, TokenIds, serve

PACKAGES = ("onnxruntime-genai", "onnxruntime")


class GenaiGenerator:
    """Prompts of one batch share a generator, which has no other way to hold them."""

    def __init__(self, load: Load) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(load.model))
        session = {"intra_op_num_threads": load.num_threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._genai, self._model = genai, genai.Model(config)

    def generate(self, prompts: list[TokenIds], num_tokens: int) -> list[list[float]]:
        length = len(prompts[0]) + num_tokens
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        times = []
        for _ in range(num_tokens):
            generator.generate_next_token()
            times.append(time.monotonic())
        return [times] * len(prompts)


def prepare(source: Path, target: Path, block_size: int) -> None:
    """Build the int4 graph; it needs torch and transformers, and no network."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "", "-p", "int4", "-e", "cpu"]
    options = [f"int4_block_size={block_size}", "int4_accuracy_level=4"]
    paths = ["-i", str(source), "-o", str(target), "-c", str(target / "cache")]
    subprocess.run([*builder, *paths, "--extra_options", *options], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    making = commands.add_parser("prepare")
    making.add_argument("source", type=Path)
    making.add_argument("target", type=Path)
    making.add_argument("--block-size", type=int, default=32)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.source, args.target, args.block_size)
    else:
        serve(GenaiGenerator, PACKAGES)


if __name__ == "__main__":
    main()
