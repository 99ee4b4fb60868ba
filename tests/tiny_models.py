"""Tiny models with random weights, whose every part matters to the logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from pilotlight_export.quiet import quiet
from pilotlight_export.source import Source
from pilotlight_export.verify.reference import Reference

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "llama3 rope": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "untied": {"tie_word_embeddings": False},
    "wide heads": {"head_dim": 32},
    "no grouping": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one layer": {"num_hidden_layers": 1},
}
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


@dataclass(frozen=True)
class FusedModel:
    """A model, as transformers runs it and as the fused fp32 graph."""

    source: Source
    fused: ir.Model
    graph_path: Path
    reference: Reference


HELD_EXPORT = """
import signal, sys
from pilotlight_export import export
from pilotlight_export.cli import main
export.fuse = lambda *_: [print("in the middle", file=sys.stderr, flush=True), signal.pause()]
main(sys.argv[1:])
"""
"""An export that says when it is in the middle, and stays there until it is ended."""


def write_model(directory: Path, architecture: str = "LlamaForCausalLM", **overrides: Any) -> Path:
    """Write a complete model directory: config, safetensors, tokenizer, chat template, generation settings, licence."""
    directory.mkdir(parents=True)
    _write_weights(directory, architecture, **overrides)
    _write_tokenizer(directory)
    (directory / "LICENSE").write_text("Use it as you like.\n")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\nA tiny model.\n")
    return directory


def _write_weights(directory: Path, architecture: str, **overrides: Any) -> None:
    with quiet():
        import torch
        import transformers

        library: Any = transformers
        torch.manual_seed(7)
        config: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        model_class = getattr(library, architecture)
        model = model_class(model_class.config_class(**(config | overrides)))
        norm_mean = 0.0 if architecture.startswith("Gemma") else 1.0  # Gemma adds one to what it stores
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=norm_mean if "norm" in name else 0.0, std=0.3)
        model.generation_config = library.GenerationConfig(bos_token_id=0, eos_token_id=[1, 2], pad_token_id=2)
        model.save_pretrained(directory)


def _write_tokenizer(directory: Path) -> None:
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index + 3 for index, letter in enumerate(alphabet)}, []))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    library: Any = transformers
    fast = library.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
