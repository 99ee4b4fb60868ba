"""A Llama model that the project has never seen: exported and served, its text is what transformers makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from support import DEMO_MODEL, export_artifact, server_process

pytestmark = [pytest.mark.e2e, pytest.mark.model]

PROMPTS = ("Once upon a time", "7 + 8 =", "Grüße aus Köln 🚀", "a", "  spaces and\nnew lines ", "zebra, apple, drum")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, untied head, llama3 rope scaling, as many key heads as heads, head size ≠ hidden / heads."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=256, rope_theta=500_000.0, rope_scaling=scaling,
        tie_word_embeddings=False, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("stranger") / "stranger"
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_an_unseen_model_serves_the_text_of_transformers(stranger: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    artifact = export_artifact(stranger, tmp_path / "stranger-fp32", "fp32")
    tokenizer: Any = AutoTokenizer.from_pretrained(stranger)
    model: Any = AutoModelForCausalLM.from_pretrained(stranger)
    with (
        server_process(artifact.path, tmp_path / "usage.db") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        for prompt in PROMPTS:
            extension = {"return_token_ids": True}
            answer = client.completions.create(
                model="demo", prompt=prompt, max_tokens=60, temperature=0, extra_body=extension
            )
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            expected = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids["input_ids"].shape[1] :]
            text = tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert answer.choices[0].model_extra is not None
            assert answer.choices[0].model_extra["token_ids"] == expected.tolist()
            assert answer.choices[0].text == text.rstrip("�")
