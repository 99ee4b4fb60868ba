"""openvino-genai as a peer: continuous batching, int4 weights from Optimum Intel and NNCF (no calibration, no network).

python openvino_worker.py prepare SOURCE TARGET    make its model from a Hugging Face directory
python openvino_worker.py                          answer lines (line_protocol.py)
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from line_protocol import Load, TokenIds, serve

PACKAGES = ("openvino-genai", "openvino")
KV_BLOCK_TOKENS = 32


class OpenvinoGenerator:
    """Each prompt is a request of its own to one pipeline, which batches them as it sees fit."""

    def __init__(self, load: Load) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = load.num_slots
        scheduler.num_kv_blocks = load.num_slots * (load.max_context_tokens // KV_BLOCK_TOKENS + 2)
        scheduler.enable_prefix_caching = False
        self._genai = genai
        properties = {"INFERENCE_NUM_THREADS": load.num_threads}
        self._pipeline = genai.ContinuousBatchingPipeline(str(load.model), scheduler, "CPU", properties)

    def generate(self, prompts: list[TokenIds], num_tokens: int) -> list[list[float]]:
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.ignore_eos = True
        handles = [
            self._pipeline.add_request(number, openvino.Tensor(np.array([prompt], np.int64)), config)
            for number, prompt in enumerate(prompts)
        ]
        times: list[list[float]] = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for row, handle in zip(times, handles, strict=True):
                row += [time.monotonic()] * _num_new_tokens(handle)
        return times


def _num_new_tokens(handle: Any) -> int:
    return sum(len(output.generated_ids) for output in handle.read().values()) if handle.can_read() else 0


def prepare(source: Path, target: Path) -> None:
    """Convert the model and compress its weights to 4 bits, symmetric, one scale for each 64."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    weights = OVWeightQuantizationConfig(bits=4, sym=True, group_size=64, ratio=1.0)
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, quantization_config=weights)
    model.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    making = commands.add_parser("prepare")
    making.add_argument("source", type=Path)
    making.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.source, args.target)
    else:
        serve(OpenvinoGenerator, PACKAGES)


if __name__ == "__main__":
    main()
