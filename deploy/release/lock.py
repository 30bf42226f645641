"""Lock files: exactly what an image installs, each file of it by its SHA-256.

``deploy/requirements/IMAGE.txt`` is what ``pyproject.toml`` asks for one image, resolved for Python
3.11 on Linux. The hashes are those of every file that the index has of a version, so that one lock
file serves x86_64 and aarch64. None names an index: whoever installs has one.

torch is the exception. It is published in several builds of one version (for the CPU, for each
CUDA), on indexes of their own; a hash would choose one of them for everybody. ``client-torch.txt``
has its version, and what only its CUDA builds need is in no lock file.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version

from deploy.release import REQUIREMENTS, ROOT, Project, ReleaseError

__all__ = ["BUILD", "FOLDER", "IMAGES", "TORCH", "Pin", "check", "parse", "pins", "write"]

FOLDER = ROOT / REQUIREMENTS
# The extras that each image is made of.
IMAGES = {
    "server": ("server", "postgresql"),
    "keyholder": ("keyholder",),
    "client": ("client",),
}
BUILD, TORCH = "build", "client-torch"
_PYTHON = "3.11"
_PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28")
# What torch names beside what it needs on a CPU.
_CUDA = (
    "cuda-bindings",
    "cuda-toolkit",
    "nvidia-cudnn-cu13",
    "nvidia-cusparselt-cu13",
    "nvidia-nccl-cu13",
    "nvidia-nvshmem-cu13",
    "triton",
)
_INSTALL = "pip install --require-hashes --no-deps --only-binary :all: -r"
_HEADER = f"""\
# What the {{image}} image holds beside secagg itself: Python {_PYTHON} on Linux, x86_64 or aarch64.
# Written by `make lock` from pyproject.toml, secagg[{{extras}}]; do not edit.
#   {_INSTALL} {{image}}.txt
"""
_BUILD_HEADER = f"""\
# What builds the wheel. Written by `make lock` from pyproject.toml, build-system; do not edit.
#   {_INSTALL} {BUILD}.txt
"""
_TORCH_HEADER = f"""\
# torch of the client image, beside client.txt. Written by `make lock`; do not edit.
# Without a hash: its builds, for the CPU and for CUDA, are different files of one version. Choose
# one by its index, such as PyTorch's own of CPU builds:
#   pip install --no-deps --only-binary :all: -r {TORCH}.txt --index-url INDEX
"""
_PIN = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[^\s;\\]+)\s*(?P<rest>.*)")
_HASH = re.compile(r"--hash=sha256:(?P<digest>[0-9a-f]{64})")
_VIA = re.compile(r"#(?: via)? +(?P<name>[A-Za-z0-9][\w.-]*)(?: \(pyproject\.toml\))?")
# Where the images run, for conditions on requirements.
_MACHINE = {
    "extra": "",
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": f"{_PYTHON}.0",
    "python_version": _PYTHON,
    "sys_platform": "linux",
}


@dataclass(frozen=True)
class Pin:
    """One package of a lock file.

    Attributes:
        hashes: SHA-256 of each of its files, hexadecimal.
        wanted_by: what in the same file asks for it; the project itself under its own name.
    """

    name: NormalizedName
    version: str
    hashes: tuple[str, ...]
    wanted_by: tuple[NormalizedName, ...]


def parse(text: str, source: str) -> list[Pin]:
    """Read a lock file.

    Raises:
        ReleaseError: a line that is no pin, no hash and no comment.
    """
    found: list[Pin] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip().removesuffix("\\").strip()
        if not stripped or line.startswith("#"):
            continue
        if pin := _PIN.fullmatch(stripped):
            if pin["rest"]:
                raise ReleaseError(
                    f"expected a pin without conditions; {source}:{number} has {pin['rest']!r}; "
                    "run `make lock`"
                )
            found.append(Pin(canonicalize_name(pin["name"]), pin["version"], (), ()))
        elif found and (digest := _HASH.fullmatch(stripped)):
            found[-1] = replace(found[-1], hashes=(*found[-1].hashes, digest["digest"]))
        elif found and stripped.startswith("#"):
            if stripped != "# via" and (via := _VIA.fullmatch(stripped)):
                names = (*found[-1].wanted_by, canonicalize_name(via["name"]))
                found[-1] = replace(found[-1], wanted_by=names)
        else:
            raise ReleaseError(
                f"expected a pin, a hash or a comment; {source}:{number} has {stripped[:60]!r}; "
                "run `make lock`"
            )
    return found


def pins(name: str, folder: Path = FOLDER) -> list[Pin]:
    """The pins of one lock file, by its name without ``.txt``.

    Raises:
        ReleaseError: not there, or damaged.
    """
    path = folder / f"{name}.txt"
    if not path.exists():
        raise ReleaseError(f"expected {path}; it is not there; run `make lock`")
    return parse(path.read_text(encoding="utf-8"), path.name)


# --- writing ------------------------------------------------------------------------------------


def write(folder: Path = FOLDER, project: Path = ROOT, *, upgrade: bool = False) -> list[Path]:
    """Write all lock files into ``folder``, and say which they are.

    What is pinned there and still fits stays as it is, unless ``upgrade``. The images get one
    version of whatever they share.

    Raises:
        ReleaseError: what ``pyproject.toml`` asks for cannot be had, or not for every platform.
    """
    written: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--only-binary", ":all:", "--no-header", "--no-emit-index-url", "--quiet"]
        options += ["--no-emit-find-links", "--python-version", _PYTHON]
        options += ["--excludes", _lines(scratch, "excludes", _CUDA)]
        known = [] if upgrade else _known(folder)

        every = [extra for extras in IMAGES.values() for extra in extras]
        first, *others = (
            _compile(project, every, known, [*options, "--python-platform", platform])
            for platform in _PLATFORMS
        )
        for other in others:
            if other != first:
                differing = sorted(set(first.splitlines()) ^ set(other.splitlines()))
                raise ReleaseError(
                    f"expected one resolution for {' and '.join(_PLATFORMS)}; they differ in "
                    f"{'; '.join(differing)}; make pyproject.toml narrower"
                )
        common = parse(first, "the resolution")

        options += ["--python-platform", _PLATFORMS[0], "--generate-hashes"]
        for image, extras in IMAGES.items():
            text = _compile(project, extras, common, [*options, "--no-emit-package", "torch"])
            text = text.partition("\n# The following packages")[0].rstrip("\n")
            written[image] = _HEADER.format(image=image, extras=",".join(extras)) + text + "\n"
        (torch,) = (pin.version for pin in common if pin.name == "torch")
        written[TORCH] = f"{_TORCH_HEADER}torch=={torch}\n"
        requires = _lines(scratch, "build.in", Project.read(project).build_requires)
        text = _compile(project, (), known, options, requires)
        written[BUILD] = _BUILD_HEADER + text.replace(f"-r {requires}", "build-system")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return [folder / f"{name}.txt" for name in written]


def _known(folder: Path) -> list[Pin]:
    names = [name for name in (*IMAGES, TORCH, BUILD) if (folder / f"{name}.txt").exists()]
    return list({pin.name: pin for name in names for pin in pins(name, folder)}.values())


def _lines(folder: str, name: str, lines: Sequence[str]) -> str:
    path = Path(folder) / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def _compile(
    project: Path,
    extras: Sequence[str],
    known: Sequence[Pin],
    options: Sequence[str],
    source: str = "pyproject.toml",
) -> str:
    """What uv resolves; a version that is ``known`` is kept where it fits."""
    with tempfile.TemporaryDirectory() as scratch:
        # uv prefers what the file that it is to write pins already.
        output = _lines(scratch, "output.txt", [f"{pin.name}=={pin.version}" for pin in known])
        command = [sys.executable, "-m", "uv", "pip", "compile", source, "-o", output, *options]
        command += [word for extra in extras for word in ("--extra", extra)]
        done = subprocess.run(  # noqa: S603 - fixed arguments, no shell
            command, cwd=project, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ReleaseError(
                f"expected packages for {source} with {', '.join(extras) or 'no extra'}; uv says: "
                f"{done.stderr.strip()}"
            )
        return Path(output).read_text(encoding="utf-8")


# --- checking -----------------------------------------------------------------------------------


def check(folder: Path = FOLDER, project: Path = ROOT) -> None:
    """Check, without a network, that the lock files are what ``pyproject.toml`` asks for.

    Whatever is asked for directly is pinned within its range; nothing is pinned that nobody asks
    for; whatever is installed here in the version that is pinned finds its own requirements pinned;
    every file has a hash; what images share has one version.

    Raises:
        ReleaseError: the first thing that is not so.
    """
    found = Project.read(project)
    (torch,) = pins(TORCH, folder)
    versions: dict[NormalizedName, str] = {}
    for name in (*IMAGES, BUILD):
        locked = {pin.name: pin for pin in pins(name, folder)}
        _check_pins(name, locked)
        if name == BUILD:
            _check_asked(name, locked, "build-system", found.build_requires)
        elif name == "client":
            locked[torch.name] = replace(torch, wanted_by=(canonicalize_name(found.name),))
        if name != BUILD:
            _check_asked(name, locked, found.name, found.requirements(IMAGES[name]))
            for pin in locked.values():
                if versions.setdefault(pin.name, pin.version) != pin.version:
                    raise ReleaseError(
                        f"expected one version of {pin.name} for all images; got "
                        f"{versions[pin.name]} and {pin.version}; run `make lock`"
                    )
        for pin in locked.values():
            _check_installed(name, locked, pin)


def _check_pins(name: str, locked: Mapping[NormalizedName, Pin]) -> None:
    for pin in locked.values():
        if not pin.hashes:
            raise ReleaseError(
                f"expected the SHA-256 of each file of {pin.name}; {name}.txt has none; run "
                "`make lock`"
            )
        if pin.name in _CUDA or pin.name.startswith(("nvidia-", "cuda-", "torch")):
            raise ReleaseError(
                f"expected {name}.txt to leave out torch and what only CUDA needs; it has "
                f"{pin.name}; name it in deploy/release/lock.py and run `make lock`"
            )


def _check_asked(
    name: str, locked: Mapping[NormalizedName, Pin], root: str, lines: Sequence[str]
) -> None:
    """What ``root`` asks for is pinned in its range, and nothing that is asked for by nobody."""
    asked = {canonicalize_name(line.name): line for line in map(Requirement, lines)}
    for package, requirement in asked.items():
        _check_fits(name, locked, requirement, root)
        if canonicalize_name(root) not in locked[package].wanted_by:
            raise ReleaseError(
                f"expected {name}.txt to say that {root} needs {package}; run `make lock`"
            )
    wanting = {*locked, canonicalize_name(root)}
    for pin in locked.values():
        stale = canonicalize_name(root) in pin.wanted_by and pin.name not in asked
        if stale or not pin.wanted_by or not wanting.issuperset(pin.wanted_by):
            raise ReleaseError(
                f"expected only what is needed in {name}.txt; nothing there or in pyproject.toml "
                f"asks for {pin.name}; run `make lock`"
            )


def _check_installed(name: str, locked: Mapping[NormalizedName, Pin], pin: Pin) -> None:
    """Of a package that is here in the pinned version, what it needs itself is pinned."""
    try:
        installed = distribution(pin.name)
    except PackageNotFoundError:
        return
    if Version(installed.version).public != Version(pin.version).public:
        return
    for line in installed.requires or []:
        _check_fits(name, locked, Requirement(line), pin.name)


def _check_fits(
    name: str, locked: Mapping[NormalizedName, Pin], requirement: Requirement, asker: str
) -> None:
    package = canonicalize_name(requirement.name)
    if package in _CUDA or (requirement.marker and not requirement.marker.evaluate(_MACHINE)):
        return
    pin = locked.get(package)
    if pin is None or not requirement.specifier.contains(pin.version, prereleases=True):
        raise ReleaseError(
            f"expected {requirement} in {name}.txt, which {asker} needs; got "
            f"{pin.version if pin else 'none'}; run `make lock`"
        )
