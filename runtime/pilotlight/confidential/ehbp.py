"""EHBP, the Encrypted HTTP Body Protocol: bodies encrypted end to end, frame by frame, with headers left in clear.

A request's body is sealed by one HPKE context, whose encapsulated key is in a header. The response is sealed under keys
that come out of the same context and a nonce in its own header. A frame is four bytes of length (big-endian) and a
ciphertext; a length of zero is skipped. The protocol has no final frame: a stream that is cut between two frames looks
complete. So we end each response with a frame that seals nothing, which other clients pass over, and ours require.

Source: github.com/tinfoilsh/encrypted-http-body-protocol, SPEC.md; RFC 9180; RFC 9458, section 4.4.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pilotlight.confidential import hpke
from pilotlight.errors import PilotlightError

if TYPE_CHECKING:
    from pyhpke import ContextInterface

KEYS_PATH = "/.well-known/hpke-keys"
KEYS_TYPE = "application/ohttp-keys"
ENCAPSULATED_KEY = "ehbp-encapsulated-key"
RESPONSE_NONCE = "ehbp-response-nonce"
KEY_PROBLEM = "urn:ietf:params:ehbp:error:key-config"
NUM_NONCE_BYTES = 32
MAX_FRAME_BYTES = 64 * 1024 * 1024
MAX_SEEN = 1 << 18
"""Requests that one key takes; then there is another key. So the replay protection has 30 MB at most."""

_KEM, _KDF, _AEAD = 0x0020, 0x0001, 0x0002
_CONFIG = struct.Struct(">BH32sHHH")
_LENGTH = struct.Struct(">I")


class EncryptedBodyRefused(PilotlightError):
    """An encrypted body is malformed, was altered, or was cut off. It is not said which, so as to be no oracle."""

    status = 400
    code = "encrypted_body_invalid"
    type = "invalid_request_error"

    def __init__(self, message: str = "the encrypted body is malformed, or was altered on its way") -> None:
        super().__init__(message)


class KeyMismatch(EncryptedBodyRefused):
    """The first frame does not open: most likely the client has an old key."""

    status = 422
    code = "key_config_mismatch"


class Replayed(EncryptedBodyRefused):
    """The same encrypted request came before."""

    status = 409
    code = "request_replayed"

    def __init__(self) -> None:
        super().__init__("this encrypted request was received before; encrypt each request freshly")


def encode_key(key: X25519PublicKey) -> bytes:
    """Return a key configuration of one suite, as the published clients read it: without the list's length."""
    return _CONFIG.pack(0, _KEM, key.public_bytes_raw(), 4, _KDF, _AEAD)


def decode_key(content: bytes) -> X25519PublicKey:
    """Read what ``encode_key`` wrote.

    Raises:
        EncryptedBodyRefused: it is another suite, or no key configuration.
    """
    if len(content) != _CONFIG.size:
        raise EncryptedBodyRefused("the key configuration is not of one key and one suite")
    _, kem, key, num_bytes, kdf, aead = _CONFIG.unpack(content)
    if (kem, num_bytes, kdf, aead) != (_KEM, 4, _KDF, _AEAD):
        raise EncryptedBodyRefused("the key configuration is of another suite")
    return X25519PublicKey.from_public_bytes(key)


class Frames:
    """Cuts a body into frames, however it arrives."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._rest = bytearray()

    def feed(self, content: bytes) -> Iterator[bytes]:
        """Yield the ciphertexts that are complete now.

        Raises:
            EncryptedBodyRefused: a frame says that it is too long.
        """
        self._rest += content
        while len(self._rest) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._rest)
            if length > self._max_frame_bytes:
                raise EncryptedBodyRefused
            if len(self._rest) < _LENGTH.size + length:
                return
            frame = bytes(self._rest[_LENGTH.size : _LENGTH.size + length])
            del self._rest[: _LENGTH.size + length]
            if frame:
                yield frame

    def finish(self) -> None:
        """Raises EncryptedBodyRefused where the body ended within a frame."""
        if self._rest:
            raise EncryptedBodyRefused


def framed(ciphertext: bytes) -> bytes:
    return _LENGTH.pack(len(ciphertext)) + ciphertext


class ResponseCipher:
    """Seals or opens the frames of one response, in their order."""

    def __init__(self, context: ContextInterface, enc: bytes, nonce: bytes) -> None:
        secret = context.export(b"ehbp response", 32)
        salt = enc + nonce
        self._cipher = AESGCM(HKDF(SHA256(), 32, salt, b"key").derive(secret))
        self._base = int.from_bytes(HKDF(SHA256(), 12, salt, b"nonce").derive(secret))
        self._number = 0
        self.ended = False
        """Whether the last frame opened was the one that seals nothing."""

    def seal(self, text: bytes) -> bytes:
        return framed(self._cipher.encrypt(self._next_nonce(), text, b""))

    def open(self, frame: bytes) -> bytes:
        """Return a frame's text.

        Raises:
            EncryptedBodyRefused: it was altered, is another one, or comes after the end.
        """
        if self.ended:
            raise EncryptedBodyRefused
        try:
            text = self._cipher.decrypt(self._next_nonce(), frame, b"")
        except InvalidTag as error:
            raise EncryptedBodyRefused from error
        self.ended = not text
        return text

    def _next_nonce(self) -> bytes:
        nonce = (self._base ^ self._number).to_bytes(12)
        self._number += 1
        return nonce


class ServerKey:
    """A server's private key, and which encapsulated keys it has seen."""

    def __init__(
        self, max_seen: int = MAX_SEEN, on_renewal: Callable[[X25519PublicKey], None] = lambda _: None
    ) -> None:
        """``on_renewal`` is told of each key after the first."""
        self.on_renewal = on_renewal
        self._max_seen = max_seen
        self._renew()

    @property
    def public(self) -> X25519PublicKey:
        return self._key.public_key()

    def receive(self, header: str, first_frame: bytes) -> tuple[Received, bytes]:
        """Return an exchange and the text of its request's first frame.

        Raises:
            EncryptedBodyRefused: it cannot be opened with this key, or came before.
        """
        try:
            enc = bytes.fromhex(header)
            context = hpke.recipient(enc, self._key, b"ehbp request")
        except ValueError as error:
            raise EncryptedBodyRefused from error
        try:
            text = hpke.open_in(context, first_frame)
        except hpke.HpkeError as error:
            raise KeyMismatch from error
        # Only what opens is remembered: whoever has no key cannot fill the memory or use up another one's request.
        if enc in self._seen:
            raise Replayed
        self._seen.add(enc)
        if len(self._seen) >= self._max_seen:
            self._renew()
            self.on_renewal(self.public)
        return Received(enc, context), text

    def _renew(self) -> None:
        """Take another key, under which nothing can be replayed that was sent under the old one."""
        self._key = X25519PrivateKey.generate()
        self._seen: set[bytes] = set()


@dataclass(frozen=True, slots=True)
class Received:
    """The server's side of one exchange."""

    enc: bytes
    context: ContextInterface

    def open(self, frame: bytes) -> bytes:
        """Return the text of the request's next frame.

        Raises:
            EncryptedBodyRefused: it was altered, or is another one.
        """
        try:
            return hpke.open_in(self.context, frame)
        except hpke.HpkeError as error:
            raise EncryptedBodyRefused from error

    def respond(self) -> tuple[str, ResponseCipher]:
        """Return the value of the response's header, and what seals it."""
        nonce = secrets.token_bytes(NUM_NONCE_BYTES)
        return nonce.hex(), ResponseCipher(self.context, self.enc, nonce)


class Sent:
    """The client's side of one exchange."""

    def __init__(self, key: X25519PublicKey) -> None:
        """Raises EncryptedBodyRefused where the key is none."""
        try:
            self._enc, self._context = hpke.sender(key, b"ehbp request")
        except hpke.HpkeError as error:
            raise EncryptedBodyRefused("the server's key cannot be used") from error

    @property
    def header(self) -> str:
        return self._enc.hex()

    def seal(self, text: bytes) -> bytes:
        return framed(self._context.seal(text))

    def response(self, header: str) -> ResponseCipher:
        """Return what opens the response.

        Raises:
            EncryptedBodyRefused: its header is not a nonce.
        """
        try:
            nonce = bytes.fromhex(header)
        except ValueError as error:
            raise EncryptedBodyRefused from error
        if len(nonce) != NUM_NONCE_BYTES:
            raise EncryptedBodyRefused
        return ResponseCipher(self._context, self._enc, nonce)
