"""Sealed artifacts: what was sealed comes back, and whatever was done to it on the way is refused."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.artifact import GRAPH, MANIFEST, SEALED_MANIFEST, TOKENIZER, WEIGHTS, Artifact, open_artifact
from pilotlight.confidential.chunks import AlteredChunk, FileCipher, Layout, commitment
from pilotlight.confidential.key_release import KeyNotReleased, Unsealing
from pilotlight.confidential.recipients import make_recipient_key
from pilotlight.confidential.sealed_contents import open_sealed, verify_chunks
from pilotlight.confidential.sealed_manifest import (
    SIGNATURE,
    SealedManifest,
    decode_sealed_manifest,
    write_signed,
)
from pilotlight.confidential.sealing import Publisher, seal
from pilotlight.errors import ArtifactError, ConfigError
from pilotlight.host.verified import Verified
from pilotlight.metering.signing import make_signing_key, read_signing_key

CHUNK_BYTES = 1024
NUM_TOKENIZER_CHUNKS = 3


@dataclass(frozen=True)
class Sealed:
    """A sealed toy artifact whose tokenizer has several chunks, and the keys of publisher and recipient."""

    artifact: Artifact
    path: Path
    keys: Path

    @property
    def table(self) -> dict[str, str]:
        publisher, private_key = self.keys / "publisher.pub", self.keys / "recipient"
        return {"publisher": str(publisher), "release": "file", "private_key": str(private_key)}

    def open(self) -> Artifact:
        return Unsealing.parse(self.table, "unseal").open(self.path)

    def manifest(self) -> SealedManifest:
        return decode_sealed_manifest((self.path / SEALED_MANIFEST).read_bytes(), self.path)


def _no_aws(key_arn: str, content_key: bytes) -> bytes:
    raise AssertionError("nothing here is sealed for AWS")


def publisher(keys: Path, *recipients: str, keys_dir: Path | None = None) -> Publisher:
    return Publisher(read_signing_key(keys / "publisher"), recipients, keys_dir, _no_aws)


@pytest.fixture(scope="module")
def sealed_once(toy_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    keys = tmp_path_factory.mktemp("keys")
    make_signing_key(keys / "publisher")
    make_recipient_key(keys / "recipient")
    path = tmp_path_factory.mktemp("sealed") / "toy"
    seal(toy_artifact, path, publisher(keys, str(keys / "recipient.pub")), CHUNK_BYTES)
    return Sealed(toy_artifact, path, keys)


@pytest.fixture
def sealed(sealed_once: Sealed, tmp_path: Path) -> Sealed:
    """One to tamper with."""
    shutil.copytree(sealed_once.path, tmp_path / "toy")
    return Sealed(sealed_once.artifact, tmp_path / "toy", sealed_once.keys)


def test_every_file_comes_back_and_none_lies_there_in_clear(sealed: Sealed) -> None:
    opened = sealed.open()
    opened.verify()
    assert opened.digest == sealed.artifact.digest
    assert opened.manifest == sealed.artifact.manifest
    for name in sealed.artifact.manifest.files:
        assert opened.read(name) == (sealed.artifact.path / name).read_bytes()
    on_disk = {path.name for path in sealed.path.iterdir()}
    assert on_disk == {SEALED_MANIFEST, SIGNATURE} | {
        f"{name}.sealed" for name in (MANIFEST, *sealed.artifact.manifest.files)
    }
    everything = b"".join(path.read_bytes() for path in sealed.path.iterdir())
    assert b"no weights" not in everything
    assert b"im_start" not in everything


def test_opening_without_a_key_says_so(sealed: Sealed) -> None:
    with pytest.raises(ArtifactError, match="is sealed, and no key for it is configured"):
        open_artifact(sealed.path)


def test_an_rsa_key_can_be_a_recipient(sealed: Sealed, tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    private, public = tmp_path / "rsa", tmp_path / "rsa.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    seal(sealed.artifact, tmp_path / "for-rsa", publisher(sealed.keys, str(public)))
    opened = Unsealing.parse({**sealed.table, "private_key": str(private)}, "unseal").open(tmp_path / "for-rsa")
    assert opened.digest == sealed.artifact.digest
    with pytest.raises(KeyNotReleased, match="is not sealed for rsa"):
        Unsealing.parse({**sealed.table, "private_key": str(private)}, "unseal").open(sealed.path)


def test_the_key_for_a_key_server_goes_into_its_directory(sealed: Sealed, tmp_path: Path) -> None:
    sealed_for = publisher(sealed.keys, "kbs:///default/key/toy", keys_dir=tmp_path / "keys")
    manifest = seal(sealed.artifact, tmp_path / "for-kbs", sealed_for)
    file = tmp_path / "keys" / "default" / "key" / "toy"
    assert commitment(file.read_bytes(), bytes.fromhex(manifest.seal_id)).hex() == manifest.key_commitment
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="there is a key already"):
        seal(sealed.artifact, tmp_path / "again", sealed_for)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "recipient", ["kbs://host/a/b/c", "kbs:///a/b", "kbs:///../b/c", "arn:aws:s3:::x", "https://v/keys/a"]
)
def test_a_recipient_that_is_none_is_refused(sealed: Sealed, tmp_path: Path, recipient: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        seal(sealed.artifact, tmp_path / "new", publisher(sealed.keys, recipient, keys_dir=tmp_path))
    assert not (tmp_path / "new").exists()


def test_an_altered_artifact_is_not_sealed(toy_artifact: Artifact, sealed: Sealed, tmp_path: Path) -> None:
    shutil.copytree(toy_artifact.path, tmp_path / "copy")
    (tmp_path / "copy" / WEIGHTS).write_bytes(b"no Weights")
    with pytest.raises(ArtifactError, match="was altered"):
        seal(
            open_artifact(tmp_path / "copy"),
            tmp_path / "new",
            publisher(sealed.keys, str(sealed.keys / "recipient.pub")),
        )


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _swap_chunks(path: Path) -> None:
    content, size = path.read_bytes(), CHUNK_BYTES + 16
    path.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])


def _swap_files(path: Path) -> None:
    one, other = path.with_name(f"{GRAPH}.sealed"), path.with_name(f"{WEIGHTS}.sealed")
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


TAMPERING: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: _flip(path, 0),
    "last byte": lambda path: _flip(path, -1),
    "in the middle": lambda path: _flip(path, CHUNK_BYTES + 200),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a chunk less": lambda path: os.truncate(path, CHUNK_BYTES + 16),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "reordered": _swap_chunks,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("tamper", TAMPERING.values(), ids=TAMPERING.keys())
def test_a_tampered_file_is_refused_with_and_without_the_key(sealed: Sealed, tamper: Callable[[Path], object]) -> None:
    opened = sealed.open()
    assert len(sealed.manifest().files[TOKENIZER].chunks) >= NUM_TOKENIZER_CHUNKS
    tamper(sealed.path / f"{TOKENIZER}.sealed")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json\.sealed: (was altered|is t|cannot be read)"):
        opened.read(TOKENIZER)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json\.sealed: (was altered|is t|cannot be read)"):
        verify_chunks(sealed.path, sealed.manifest())


def test_files_of_different_size_or_name_cannot_be_swapped(sealed: Sealed) -> None:
    opened = sealed.open()
    _swap_files(sealed.path / TOKENIZER)
    for name in (GRAPH, WEIGHTS):
        with pytest.raises(ArtifactError):
            opened.read(name)


def test_a_start_compares_the_checksums_and_trusts_no_notes(sealed: Sealed, tmp_path: Path) -> None:
    opened, verified = sealed.open(), Verified(tmp_path / "cache")
    verified.verify(opened)
    _flip(sealed.path / f"{WEIGHTS}.sealed", 0)
    with pytest.raises(ArtifactError, match="was altered"):
        verified.verify(opened)
    assert not (tmp_path / "cache").exists()


def test_chunks_that_agree_with_a_forged_manifest_still_need_the_publisher(sealed: Sealed, tmp_path: Path) -> None:
    """Whoever has the content key can make good chunks; that is what the signature is for."""
    forger = Ed25519PrivateKey.generate()
    write_signed(sealed.path, sealed.manifest(), forger)
    with pytest.raises(ArtifactError, match="signed by another publisher"):
        sealed.open()


@pytest.mark.parametrize("file", [SEALED_MANIFEST, SIGNATURE])
@pytest.mark.parametrize("at", [0, 40, -1])
def test_a_bit_of_manifest_or_signature_is_refused(sealed: Sealed, file: str, at: int) -> None:
    _flip(sealed.path / file, at)
    with pytest.raises(ArtifactError, match="was altered, or signed by another publisher"):
        sealed.open()


def test_a_replica_refuses_another_manifest_than_the_host_has_seen(sealed: Sealed) -> None:
    grant = sealed.open().grant
    assert grant is not None
    assert "key" not in repr(grant)
    assert open_sealed(sealed.path, grant).digest == sealed.artifact.digest
    write_signed(sealed.path, msgspec.structs.replace(sealed.manifest(), recipients=[]), Ed25519PrivateKey.generate())
    with pytest.raises(ArtifactError, match="is not the sealed artifact that was found genuine"):
        open_sealed(sealed.path, grant)


def test_another_key_is_noticed_before_anything_is_decrypted(sealed: Sealed) -> None:
    grant = sealed.open().grant
    assert grant is not None
    for key in (bytes(32), b"short", b""):
        with pytest.raises(ArtifactError, match="is sealed with another key"):
            open_sealed(sealed.path, msgspec.structs.replace(grant, key=key))


@given(st.binary(max_size=200), st.integers(16, 64), st.data())
def test_a_chunk_opens_in_its_own_place_only(text: bytes, chunk_bytes: int, data: st.DataObject) -> None:
    key, seal_id = bytes(range(32)), bytes(32)
    layout = Layout(len(text), chunk_bytes)
    cipher = FileCipher(key, seal_id, "sha256:0", "a", layout)
    chunks = [cipher.seal(index, text[slice(*layout.place(index))]) for index in range(layout.num_chunks)]
    assert sum(map(len, chunks)) == layout.sealed_bytes
    opened = bytearray(len(text))
    for index, chunk in enumerate(chunks):
        start, end = layout.place(index)
        cipher.open_into(index, chunk, memoryview(opened)[start:end])
    assert opened == text

    index = data.draw(st.integers(0, len(chunks) - 1))
    size = len(chunks[index]) - 16
    others = {
        "place": (cipher, data.draw(st.integers(0, 10).filter(lambda other: other != index))),
        "file": (FileCipher(key, seal_id, "sha256:0", "b", layout), index),
        "artifact": (FileCipher(key, seal_id, "sha256:1", "a", layout), index),
        "seal": (FileCipher(key, bytes([1]) * 32, "sha256:0", "a", layout), index),
        "size": (FileCipher(key, seal_id, "sha256:0", "a", Layout(len(text) + 1, chunk_bytes)), index),
        "key": (FileCipher(bytes(32), seal_id, "sha256:0", "a", layout), index),
    }
    other, place = others[data.draw(st.sampled_from(sorted(others)))]
    with pytest.raises(AlteredChunk):
        other.open_into(place, chunks[index], memoryview(bytearray(size)))
    flipped = bytearray(chunks[index])
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(AlteredChunk):
        cipher.open_into(index, bytes(flipped), memoryview(bytearray(size)))


@given(st.binary(max_size=300))
def test_any_bytes_in_place_of_a_sealed_manifest_are_refused(raw: bytes) -> None:
    with pytest.raises(ArtifactError):
        decode_sealed_manifest(raw, Path("sealed.json"))


@given(st.randoms(use_true_random=False))
def test_a_mutated_sealed_manifest_is_refused_or_well_formed(sealed_once: Sealed, rng: random.Random) -> None:
    raw = bytearray((sealed_once.path / SEALED_MANIFEST).read_bytes())
    for _ in range(rng.randint(1, 4)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    try:
        manifest = decode_sealed_manifest(bytes(raw), Path("sealed.json"))
    except ArtifactError:
        return
    for name, file in manifest.files.items():
        assert "/" not in name
        assert len(file.chunks) == manifest.layout(name).num_chunks
