"""The tokenizer of an artifact."""

import json
import shutil
from pathlib import Path

import pytest

from pilotlight.artifact import SpecialTokens
from pilotlight.errors import ArtifactError, InvalidRequest
from pilotlight.text.tokenizer import Tokenizer


def test_a_bare_prompt_gets_the_special_tokens_of_the_post_processor(byte_level: Tokenizer) -> None:
    (start,) = byte_level.encode_rendered("<|start|>")
    assert byte_level.encode_prompt("he") == [start, *byte_level.encode_rendered("he")]


def test_a_rendered_template_gets_none_but_those_it_holds(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_rendered("<|start|>he<|end|>")
    assert len(ids) == 3
    assert [token_id in byte_level.special_ids for token_id in ids] == [True, False, True]


def test_decoding_skips_special_tokens_and_keeps_other_added_ones(byte_level: Tokenizer) -> None:
    assert byte_level.decode(byte_level.encode_rendered("<|start|>he<tool><|end|>")) == "he<tool>"


def test_ids_outside_the_vocabulary_have_no_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_rendered("hello")
    assert byte_level.decode([byte_level.vocab_size, *ids, 10**6]) == "hello"


def test_the_vocabulary_counts_added_tokens(byte_level: Tokenizer) -> None:
    assert byte_level.vocab_size == 256 + 5 + 3


def test_truncation_and_padding_saved_with_a_tokenizer_are_off(byte_level_path: Path, tmp_path: Path) -> None:
    saved = json.loads(byte_level_path.read_text())
    saved["truncation"] = {"max_length": 2, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(saved))
    assert len(Tokenizer(path).encode_rendered("abcdefgh")) == 8


def test_special_texts_are_named_as_templates_name_them(byte_level: Tokenizer) -> None:
    start, end = byte_level.encode_rendered("<|start|><|end|>")
    special = SpecialTokens(bos_id=None, eos_ids=[end, start], pad_id=start)
    assert byte_level.special_texts(special) == {"eos_token": "<|end|>", "pad_token": "<|start|>"}


def test_a_special_id_outside_the_vocabulary_has_no_text(byte_level: Tokenizer) -> None:
    assert byte_level.special_texts(SpecialTokens(bos_id=10**6, eos_ids=[], pad_id=None)) == {}


@pytest.mark.parametrize("encode", ["encode_prompt", "encode_rendered"])
def test_half_a_surrogate_pair_is_refused(byte_level: Tokenizer, encode: str) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode: half of a surrogate pair at 2"):
        getattr(byte_level, encode)("he\ud83d")


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        Tokenizer(tmp_path / "tokenizer.json")
    assert caught.value.message == f"{tmp_path / 'tokenizer.json'}: is missing"


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 1}', b"[" * 10_000])
def test_a_bad_file_is_one_line_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        Tokenizer(path)
    assert caught.value.message.startswith(f"{path}: is not a tokenizer")
    assert "\n" not in caught.value.message


def test_a_truncated_file_is_refused(byte_level_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    shutil.copy(byte_level_path, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="is not a tokenizer"):
        Tokenizer(path)
