"""CBOR as COSE messages of attestation use it, read strictly: no strings in pieces, no floats, one tag.

Lists and maps may be of indefinite length, since the maps of AWS's newer documents are. A general decoder turns foreign
tags into objects (dates, expressions, numbers of any size), which is more than a verifier wants to do with bytes of a
stranger. Source: RFC 8949, sections 3 and 4.2; RFC 9052, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from pilotlight.confidential.appraisal import Problem, Refused

MAX_DEPTH = 8
COSE_SIGN1 = 18
INDEFINITE = -1
"""In place of a count: up to ``BREAK``."""
BREAK = b"\xff"

Value = int | bytes | str | bool | None | list["Value"] | dict["Value", "Value"]


def loads(content: bytes) -> Value:
    """Return the one item that the bytes are; a tag for COSE_Sign1 in front is passed over.

    Raises:
        Refused: they are not exactly one item of the kinds that are read here.
    """
    reader = _Reader(content)
    value = reader.item(0)
    if reader.at != len(content):
        raise Refused(Problem.MALFORMED, f"{len(content) - reader.at} bytes follow the CBOR item")
    return value


def sig_structure(protected: bytes, payload: bytes) -> bytes:
    """Return what a COSE_Sign1 signature covers."""
    return b"\x84" + _head(3, 10) + b"Signature1" + _bytes(protected) + _bytes(b"") + _bytes(payload)


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0

    def item(self, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise Refused(Problem.MALFORMED, "the CBOR is nested too deeply")
        major, argument = self._argument()
        match major:
            case 0:
                return argument
            case 1:
                return -1 - argument
            case 2:
                return self._take(argument)
            case 3:
                return self._text(argument)
            case 4:
                return [self.item(depth + 1) for _ in self._rounds(argument)]
            case 5:
                return self._map(argument, depth)
            case 6 if argument == COSE_SIGN1 and depth == 0:
                return self.item(depth + 1)
            case 7 if argument in (20, 21, 22):
                return {20: False, 21: True, 22: None}[argument]
        raise Refused(Problem.MALFORMED, f"CBOR of major type {major} ({argument}) is not expected")

    def _argument(self) -> tuple[int, int]:
        (first,) = self._take(1)
        major, low = first >> 5, first & 31
        if low < 24:
            return major, low
        if low == 31 and major in (4, 5):
            return major, INDEFINITE
        if low > 27 or major == 7:
            raise Refused(Problem.MALFORMED, "a string in pieces, or a number with a point, is not expected in CBOR")
        return major, int.from_bytes(self._take(1 << (low - 24)))

    def _take(self, size: int) -> bytes:
        if size > len(self._content) - self.at:
            raise Refused(Problem.MALFORMED, "the CBOR ends early")
        self.at += size
        return self._content[self.at - size : self.at]

    def _text(self, size: int) -> str:
        try:
            return self._take(size).decode()
        except UnicodeDecodeError as error:
            raise Refused(Problem.MALFORMED, "a text in the CBOR is not UTF-8") from error

    def _rounds(self, count: int) -> Iterator[None]:
        """Yield before each item of a list, and before each pair of a map."""
        if count != INDEFINITE:
            for _ in range(min(count, len(self._content) + 1)):  # each takes a byte: more than that ends early
                yield
            return
        while self._take(1) != BREAK:
            self.at -= 1
            yield

    def _map(self, count: int, depth: int) -> dict[Value, Value]:
        found: dict[Value, Value] = {}
        for _ in self._rounds(count):
            key = self.item(depth + 1)
            if not isinstance(key, int | str) or isinstance(key, bool) or key in found:
                raise Refused(Problem.MALFORMED, "a key in the CBOR is no number or text, or is there twice")
            found[key] = self.item(depth + 1)
        return found


def _bytes(content: bytes) -> bytes:
    return _head(2, len(content)) + content


def _head(major: int, argument: int) -> bytes:
    if argument < 24:
        return bytes((major << 5 | argument,))
    for code, size in ((24, 1), (25, 2), (26, 4)):
        if argument < 1 << 8 * size:
            return bytes((major << 5 | code,)) + argument.to_bytes(size)
    raise ValueError("no message here is that long")
