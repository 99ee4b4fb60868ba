"""Tokenizers to test with: two small ones made here, and two real ones where the shared test data lies."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from pilotlight.text.tokenizer import Tokenizer

REPO = Path(__file__).parents[2]
SHARED_DATA = REPO.parent / "shared" / "data"


def save(tokenizer: tokenizers.Tokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no shared test data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def byte_level_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every byte is a token; a few pairs are merged, among them a space with half of an emoji."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("Ġ", "he"), ("ð", "Ł"), ("Ġ", "ðŁ")]
    vocab = {token: number for number, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.add_tokens(["<tool>"])
    start = ("<|start|>", tokenizer.token_to_id("<|start|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[start])
    return save(tokenizer, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def byte_level(byte_level_path: Path) -> Tokenizer:
    return Tokenizer(byte_level_path)


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Words with a leading space, and a token for each byte, as SentencePiece models have them."""
    texts = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁he", "llo", "a", "é", "▁世"]
    vocab = {text: number for number, text in enumerate(texts)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return Tokenizer(save(tokenizer, tmp_path_factory.mktemp("byte_fallback")))


@pytest.fixture(scope="session")
def phi3_path(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "phi-3-mini" / "tokenizer.json"


@pytest.fixture(scope="session")
def gpt2_path(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = shared_data / "tokenizers" / "gpt2"
    vocab = json.loads((source / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (source / "merges.txt").read_text().splitlines()[1:] if line]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return save(tokenizer, tmp_path_factory.mktemp("gpt2"))
