"""A random-weight model as llama.cpp wants it: the same shapes, 4-bit (Q4_0) weights, in one GGUF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models import SPREAD, Shape, words

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(shape: Shape, path: Path) -> Path:
    """Write the file, complete or not at all. Needs the package ``gguf``."""
    import gguf

    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, shape.model_type)
    writer.add_context_length(shape.config["max_position_embeddings"])
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_block_count(shape.num_layers)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_freq_base(shape.config["rope_theta"])
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_layer_norm_rms_eps(shape.config["rms_norm_eps"])
    writer.add_vocab_size(shape.vocab_size)
    _add_tokenizer(writer, shape.vocab_size)
    random = np.random.default_rng(0)
    for name, axes in shape.tensors():
        weights = random.standard_normal(axes, np.float32) * np.float32(SPREAD)
        if len(axes) == 1:
            writer.add_tensor(_name(name), weights + 1 if "norm" in name else weights)
        else:
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(_name(name), gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def _name(name: str) -> str:
    """Return GGUF's name of a Hugging Face weight."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def _add_tokenizer(writer: object, vocab_size: int) -> None:
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words(vocab_size))
    writer.add_token_types([gguf.TokenType.CONTROL, *([gguf.TokenType.NORMAL] * (vocab_size - 1))])
    writer.add_token_merges(["Ġ w"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
