"""Text of an answer as it comes: whole characters, and no stop string."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotlight.text.detokenizer import MAX_HELD_TOKENS, REPLACEMENT, Detokenizer, StopStrings, TextStream
from pilotlight.text.tokenizer import Tokenizer

# The tokenizers are read only, so examples may share them.
property_test = settings(deadline=None, max_examples=200)

EMOJI = ["👩‍🚀", "é", "世界", "🇩🇪", "e\u0301", "👍🏽", "\u200f", "\x00", "\ufeff"]


def stream(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str] = ()) -> list[str]:
    text = TextStream(tokenizer, stops)
    return [*(text.push(token_id) for token_id in ids), text.finish()]


def texts() -> st.SearchStrategy[str]:
    """Return any text but the replacement character, which at an end is taken for an incomplete one."""
    return st.lists(
        st.sampled_from([*EMOJI, "he", "llo", " ", "  ", "\n", "a"])
        | st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=5)
    ).map("".join)


class TestDetokenizer:
    def test_a_character_waits_for_its_last_byte(self, byte_level: Tokenizer) -> None:
        ids = byte_level.encode_rendered("👍a")
        assert len(ids) == 4
        assert stream(byte_level, ids) == ["", "", "👍", "a", ""]

    def test_text_in_the_token_of_a_broken_character_is_not_lost(self, byte_level: Tokenizer) -> None:
        """One token holds a space and half of an emoji; the answer ends after it."""
        ids = byte_level.encode_rendered("a 👍")[:2]
        assert byte_level.decode(ids) == f"a {REPLACEMENT}"
        assert stream(byte_level, ids) == ["a", "", " "]

    def test_the_leading_space_of_a_word_is_kept_between_words(self, byte_fallback: Tokenizer) -> None:
        ids = [byte_fallback.encode_rendered(text)[0] for text in ("▁he", "▁he", "▁", "▁", "▁he")]
        assert stream(byte_fallback, ids) == ["he", " he", " ", " ", " he", ""]

    def test_special_tokens_have_no_text_and_break_nothing(self, byte_fallback: Tokenizer) -> None:
        start, he = (byte_fallback.encode_rendered(text)[0] for text in ("<s>", "▁he"))
        assert stream(byte_fallback, [start, he, start, start, he]) == ["", "he", "", "", " he", ""]

    def test_a_special_token_within_a_character_is_passed_over(self, byte_level: Tokenizer) -> None:
        first, *rest = byte_level.encode_rendered("é")
        (end,) = byte_level.encode_rendered("<|end|>")
        assert "".join(stream(byte_level, [first, end, *rest])) == "é"

    def test_an_invalid_run_of_bytes_does_not_take_back_what_was_shown(self, byte_fallback: Tokenizer) -> None:
        """Decoded at once, one bad byte would spoil the good one before it."""
        good, bad = (byte_fallback.encode_rendered("A")[0], 2 + 0xFF)
        he = byte_fallback.encode_rendered("▁he")[0]
        assert byte_fallback.decode([good, bad, he]) == f"{REPLACEMENT}{REPLACEMENT} he"
        assert stream(byte_fallback, [good, bad, he]) == ["A", "", f"{REPLACEMENT} he", ""]

    def test_a_repeated_broken_byte_is_not_held_for_ever(self, byte_level: Tokenizer) -> None:
        broken = byte_level.encode_rendered("é")[0]
        shown = stream(byte_level, [broken] * (2 * MAX_HELD_TOKENS))
        assert [number for number, text in enumerate(shown, 1) if text] == [MAX_HELD_TOKENS, 2 * MAX_HELD_TOKENS]

    def test_nothing_pushed_is_nothing(self, byte_level: Tokenizer) -> None:
        assert Detokenizer(byte_level).finish() == ""

    def test_finish_gives_the_rest_once(self, byte_level: Tokenizer) -> None:
        detokenizer = Detokenizer(byte_level)
        detokenizer.push(byte_level.encode_rendered(" 👍")[0])
        assert [detokenizer.finish(), detokenizer.finish()] == [" ", ""]

    @property_test
    @given(st.data())
    def test_byte_level_pieces_are_the_decoded_text(self, byte_level: Tokenizer, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size), max_size=MAX_HELD_TOKENS - 1))
        assert "".join(stream(byte_level, ids)) == byte_level.decode(ids).rstrip(REPLACEMENT)

    @property_test
    @given(texts())
    def test_any_text_comes_back_whole(self, byte_level: Tokenizer, text: str) -> None:
        ids = byte_level.encode_rendered(text)
        assert "".join(stream(byte_level, ids)) == byte_level.decode(ids) == text

    @property_test
    @given(st.data())
    def test_byte_fallback_pieces_are_the_decoded_text_where_that_is_valid(
        self, byte_fallback: Tokenizer, data: st.DataObject
    ) -> None:
        token = st.integers(0, byte_fallback.vocab_size).map(lambda token_id: [token_id])
        char = st.characters(exclude_categories=["Cs"]).map(lambda char: [2 + byte for byte in char.encode()])
        ids = list(chain.from_iterable(data.draw(st.lists(char | token, max_size=20))))
        decoded = byte_fallback.decode(ids)
        shown = "".join(stream(byte_fallback, ids))
        assert REPLACEMENT in decoded or shown == decoded

    @property_test
    @given(st.data())
    def test_what_was_shown_is_never_taken_back(self, byte_level: Tokenizer, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size), max_size=MAX_HELD_TOKENS - 1))
        detokenizer = Detokenizer(byte_level)
        shown = ""
        for token_id in ids:
            shown += detokenizer.push(token_id)
            assert byte_level.decode(ids).startswith(shown)


def first_complete_match(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The rule in its plainest form: read on, character by character, until the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


class TestStopStrings:
    @pytest.mark.parametrize(
        ("pieces", "stops", "shown", "matched"),
        [
            (["hello"], [], ["hello", ""], None),
            (["he", "llo"], ["lo"], ["he", "l", ""], "lo"),
            (["one\n", "\ntwo"], ["\n\n"], ["one", "", ""], "\n\n"),
            (["one\n", "two"], ["\n\n"], ["one", "\ntwo", ""], None),
            (["ab", "ab", "ac"], ["abac"], ["", "ab", "", ""], "abac"),
            (["end\n"], ["\n\n"], ["end", "\n"], None),
            (["x", "STOP", "more"], ["STOP"], ["x", "", "", ""], "STOP"),
            (["a👩‍", "🚀b"], ["👩‍🚀"], ["a", "", ""], "👩‍🚀"),
        ],
    )
    def test_pieces(self, pieces: list[str], stops: list[str], shown: list[str], matched: str | None) -> None:
        strings = StopStrings(stops)
        assert [*(strings.push(piece) for piece in pieces), strings.finish()] == shown
        assert strings.matched == matched

    def test_the_match_that_is_complete_first_wins(self) -> None:
        strings = StopStrings(["abcde", "bcd"])
        assert (strings.push("abcde"), strings.matched) == ("a", "bcd")

    def test_of_two_that_end_together_the_longer_wins(self) -> None:
        strings = StopStrings(["c", "abc"])
        assert (strings.push("abc"), strings.matched) == ("", "abc")

    @property_test
    @given(
        st.lists(st.text("ab👍", max_size=6), max_size=8),
        st.lists(st.text("ab👍", min_size=1, max_size=5), max_size=4),
    )
    def test_any_cut_gives_what_reading_by_character_gives(self, pieces: list[str], stops: list[str]) -> None:
        strings = StopStrings(stops)
        shown = "".join(strings.push(piece) for piece in pieces) + strings.finish()
        assert (shown, strings.matched) == first_complete_match("".join(pieces), stops)

    @property_test
    @given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
    def test_only_the_longest_possible_beginning_of_a_stop_is_held(self, text: str, stops: list[str]) -> None:
        before, matched = first_complete_match(text, stops)
        beginnings = {stop[:length] for stop in stops for length in range(len(stop))}
        held = max((part for part in beginnings if before.endswith(part)), key=len)
        strings = StopStrings(stops)
        shown = "".join(strings.push(char) for char in text)
        assert shown == (before.removesuffix(held) if matched is None else before)


class TestTextStream:
    def test_a_stop_string_across_tokens_is_not_shown(self, byte_level: Tokenizer) -> None:
        text = TextStream(byte_level, ["lo w"])
        shown = [text.push(token_id) for token_id in byte_level.encode_rendered("hello world")]
        assert ("".join(shown), text.finish(), text.stopped_by) == ("hel", "", "lo w")

    def test_a_stop_string_may_be_complete_only_at_the_end(self, byte_level: Tokenizer) -> None:
        """The space comes out of a token whose other half was a broken character."""
        text = TextStream(byte_level, ["a "])
        shown = [text.push(token_id) for token_id in byte_level.encode_rendered("xa 👍")[:3]]
        assert (shown, text.finish(), text.stopped_by) == (["x", "", ""], "", "a ")

    @property_test
    @given(texts(), st.lists(st.sampled_from([*EMOJI, "he", "l", "lo", "\n", " "]), max_size=4), st.data())
    def test_any_answer_is_cut_before_its_first_stop(
        self, byte_level: Tokenizer, answer: str, stops: list[str], data: st.DataObject
    ) -> None:
        ids = byte_level.encode_rendered(answer)
        ids = ids[: data.draw(st.integers(0, len(ids)))]
        text = TextStream(byte_level, stops)
        shown = "".join(text.push(token_id) for token_id in ids) + text.finish()
        assert (shown, text.stopped_by) == first_complete_match(byte_level.decode(ids).rstrip(REPLACEMENT), stops)


class TestAgainstTransformers:
    """The text is the one that ``transformers`` decodes, with real tokenizers."""

    ANSWERS = (
        "The quick brown fox; it's 3.5 metres — or so 'they' say , don't they ?",
        "  two spaces,\n\n\ttabs and a trailing space ",
        "名前は太郎です。👩‍🚀🇩🇪 e\u0301 und Größe",
        "def f(x):\n    return {'a': [1, 2]}\n",
        "\x00\x7f\u200f\ufeff€",
    )

    @pytest.fixture(params=["phi3_path", "gpt2_path"])
    def path(self, request: pytest.FixtureRequest) -> Path:
        path: Path = request.getfixturevalue(request.param)
        return path

    @pytest.mark.parametrize("answer", ANSWERS)
    def test_answers(self, path: Path, answer: str) -> None:
        transformers = pytest.importorskip("transformers")
        reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)
        tokenizer = Tokenizer(path)
        ids = tokenizer.encode_rendered(answer)
        assert ids == reference.encode(answer, add_special_tokens=False)
        assert "".join(stream(tokenizer, ids)) == reference.decode(ids, skip_special_tokens=True)

    def test_random_ids(self, path: Path) -> None:
        tokenizer = Tokenizer(path)
        byte_fallback = "ByteFallback" in path.read_text()

        @settings(deadline=None, max_examples=100)
        @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
        def check(ids: list[int]) -> None:
            decoded = tokenizer.decode(ids)
            shown = "".join(stream(tokenizer, ids))
            spoilt = byte_fallback and REPLACEMENT in decoded
            assert spoilt or shown == decoded.rstrip(REPLACEMENT)

        check()
