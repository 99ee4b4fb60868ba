"""The vendors' roots, pinned by the SHA-256 of their public keys (docs/decisions/0012-roots-are-pinned-by-key.md)."""

from __future__ import annotations

from pilotlight.confidential.appraisal import Kind, Roots

AMD = frozenset(
    {
        "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9",  # ARK-Milan
        "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831",  # ARK-Genoa
        "4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08",  # ARK-Turin
    }
)
NITRO = frozenset({"f2caf5ecc6190b4a8399b78bc58a2bbcd0382375db8a1bfd78a82743874fd225"})
INTEL = frozenset({"a0af031289f5d5d4132f9186068a7fc13628633ba235777472e29b6b6c67a49e"})
NVIDIA_DEVICES = frozenset({"a90c4eb5acfd3e3d03a25db6a26b84f720ad0503196c627c21ddd48dd85b06a4"})
NVIDIA_RIMS = frozenset({"dec1dc316477aa851eebdf51327ae9f864bc8d89254657ed1e7eb9168af1e1a3"})

VENDORS = Roots(
    keys={
        Kind.SEV_SNP: AMD,
        Kind.AZURE_VTPM_SNP: AMD,
        Kind.TDX: INTEL,
        Kind.NITRO: NITRO,
        Kind.NVIDIA_GPU: NVIDIA_DEVICES,
    },
    rim_keys=NVIDIA_RIMS,
)
"""What is trusted unless somebody says otherwise. The simulator and token services are not: they have to be named."""
