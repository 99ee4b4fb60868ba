"""GPUs of the simulator: the whole way with reference values that match, and composites with a processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from lxml import etree
from signxml.algorithms import CanonicalizationMethod, DigestAlgorithm, SignatureMethod
from signxml.signer import XMLSigner

from evidence_files import evidence_file, nvidia_gpu, utc
from pilotlight.confidential import chain, rim, spdm_report
from pilotlight.confidential.appraisal import Appraisal, Evidence, Kind, Policy, Problem, Refused, Roots
from pilotlight.confidential.binding import Bindings, device_nonce, report_data
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.simulated_gpu import FIRMWARE_ID, SimulatedGpu, SimulatedGpus, with_measurement
from pilotlight.confidential.simulator import VALID_FROM, VALID_UNTIL, Simulator
from pilotlight.confidential.sources import Composite
from pilotlight.confidential.verify import appraise
from pilotlight.tee import TeeLabel

NOW = utc("2026-11-01")
NONCE = b"n" * 32
GPU_POLICY = Policy(kinds=frozenset({Kind.SIMULATED_GPU}), claims={"rim": frozenset({"match"})})
ANY_GPU = Policy(kinds=frozenset({Kind.SIMULATED_GPU}), any_measurement=True)
Golden = Mapping[int, tuple[bytes, ...]]
DRIVER: Golden = {1: (b"\1" * 48,), 7: (b"\0" * 48, b"\7" * 48), 35: (b"never" + bytes(43),)}
VBIOS: Golden = {2: (b"\2" * 48,)}


class Publisher:
    """Signs reference values, as NVIDIA does."""

    def __init__(self, valid_until: datetime = VALID_UNTIL) -> None:
        self._key = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Reference values")])
        builder = x509.CertificateBuilder(
            name, name, self._key.public_key(), x509.random_serial_number(), VALID_FROM, valid_until
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        self._certificate = builder.add_extension(usage, critical=True).sign(self._key, SHA384())
        self.fingerprint = chain.fingerprint(self._certificate)

    def rim(self, version: str, golden: Golden, method: Any = SignatureMethod.ECDSA_SHA384) -> bytes:
        signer = XMLSigner(
            signature_algorithm=method,
            digest_algorithm=DigestAlgorithm.SHA384,
            c14n_algorithm=CanonicalizationMethod.CANONICAL_XML_1_1,
        )
        key = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pem = self._certificate.public_bytes(Encoding.PEM).decode()
        signed: bytes = etree.tostring(signer.sign(etree.fromstring(unsigned(version, golden)), key=key, cert=pem))
        return signed


def unsigned(version: str, golden: Golden) -> bytes:
    resources = "".join(
        f'<Resource type="Measurement" index="{index}" active="True" alternatives="{len(values)}" '
        + " ".join(f'h:Hash{n}="{value.hex()}"' for n, value in enumerate(values))
        + "/>"
        for index, values in golden.items()
    )
    return (
        '<SoftwareIdentity xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" '
        'xmlns:h="http://www.w3.org/2001/04/xmlenc#sha384" name="GH100">'
        f'<Meta colloquialVersion="{version}"/><Payload>{resources}'
        '<Resource type="Measurement" index="9" active="False" alternatives="1" h:Hash0="00"/></Payload>'
        "</SoftwareIdentity>"
    ).encode()


@cache
def publisher() -> Publisher:
    return Publisher()


@cache
def machine() -> SimulatedGpus:
    return SimulatedGpus(2)


def roots() -> Roots:
    trusted = VENDORS.trusting(Kind.SIMULATED_GPU, machine().root_fingerprint)
    return replace(trusted, rim_keys=frozenset({publisher().fingerprint}))


def rims(driver: Golden = DRIVER, version: str = "550.144.03") -> dict[str, bytes]:
    return {
        "driver_rim": publisher().rim(version, driver),
        "vbios_rim": publisher().rim("96.00.5e.00.01", VBIOS),
    }


def appraised(gpu: SimulatedGpu, collateral: dict[str, bytes] | None = None, **changes: Any) -> Appraisal:
    evidence = replace(gpu.attest(NONCE), collateral=rims() if collateral is None else collateral)
    arguments: dict[str, Any] = {"nonce": NONCE, "policy": GPU_POLICY, "at": NOW, "roots": roots()}
    return appraise(evidence, **{**arguments, **changes})


def problems(appraisal: Appraisal) -> set[Problem]:
    assert not appraisal.accepted
    return {reason.problem for reason in appraisal.reasons}


def test_a_gpu_that_runs_what_its_vendor_published_is_accepted() -> None:
    appraisal = appraised(machine().gpus[0])
    assert appraisal.reasons == ()
    assert appraisal.label is TeeLabel.SIMULATED
    assert (appraisal.claims["rim"], appraisal.claims["debug"]) == ("match", False)


def test_a_gpu_that_runs_something_else_is_refused() -> None:
    changed = with_measurement(machine().gpus[0], 7, b"x" * 48)
    appraisal = appraised(changed)
    assert problems(appraisal) == {Problem.MEASUREMENT, Problem.DEBUG}
    assert "the measurements 7 differ" in str(appraisal.reasons[0])


def test_an_engine_that_is_off_is_not_measured_and_one_that_is_on_is() -> None:
    gpu = machine().gpus[0]
    on = replace(gpu, opaque={**gpu.opaque, spdm_report.NVDEC0_STATUS: b"\xaa"})
    assert Problem.MEASUREMENT in problems(appraised(on))


@pytest.mark.parametrize("missing", ["driver_rim", "vbios_rim"])
def test_half_of_the_reference_values_is_not_enough(missing: str) -> None:
    collateral = {name: content for name, content in rims().items() if name != missing}
    assert problems(appraised(machine().gpus[0], collateral)) == {Problem.MEASUREMENT, Problem.DEBUG}


def test_reference_values_that_contradict_each_other_are_refused() -> None:
    assert Problem.MEASUREMENT in problems(appraised(machine().gpus[0], rims({**DRIVER, **VBIOS})))


def test_reference_values_of_another_version_are_refused() -> None:
    assert Problem.MEASUREMENT in problems(appraised(machine().gpus[0], rims(version="550.144.04")))


def test_reference_values_that_somebody_else_signed_are_refused() -> None:
    other = Publisher().rim("550.144.03", DRIVER)
    assert problems(appraised(machine().gpus[0], {"driver_rim": other})) == {Problem.UNKNOWN_ROOT}


def test_reference_values_are_judged_by_the_time_that_is_asked_about_and_not_by_the_clock() -> None:
    """A receipt of last year has the reference values of last year, whose signer's certificate has expired since."""
    old = Publisher(valid_until=utc("2021-01-01"))
    content, pinned = old.rim("550.144.03", DRIVER), {old.fingerprint}
    assert rim.read(content, pinned, b"", utc("2020-06-01")).version == "550.144.03"
    for at, problem in ((NOW, Problem.EXPIRED), (utc("2019-06-01"), Problem.NOT_YET_VALID)):
        with pytest.raises(Refused) as refused:
            rim.read(content, pinned, b"", at)
        assert refused.value.reason.problem is problem


def test_firmware_that_the_certificate_does_not_name_is_refused() -> None:
    gpu = machine().gpus[0]
    for firmware_id in (FIRMWARE_ID[::-1], b""):
        changed = replace(gpu, opaque={**gpu.opaque, spdm_report.FWID: firmware_id})
        assert problems(appraised(changed)) == {Problem.KEY_MISMATCH}


def test_simulated_gpus_do_not_pass_as_nvidia_s() -> None:
    evidence = replace(machine().gpus[0].attest(NONCE), kind=Kind.NVIDIA_GPU)
    appraisal = appraise(evidence, nonce=NONCE, policy=Policy(any_measurement=True), at=NOW, roots=roots())
    assert problems(appraisal) == {Problem.UNKNOWN_ROOT}


REFUSED_RIMS = {
    "empty": b"",
    "text": b"no xml",
    "another document": b"<a/>",
    "a document type": b'<!DOCTYPE a [<!ENTITY b "b">]><a>&b;</a>',
    "unsigned": unsigned("550.144.03", DRIVER),
    "long": b"<a>" + b" " * rim.MAX_RIM_BYTES + b"</a>",
    "deep": b"<a>" * 100_000,
}


@pytest.mark.parametrize("content", REFUSED_RIMS.values(), ids=REFUSED_RIMS)
def test_what_are_no_reference_values_are_refused(content: bytes) -> None:
    with pytest.raises(Refused):
        rim.read(content, {publisher().fingerprint}, b"", NOW)


def test_each_change_of_signed_reference_values_is_refused() -> None:
    signed = publisher().rim("550.144.03", DRIVER)
    assert rim.read(signed, {publisher().fingerprint}, b"", NOW).golden[7] == {b"\0" * 48, b"\7" * 48}
    for old, new in (
        (b"550.144.03", b"550.144.04"),
        (b"07" * 48, b"08" * 48),
        (b'active="True"', b'active="False"'),
        (b"</SoftwareIdentity>", b'<Resource index="1"/></SoftwareIdentity>'),
    ):
        changed = signed.replace(old, new)
        assert changed != signed
        with pytest.raises(Refused):
            rim.read(changed, {publisher().fingerprint}, b"", NOW)


def test_values_around_a_signed_document_do_not_count() -> None:
    """The signature is over an inner document; what a reader would find first is the forger's."""
    signed = publisher().rim("550.144.03", DRIVER)
    forged = unsigned("550.144.03", {1: (b"f" * 48,)}).replace(b"</SoftwareIdentity>", signed + b"</SoftwareIdentity>")
    with pytest.raises(Refused):
        rim.read(forged, {publisher().fingerprint}, b"", NOW)


@pytest.mark.parametrize(
    "golden",
    [{}, {300: (b"x",)}, {-1: (b"x",)}, {1: ()}, {1: tuple(bytes([n]) for n in range(65))}],
    ids=["none", "high", "negative", "no value", "too many"],
)
def test_signed_values_are_still_checked(golden: Golden) -> None:
    with pytest.raises(Refused):
        rim.read(publisher().rim("1", golden), {publisher().fingerprint}, b"", NOW)


def test_a_weak_signature_is_refused() -> None:
    signed = publisher().rim("550.144.03", DRIVER, SignatureMethod.ECDSA_SHA256)
    with pytest.raises(Refused, match="not signed as they should be"):
        rim.read(signed, {publisher().fingerprint}, b"", NOW)


def test_real_reference_values_are_read() -> None:
    content = evidence_file("nvidia/NV_GPU_DRIVER_GH100_550.144.03.xml")
    reference = rim.read(content, VENDORS.rim_keys, b"", NOW)
    assert reference.version == "550.144.03"
    assert len(reference.golden) == content.count(b'active="True"')


# Composites


@cache
def processor() -> Simulator:
    return Simulator.create()


WITH_TWO_GPUS = Policy(kinds=frozenset({Kind.SIMULATED}), any_measurement=True, num_devices=2, device=ANY_GPU)
EXPECTED = report_data(NONCE, Bindings(hpke_key=b"h" * 32))


def judged(evidence: Evidence, policy: Policy = WITH_TWO_GPUS) -> Appraisal:
    trusted = roots().trusting(Kind.SIMULATED, processor().root_fingerprint)
    return appraise(evidence, nonce=EXPECTED, policy=policy, at=NOW, roots=trusted)


def composite() -> Evidence:
    return Composite(processor(), machine()).attest(EXPECTED)


def test_a_processor_and_its_gpus_are_one() -> None:
    appraisal = judged(composite())
    assert appraisal.reasons == ()
    assert [device.claims["nonce"] for device in appraisal.devices] == [device_nonce(EXPECTED).hex()] * 2
    assert Evidence.from_json(composite().to_json()).devices[0].kind is Kind.SIMULATED_GPU


def test_one_gpu_given_as_two_is_refused() -> None:
    evidence = composite()
    twice = replace(evidence, devices=(evidence.devices[0],) * 2)
    assert problems(judged(twice)) == {Problem.DUPLICATE}
    gpu = machine().gpus[0]
    again = tuple(gpu.attest(device_nonce(EXPECTED)) for _ in range(2))  # two reports, and still one GPU
    assert again[0].body != again[1].body
    assert problems(judged(replace(evidence, devices=again))) == {Problem.DUPLICATE}


def test_real_gpus_given_twice_are_refused() -> None:
    vector = nvidia_gpu("hopper")
    policy = Policy(kinds=frozenset({Kind.SIMULATED}), any_measurement=True, device=Policy(any_measurement=True))
    evidence = replace(processor().attest(EXPECTED), devices=(vector.evidence, vector.evidence))
    assert problems(judged(evidence, policy)) == {Problem.DUPLICATE, Problem.NONCE}


def test_gpus_that_are_missing_or_answer_another_report_are_refused() -> None:
    evidence = composite()
    assert problems(judged(replace(evidence, devices=evidence.devices[:1]))) == {Problem.DEVICES}
    other = Composite(processor(), machine()).attest(bytes(64)).devices
    assert problems(judged(replace(evidence, devices=other))) == {Problem.NONCE}


def test_a_processor_is_no_gpu_and_a_gpu_has_none() -> None:
    evidence = composite()
    assert Problem.KIND in problems(judged(replace(evidence, devices=(processor().attest(EXPECTED),) * 1)))
    nested = replace(evidence.devices[0], devices=evidence.devices)
    assert Problem.MALFORMED in problems(judged(replace(evidence, devices=(nested,))))


def test_gpus_without_a_policy_of_their_own_are_refused() -> None:
    policy = Policy(kinds=frozenset({Kind.SIMULATED}), any_measurement=True)
    assert Problem.KIND in problems(judged(composite(), policy))


def test_a_gpu_s_certificate_expires() -> None:
    short = SimulatedGpus(1, valid_until=utc("2026-06-01"))
    trusted = VENDORS.trusting(Kind.SIMULATED_GPU, short.root_fingerprint)
    appraisal = appraise(short.gpus[0].attest(NONCE), nonce=NONCE, policy=ANY_GPU, at=NOW, roots=trusted)
    assert problems(appraisal) == {Problem.EXPIRED}
