"""Random-weight models of real shapes, made here: speed does not depend on what the weights are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT = 0
SPREAD = 0.02


@dataclass(frozen=True)
class Shape:
    """A published model's dimensions, as its ``config.json`` gives them."""

    name: str
    architecture: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    qkv_bias: bool

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 2048,
            "rope_theta": 100_000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": END_OF_TEXT,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every weight's name and shape."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            for name, rows in (("q", queries), ("k", keys), ("v", keys)):
                yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
                if self.qkv_bias:
                    yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
            yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
            yield f"{prefix}.input_layernorm.weight", (hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)


SHAPES = {
    "smollm2-135m": Shape("smollm2-135m", "LlamaForCausalLM", "llama", 576, 1536, 30, 9, 3, 49152, qkv_bias=False),
    "qwen2.5-0.5b": Shape("qwen2.5-0.5b", "Qwen2ForCausalLM", "qwen2", 896, 4864, 24, 14, 2, 151936, qkv_bias=True),
}


GPU_SHAPES = {
    **SHAPES,
    "llama-3.2-1b": Shape("llama-3.2-1b", "LlamaForCausalLM", "llama", 2048, 8192, 16, 32, 8, 128256, qkv_bias=False),
}
"""What is worth measuring on a GPU."""


def write_model(shape: Shape, directory: Path) -> Path:
    """Write a model directory with random weights and a tokenizer of made-up words; it is complete or absent."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(shape, directory / "model.safetensors")
    _tokenizer(shape.vocab_size).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": END_OF_TEXT, "do_sample": False}))
    (directory / "config.json").write_text(json.dumps(shape.config))
    return directory


def _write_weights(shape: Shape, path: Path) -> None:
    """Write float32 tensors one after the other, so that memory never holds the model."""
    header: dict[str, Any] = {}
    offset = 0
    for name, axes in shape.tensors():
        end = offset + 4 * int(np.prod(axes))
        header[name] = {"dtype": "F32", "shape": axes, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    encoded += b" " * (-len(encoded) % 8)
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, axes in shape.tensors():
            if name.endswith("norm.weight"):
                weights = np.ones(axes, np.float32)
            else:
                weights = random.standard_normal(axes, np.float32) * np.float32(SPREAD)
            file.write(weights.tobytes())


def words(vocab_size: int) -> list[str]:
    """Every byte is a token, and so are enough made-up words that every id of the model has a text."""
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return [*tokens, *(f"Ġw{number}" for number in range(vocab_size - len(tokens)))]


def _tokenizer(vocab_size: int) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(words(vocab_size))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
