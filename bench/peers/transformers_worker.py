"""transformers as a peer: PyTorch, eager, with its cache as it comes; the precision is the option ``dtype``.

python transformers_worker.py    answer lines (line_protocol.py)
"""

from __future__ import annotations

import time

from line_protocol import Load, TokenIds, serve

PACKAGES = ("transformers", "torch")


class TransformersGenerator:
    """Its own loop of steps, without the cost of ``generate``'s sampling."""

    def __init__(self, load: Load) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(load.num_threads)
        dtype = getattr(torch, load.options["dtype"])
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(load.model, dtype=dtype, attn_implementation="sdpa").eval()

    def generate(self, prompts: list[TokenIds], num_tokens: int) -> list[list[float]]:
        times: list[float] = []
        with self._torch.inference_mode():
            tokens, cache = self._torch.tensor(prompts), None
            for _ in range(num_tokens):
                step = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                tokens, cache = step.logits[:, -1].argmax(-1, keepdim=True), step.past_key_values
                times.append(time.monotonic())
        return [times] * len(prompts)


if __name__ == "__main__":
    serve(TransformersGenerator, PACKAGES)
