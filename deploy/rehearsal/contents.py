"""What is in an image: every layer of it, also what a later one hides.

Reads an archive as ``podman save --format docker-archive`` writes it. Nothing here runs an image.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

__all__ = [
    "Entry",
    "Image",
    "Layer",
    "distributions",
    "privileged",
    "read",
    "secrets",
    "unaccounted",
    "uncompiled",
]

_PRIVATE_KEY = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{64}")
_URL_CREDENTIALS = re.compile(
    rb"[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>{}$]{1,64}:[^\s/@\"'<>{}$*]{1,64}@[A-Za-z0-9\[]"
)
# Names of what must never be in an image: kits, their passphrases, stores, and where other tools
# keep secrets.
_SECRET_NAME = re.compile(
    r"(^|/)(\.git|\.netrc|\.pypirc|\.npmrc|\.git-credentials|\.ssh|\.docker|\.env"
    r"|id_(rsa|ed25519|ecdsa)|pip\.conf|passphrase|federation\.json|enrolment\.json|key_holder\.pub|audit\.key)(/|$)"
    r"|\.(key|sqlite3|pfx|p12)$"
)
_PROJECT = "secagg-"
_SITE = re.compile(r"^opt/secagg/lib/python3\.\d+/site-packages/")
# What a virtual environment, an account and pip bring beside files of wheels.
_EXPECTED = re.compile(
    r"^opt/secagg/(pyvenv\.cfg|bin/([Aa]ctivate.*|python3?(\.\d+)?))$"
    r"|^etc/(passwd|group)$"
    r"|\.dist-info/(RECORD|INSTALLER|REQUESTED|direct_url\.json)$"
)
# Written for a newer Python, and imported by none of ours.
_NEWER = re.compile(r"/py3\d+_\w+\.py$")
_TAG = "cpython-311"
# The word of flags of PEP 552: made of a source by its hash, which nobody has to compare.
_UNCHECKED = b"\x01\x00\x00\x00"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A file, folder, link or device of a layer.

    Attributes:
        path: without a slash in front.
        kind: tarfile's type of it.
        mode: permission bits.
        capabilities: whether the file brings privileges of its own.
        digest: SHA-256 of a file in a layer that was looked into; else empty.
        text: the bytes of files there that other checks read, and the first of bytecode.
        marks: what looks like a secret in its bytes.
    """

    path: str
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    capabilities: bool = False
    digest: bytes = b""
    text: bytes = b""
    marks: tuple[str, ...] = ()


@dataclass
class Layer:
    """One layer: its entries by path, what it hides of those below, and its sizes in bytes."""

    entries: dict[str, Entry] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    size: int = 0
    compressed: int = 0
    digest: str = ""


@dataclass
class Image:
    """An image: its configuration, and its layers from the lowest.

    Attributes:
        base: how many of the layers are the base's, whose files were not read.
    """

    config: dict[str, Any]
    layers: list[Layer]
    base: int

    @property
    def own(self) -> list[Layer]:
        """The layers above the base."""
        return self.layers[self.base :]

    def merged(self) -> dict[str, Entry]:
        """What a container sees."""
        seen: dict[str, Entry] = {}
        for layer in self.layers:
            for gone in layer.hidden:
                inside = gone.removesuffix("*") if gone.endswith("*") else f"{gone}/"
                for path in [p for p in seen if p == gone or p.startswith(inside)]:
                    del seen[path]
            seen |= layer.entries
        return seen


def read(
    archive: Path,
    *,
    base: frozenset[str] = frozenset(),
    canary: str = "",
    squeezed: Collection[str] = (),
) -> Image:
    """Read an archive of one image.

    Args:
        squeezed: digests of layers whose compressed size is known: it is left 0.
        base: digests of layers whose files need not be read, as configurations name them.
        canary: a text that must be nowhere; no check when empty.
    """
    with tarfile.open(archive) as outer:
        manifest = json.load(_member(outer, "manifest.json"))[0]
        config = json.load(_member(outer, manifest["Config"]))
        digests = config["rootfs"]["diff_ids"]
        layers = [
            _layer(
                _member(outer, name),
                digest,
                skim=digest in base,
                squeeze=digest not in squeezed,
                canary=canary.encode(),
            )
            for name, digest in zip(manifest["Layers"], digests, strict=True)
        ]
    return Image(config, layers, sum(digest in base for digest in digests))


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    found = archive.getmember(name)
    while found.issym():  # equal layers are links to one
        found = archive.getmember(str(PurePosixPath(found.name).parent / found.linkname))
    file = archive.extractfile(found)
    if file is None:
        raise ValueError(f"expected a file {name!r} in the archive; it is something else")
    return file


class _Squeezed(io.RawIOBase):
    """Hands a layer on, and counts how many bytes it has, plain and compressed as registries do."""

    def __init__(self, source: IO[bytes], *, squeeze: bool) -> None:
        self._source, self._squeeze = source, zlib.compressobj(6) if squeeze else None
        self.size = self.compressed = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        self.size += len(data)
        if self._squeeze:
            self.compressed += len(self._squeeze.compress(data))
        return len(data)

    def finish(self) -> None:
        while self.read(_CHUNK):
            pass
        if self._squeeze:
            self.compressed += len(self._squeeze.flush())


def _layer(source: IO[bytes], digest: str, *, skim: bool, squeeze: bool, canary: bytes) -> Layer:
    squeezed = _Squeezed(source, squeeze=squeeze)
    found = Layer(digest=digest)
    with tarfile.open(fileobj=io.BufferedReader(squeezed, _CHUNK), mode="r|") as layer:
        for info in layer:
            path = PurePosixPath(info.name.removeprefix("./").lstrip("/"))
            if path.name == ".wh..wh..opq":
                found.hidden.append(f"{path.parent}/*")
            elif path.name.startswith(".wh."):
                found.hidden.append(str(path.with_name(path.name.removeprefix(".wh."))))
            else:
                found.entries[str(path)] = _entry(str(path), info, layer, skim=skim, canary=canary)
    squeezed.finish()
    found.size, found.compressed = squeezed.size, squeezed.compressed
    return found


def _entry(
    path: str, info: tarfile.TarInfo, layer: tarfile.TarFile, *, skim: bool, canary: bytes
) -> Entry:
    digest, text, marks = b"", b"", set[str]()
    if info.isreg() and not skim and (file := layer.extractfile(info)):
        data = file.read()
        digest = hashlib.sha256(data).digest()
        if path.endswith(".dist-info/RECORD"):
            text = data
        elif path.endswith(".pyc"):
            text = data[:8]
        marks = set(_marks(data, canary))
    if info.islnk() or info.issym():
        marks |= set(_marks(info.linkname.encode(), canary))
    return Entry(
        path,
        info.type,
        info.mode & 0o7777,
        info.uid,
        info.gid,
        info.size,
        "SCHILY.xattr.security.capability" in info.pax_headers,
        digest,
        text,
        tuple(sorted(marks)),
    )


def _marks(data: bytes, canary: bytes) -> Iterator[str]:
    if canary and canary in data:
        yield "the secret of the build"
    if b"PRIVATE KEY-----" in data and _PRIVATE_KEY.search(data):
        yield "a private key"
    if b"://" in data and _URL_CREDENTIALS.search(data):
        yield "a URL with a password"


def distributions(image: Image) -> set[str]:
    """Names of the Python distributions that a container sees, as their folders spell them."""
    found = (
        re.search(r"-packages/([^/]+)-[^/-]+\.dist-info/METADATA$", f"/{path}")
        for path in image.merged()
    )
    return {match[1].lower().replace("_", "-") for match in found if match}


def _published(layer: Layer) -> set[str]:
    """Files that are byte by byte what somebody else's wheel brought, and bytecode of them."""
    found: set[str] = set()
    for path, entry in layer.entries.items():
        if not path.endswith("/RECORD") or PurePosixPath(path).parent.name.startswith(_PROJECT):
            continue
        site = PurePosixPath(path).parents[1]
        for name, recorded, _ in csv.reader(io.StringIO(entry.text.decode())):
            target = _resolved(site / name)
            brought = layer.entries.get(target)
            if brought and recorded == f"sha256={_base64(brought.digest)}":
                found.add(target)
    return found | _bytecode_of(found, layer)


def _bytecode_of(sources: set[str], layer: Layer) -> set[str]:
    made: set[str] = set()
    for path in layer.entries:
        parts = re.fullmatch(r"(.*/)__pycache__/([^/]+)\.cpython-\d+\.pyc", path)
        if parts and f"{parts[1]}{parts[2]}.py" in sources:
            made.add(path)
    return made


def _resolved(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def _base64(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def secrets(image: Image) -> list[str]:
    """What looks like a secret above the base, or in the configuration; a line for each.

    Files that a wheel of somebody else brought are public: examples in them are no finding.
    The text of the build's secret is one everywhere.
    """
    found = [f"configuration: {mark}" for mark in _marks(json.dumps(image.config).encode(), b"")]
    for number, layer in enumerate(image.layers):
        published = _published(layer) if number >= image.base else set()
        for path, entry in layer.entries.items():
            if number < image.base:
                continue
            marks = [m for m in entry.marks if path not in published or m.startswith("the secret")]
            if _SECRET_NAME.search(path) and path not in published:
                marks.append("a name that secrets have")
            found += [f"layer {number}: {path}: {mark}" for mark in marks]
    return found


def unaccounted(image: Image) -> list[str]:
    """Files above the base that nobody has brought: no wheel, no bytecode of one, not expected."""
    below = {path for layer in image.layers[: image.base] for path in layer.entries}
    found: list[str] = []
    for number, layer in enumerate(image.own, image.base):
        known = _published(layer) | _project_files(layer)
        known |= _bytecode_of(known, layer)
        found += [
            f"layer {number}: {path}"
            for path, entry in layer.entries.items()
            if entry.kind == tarfile.REGTYPE
            and path not in known
            and path not in below
            and not _EXPECTED.search(path)
        ]
    return found


def _project_files(layer: Layer) -> set[str]:
    """Python of the project, its pages, its programs, and what its benchmarks run: no data."""
    code = re.compile(
        _SITE.pattern
        + r"secagg(_\w+)?[-/].*(\.pyi?|\.(html|css|js|svg)|py\.typed"
        + r"|METADATA|WHEEL|LICENSE|entry_points\.txt)$"
    )
    bench = re.compile(
        _SITE.pattern + r"secagg_bench/(suite/scenarios\.toml|peers/requirements/\w+\.txt)$"
    )
    program = re.compile(r"^opt/secagg/bin/secagg(-\w+)?$")
    kinds = (code, bench, program)
    return {path for path in layer.entries if any(kind.match(path) for kind in kinds)}


def uncompiled(image: Image) -> list[str]:
    """Python above the base whose bytecode is missing, or depends on the time of a file."""
    found = []
    for layer in image.own:
        for path in layer.entries:
            if not path.endswith(".py") or _NEWER.search(path):
                continue
            source = PurePosixPath(path)
            made = layer.entries.get(f"{source.parent}/__pycache__/{source.stem}.{_TAG}.pyc")
            if made is None:
                found.append(f"{path}: without bytecode")
            elif made.text[4:8] != _UNCHECKED:
                found.append(f"{path}: its bytecode is checked against a time")
    return found


def privileged(image: Image) -> list[str]:
    """What gives whoever runs it, or writes to it, more than they have: a line for each."""
    found: list[str] = []
    for path, entry in sorted(image.merged().items()):
        if entry.kind == tarfile.REGTYPE and entry.mode & 0o6000:
            found.append(f"{path}: runs as its owner or group (mode {entry.mode:o})")
        if entry.capabilities:
            found.append(f"{path}: has capabilities of its own")
        if entry.kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            found.append(f"{path}: a device")
        sticky = entry.kind == tarfile.DIRTYPE and entry.mode & 0o1000
        if entry.kind != tarfile.SYMTYPE and entry.mode & 0o002 and not sticky:
            found.append(f"{path}: anybody may write (mode {entry.mode:o})")
        if path.startswith("opt/") and (entry.uid or entry.gid):
            found.append(
                f"{path}: belongs to {entry.uid}:{entry.gid}, who could change the program"
            )
    return found
