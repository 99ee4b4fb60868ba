"""Reference values (RIM) that NVIDIA publishes for each driver and each VBIOS: signed XML, up to a pinned root.

Source: TCG, Reference Integrity Manifest Information Model; ISO/IEC 19770-2; NVIDIA/attestation-sdk (what counts).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from lxml import etree
from signxml.algorithms import DigestAlgorithm, SignatureMethod
from signxml.exceptions import SignXMLException
from signxml.verifier import SignatureConfiguration, XMLVerifier

from pilotlight.confidential import chain
from pilotlight.confidential.appraisal import Problem, Refused

MAX_RIM_BYTES = 1024 * 1024
MAX_INDEX = 255
MAX_ALTERNATIVES = 64
SWID = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
SHA384 = "{http://www.w3.org/2001/04/xmlenc#sha384}"
DSIG = "{http://www.w3.org/2000/09/xmldsig#}"
EXPECTED = SignatureConfiguration(
    require_x509=True,
    signature_methods=frozenset({SignatureMethod.ECDSA_SHA384}),
    digest_algorithms=frozenset({DigestAlgorithm.SHA384}),
)


@dataclass(frozen=True, slots=True)
class Rim:
    """``golden`` are the allowed values of each measurement that counts, by its index."""

    version: str
    golden: Mapping[int, frozenset[bytes]]


def read(content: bytes, pinned: Collection[str], certificates: bytes, at: datetime) -> Rim:
    """Verify reference values, and read them.

    Raises:
        Refused: they are malformed, or not signed under a pinned root at that time.
    """
    document = _document(content)
    offered = _certificates(document)
    chain.verify_chain(offered[0], [*offered[1:], *chain.load_pem(certificates)], pinned, at)
    return _rim(_signed(document, offered[0], at))


def _document(content: bytes) -> etree._Element:
    if len(content) > MAX_RIM_BYTES:
        raise Refused(Problem.MALFORMED, f"the reference values have more than {MAX_RIM_BYTES:,} bytes")
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        document = etree.fromstring(content, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise Refused(Problem.MALFORMED, f"the reference values are no XML ({error})") from error
    if document.getroottree().docinfo.doctype:
        raise Refused(Problem.MALFORMED, "the reference values have a document type of their own")
    return document


def _certificates(document: etree._Element) -> list[x509.Certificate]:
    """Return the signer's certificates, the signer's own first."""
    lines = [element.text or "" for element in document.iter(f"{DSIG}X509Certificate")]
    if not lines:
        raise Refused(Problem.CHAIN, "the reference values bring no certificates")
    pem = "".join(f"-----BEGIN CERTIFICATE-----\n{line.strip()}\n-----END CERTIFICATE-----\n" for line in lines)
    return chain.load_pem(pem.encode())


def _signed(document: etree._Element, signer: x509.Certificate, at: datetime) -> etree._Element:
    """Return what the signature covers, as it was signed: nothing else of the document may be looked at.

    ``at`` is passed on since signxml looks at the signer's validity, too, and by the machine's clock unless it is told.
    """
    pem = signer.public_bytes(Encoding.PEM).decode()
    expected = replace(EXPECTED, verification_time=at)
    try:
        results = XMLVerifier().verify(document, x509_cert=pem, expect_config=expected)
    except (SignXMLException, ValueError, TypeError, KeyError, etree.LxmlError) as error:
        raise Refused(Problem.SIGNATURE, f"the reference values are not signed as they should be ({error})") from error
    result = results[0] if isinstance(results, list) else results
    if result.signed_xml is None:
        raise Refused(Problem.SIGNATURE, "the signature does not cover reference values")
    return result.signed_xml


def _rim(root: etree._Element) -> Rim:
    meta = root.find(f"{SWID}Meta")
    if root.tag != f"{SWID}SoftwareIdentity" or meta is None:
        raise Refused(Problem.MALFORMED, "the reference values are no software identity")
    golden: dict[int, frozenset[bytes]] = {}
    for resource in root.iterfind(f"{SWID}Payload/{SWID}Resource"):
        if resource.get("type") == "Measurement" and resource.get("active") == "True":
            index, values = _golden(resource)
            if index in golden:
                raise Refused(Problem.MALFORMED, f"the measurement {index} has reference values twice")
            golden[index] = values
    if not golden:
        raise Refused(Problem.MALFORMED, "there are no reference values in it")
    return Rim(meta.get("colloquialVersion") or "", golden)


def _golden(resource: etree._Element) -> tuple[int, frozenset[bytes]]:
    try:
        index, count = int(resource.get("index") or ""), int(resource.get("alternatives") or "")
        if not (0 <= index <= MAX_INDEX and 1 <= count <= MAX_ALTERNATIVES):
            raise ValueError
        return index, frozenset(bytes.fromhex(resource.get(f"{SHA384}Hash{n}") or "-") for n in range(count))
    except ValueError as error:
        raise Refused(Problem.MALFORMED, "a reference value is malformed") from error
