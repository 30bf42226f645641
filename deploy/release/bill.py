"""Bills of materials: what an image holds, in CycloneDX, and under which licences.

One for each image: its lock file with hashes, who needs what, licences, and the wheel of this
project. The same inputs make the same bytes. It is about Python packages: the base image beneath
them, and what a wheel bundles in binary form, are not in it.
"""

from __future__ import annotations

import re
import tomllib
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageMetadata, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from license_expression import ExpressionError, get_spdx_licensing
from packageurl import PackageURL
from packaging.utils import canonicalize_name

from deploy.release import Project, ReleaseError
from deploy.release.artifacts import sha256
from deploy.release.lock import IMAGES, TORCH, Pin, pins

__all__ = ["Licences", "bill", "check_bill", "check_licences"]

_SPDX: Any = get_spdx_licensing()  # type: ignore[no-untyped-call]
# How packages without an SPDX expression name their licence, and what that may mean.
_SPOKEN = {
    "apache": {"Apache-2.0"},
    "bsd": {"BSD-2-Clause", "BSD-3-Clause"},
    "isc": {"ISC"},
    "mit": {"MIT"},
    "psf|python software foundation": {"PSF-2.0"},
}


@dataclass(frozen=True)
class Licences:
    """``licences.toml``: what may be shipped, and what is."""

    allowed: frozenset[str]
    exceptions: Mapping[str, str]
    packages: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Licences:
        found = tomllib.loads((folder / "licences.toml").read_text(encoding="utf-8"))
        return cls(frozenset(found["allowed"]), found["exceptions"], found["packages"])

    def of(self, package: str) -> str:
        """The SPDX expression of a package, if it may be shipped.

        Raises:
            ReleaseError: nothing is known of it, or its licence is not allowed.
        """
        if package in self.exceptions:
            return self.exceptions[package]
        expression = self.packages.get(package)
        if expression is None:
            raise ReleaseError(
                f"expected the licence of {package} in licences.toml; it is not there; read its "
                "metadata and enter it"
            )
        try:
            allowed = self._allows(_SPDX.parse(expression, validate=True))
        except ExpressionError as error:
            raise ReleaseError(
                f"expected an SPDX expression for {package} in licences.toml; got {expression!r}: "
                f"{error}"
            ) from None
        if not allowed:
            raise ReleaseError(
                f"expected allowed licences alone in licences.toml; {package} has {expression}; do "
                "without it, or allow it and say why"
            )
        return expression

    def _allows(self, parsed: object) -> bool:
        if isinstance(parsed, _SPDX.OR):
            return any(map(self._allows, parsed.args))
        if isinstance(parsed, _SPDX.AND):
            return all(map(self._allows, parsed.args))
        return str(parsed) in self.allowed


def check_licences(folder: Path) -> None:
    """Everything that the images hold has a licence that is allowed, and no entry is left over.

    Of what is installed here in the pinned version, the entry is what its metadata says.

    Raises:
        ReleaseError: the first thing that is not so.
    """
    licences = Licences.read(folder)
    locked = {pin.name: pin for name in (*IMAGES, TORCH) for pin in pins(name, folder)}
    if left := sorted({*licences.packages, *licences.exceptions} - {*locked}):
        raise ReleaseError(
            f"expected licences.toml to name what is in a lock file; {left[0]} is in none; take it "
            "out"
        )
    for name, pin in sorted(locked.items()):
        entry = licences.of(name)
        try:
            metadata = distribution(name).metadata
        except PackageNotFoundError:
            continue
        if metadata["Version"].partition("+")[0] != pin.version:
            continue
        said, agrees = _compared(metadata, entry)
        if not agrees:
            raise ReleaseError(
                f"expected the licence that {name} {pin.version} declares, {said!r}; licences.toml "
                f"says {entry!r}; correct it"
            )


def _compared(metadata: PackageMetadata, entry: str) -> tuple[str, bool]:
    """What a package's metadata says of its licence, and whether the entry says the same."""
    if expressions := metadata.get_all("License-Expression", []):
        return expressions[0], bool(_SPDX.is_equivalent(expressions[0], entry))
    lines = [line for line in metadata.get_all("Classifier", []) if line.startswith("License ::")]
    # Some put the whole licence there.
    lines += [line[:100] for line in metadata.get_all("License", [])]
    said = "; ".join(lines)
    meant = [ids for spoken, ids in _SPOKEN.items() if re.search(spoken, said.lower())]
    return said, bool(meant) and all(ids & _symbols(entry) for ids in meant)


def _symbols(expression: str) -> set[str]:
    return {str(symbol) for symbol in _SPDX.license_symbols(expression, unique=True)}


# --- the bill -----------------------------------------------------------------------------------


def bill(image: str, project: Project, wheel: Path, time: int, folder: Path) -> str:
    """The bill of materials of one image, as JSON.

    Args:
        wheel: the built wheel of this project.
        time: when the commit was made, in seconds since 1970.
        folder: that of the lock files.

    Raises:
        ReleaseError: a lock file is not there, or a licence is not allowed.
    """
    locked = pins(image, folder)
    if image == "client":
        (torch,) = pins(TORCH, folder)
        locked.append(Pin(torch.name, torch.version, (), (canonicalize_name(project.name),)))
    licences = Licences.read(folder)
    version, digest = str(project.version), sha256(wheel)
    parts = {pin.name: _component(pin, licences.of(pin.name)) for pin in locked}
    own = Component(
        bom_ref=f"{project.name}=={version}",
        name=project.name,
        version=version,
        purl=PackageURL("pypi", name=project.name, version=version),
        licenses=_licence(project.metadata["license"]),
        description=project.metadata["description"],
        hashes=_hashes([digest]),
    )
    top = Component(
        bom_ref=f"{project.name}-{image}:{version}",
        type=ComponentType.CONTAINER,
        name=f"{project.name}-{image}",
        version=version,
        licenses=_licence(project.metadata["license"]),
    )
    found = Bom(components=[own, *parts.values()])
    found.metadata.component = top
    found.metadata.timestamp = datetime.fromtimestamp(time, UTC)
    everything = "\n".join([image, version, digest, *(repr(pin) for pin in locked)])
    found.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, everything)
    found.register_dependency(top, [own])
    for needing, component in {canonicalize_name(project.name): own, **parts}.items():
        needs = [parts[pin.name] for pin in locked if needing in pin.wanted_by]
        found.register_dependency(component, needs)
    return JsonV1Dot6(found).output_as_string(indent=2) + "\n"


def _component(pin: Pin, licence: str) -> Component:
    # Which of a version's files is installed depends on the machine: hashes are of the files to
    # choose from, not of the component.
    package = PackageURL("pypi", name=pin.name, version=pin.version)
    reference = ExternalReference(
        type=ExternalReferenceType.DISTRIBUTION,
        url=XsUri(package.to_string()),
        comment="SHA-256 of each file of this version; one of them is installed",
        hashes=_hashes(pin.hashes),
    )
    return Component(
        bom_ref=f"{pin.name}=={pin.version}",
        name=pin.name,
        version=pin.version,
        purl=package,
        licenses=_licence(licence),
        external_references=[reference] if pin.hashes else [],
    )


def _hashes(digests: Iterable[str]) -> list[HashType]:
    return [HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in digests]


def _licence(expression: str) -> list[License]:
    return [LicenseFactory().make_from_string(expression)]


def check_bill(text: str) -> None:
    """Check a bill against CycloneDX's own schema.

    Raises:
        ReleaseError: it is not valid.
    """
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        raise ReleaseError(f"expected a valid CycloneDX bill of materials; {str(error)[:500]}")
