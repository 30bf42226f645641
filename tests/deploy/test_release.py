"""Releases: lock files, licences, bills of materials, and the same bytes from the same commit."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from packaging.version import Version

from deploy.release import (
    REQUIREMENTS,
    ROOT,
    Project,
    ReleaseError,
    check_changelog,
    git,
    lock,
    project_version,
)
from deploy.release.__main__ import SUMS, check_tree
from deploy.release.artifacts import check_sdist, check_wheel, commit_time, sha256
from deploy.release.bill import Licences, bill, check_bill, check_licences

FOLDER = ROOT / REQUIREMENTS
PROJECT = Project.read()
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def names(image: str) -> set[str]:
    return {str(pin.name) for pin in lock.pins(image)}


# --- lock files ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the folder of lock files, to damage."""
    return Path(shutil.copytree(FOLDER, tmp_path / "requirements"))


def replaced(path: Path, pattern: str, by: str) -> None:
    text = path.read_text()
    changed, count = re.subn(pattern, by, text, count=1, flags=re.MULTILINE)
    assert count == 1
    path.write_text(changed)


def test_the_lock_files_are_what_pyproject_asks_for() -> None:
    lock.check()


@pytest.mark.parametrize("image", lock.IMAGES)
def test_a_lock_file_names_no_index_and_no_path(image: str) -> None:
    text = (FOLDER / f"{image}.txt").read_text()
    assert "://" not in text
    assert not re.search(
        r"^(-|.*\s(-[a-z]|--(?!hash=sha256:|require|no-deps|only-binary)))\b", text
    )
    assert str(ROOT) not in text


def test_services_bring_no_training_stack() -> None:
    for image in ("server", "keyholder"):
        assert names(image).isdisjoint({"torch", "pandas", "sympy", "networkx"})
    assert names("keyholder").isdisjoint({"sqlalchemy", "alembic", "psycopg", "psycopg-binary"})
    assert {"psycopg", "psycopg-binary"} <= names("server")
    assert "shamir-mnemonic" not in names("server")


DAMAGED = {
    "no hash": (
        "server",
        r"^(idna==[^ ]+) \\\n(    --hash=.*\n)+",
        r"\1\n",
        "SHA-256 of each file",
    ),
    "out of its range": ("server", r"^protobuf==\S+", "protobuf==8.0", r"protobuf<8,>=6.31"),
    "out of a package's range": (
        "client",
        r"^python-dateutil==\S+",
        "python-dateutil==1.0",
        "needs; got 1.0",
    ),
    "no longer asked for": (
        "server",
        r"^(idna==(.|\n)*?    # via )yarl",
        r"\1secagg (pyproject.toml)",
        r"only what is needed.*idna",
    ),
    "asked for by nobody": ("server", r"^(idna==(.|\n)*?)    # via yarl\n", r"\1", "asks for idna"),
    "asked for by a stranger": ("server", r"    # via yarl", "    # via leftpad", "asks for"),
    "not said to be asked for": (
        "server",
        r"^(alembic==(.|\n)*?    # via )secagg \(pyproject.toml\)",
        r"\1mako",
        "say that secagg needs alembic",
    ),
    "missing": ("keyholder", r"^shamir-mnemonic==(.|\n)*?# via.*\n", "", "shamir-mnemonic"),
    "missing below": ("server", r"^idna==(.|\n)*?# via.*\n", "", r"idna.*yarl needs"),
    "another version elsewhere": ("client", r"^rich==\S+", "rich==14.0.0", "one version of rich"),
    "for some machines": ("client", r"^rich==\S+", "rich==15.0.0 ; os_name == 'nt'", "conditions"),
    "a path": ("client", r"^rich==\S+ \\", "/home/me/rich.whl", "a pin, a hash or a comment"),
    "another kind of hash": ("client", "--hash=sha256:", "--hash=md5:", "a pin, a hash or"),
    "an index": ("client", r"^rich==", "--index-url https://example.com\nrich==", "a pin, a hash"),
    "torch with a hash": (
        "client",
        r"^rich==",
        "torch==2.13.0 \\\n    --hash=sha256:" + "0" * 64 + "\n    # via secagg\nrich==",
        "leave out torch",
    ),
    "another torch": ("client-torch", r"^torch==\S+", "torch==2.12.0", "torch==2.13.0"),
    "an older builder": ("build", r"^hatchling==\S+", "hatchling==1.20", "hatchling>=1.27"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_lock_file_that_is_not_what_pyproject_asks_for_is_refused(
    folder: Path, damage: str
) -> None:
    name, pattern, by, message = DAMAGED[damage]
    replaced(folder / f"{name}.txt", pattern, by)
    with pytest.raises(ReleaseError, match=f"(?s){message}.*make lock"):
        lock.check(folder)


@pytest.mark.parametrize("name", [*lock.IMAGES, lock.TORCH, lock.BUILD])
def test_a_lock_file_that_is_not_there_is_named(folder: Path, name: str) -> None:
    (folder / f"{name}.txt").unlink()
    with pytest.raises(ReleaseError, match=rf"{name}\.txt.*not there"):
        lock.check(folder)


def test_a_new_requirement_outdates_the_lock_files(tmp_path: Path, folder: Path) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text)
    lock.check(folder, tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        text.replace('server = ["secagg', 'server = ["leftpad>=1", "secagg')
    )
    with pytest.raises(ReleaseError, match=r"leftpad>=1 in server\.txt, .* needs; got none"):
        lock.check(folder, tmp_path)


def test_extras_bring_what_their_extras_bring() -> None:
    asked = PROJECT.requirements(("server", "postgresql"))
    heads = {re.split(r"[<>=\[]", line)[0] for line in asked}
    assert {"numpy", "typer", "grpcio", "structlog", "dp-accounting", "sqlalchemy"} <= heads
    assert "psycopg" in heads
    assert "psycopg" not in {line[:7] for line in PROJECT.requirements(("server",))}
    assert len(asked) == len(set(asked))


# --- version and changelog ----------------------------------------------------------------------


def test_the_changelog_begins_with_the_version_at_hand() -> None:
    check_changelog(ROOT, PROJECT.version)


@pytest.mark.parametrize(
    ("version", "heading"),
    [("1.2.0", "1.2.0 (2026-01-31)"), ("1.2.0.dev0", "1.2.0 (not released)")],
)
def test_a_changelog_of_the_version_is_accepted(tmp_path: Path, version: str, heading: str) -> None:
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n## 1.1.0\n")
    check_changelog(tmp_path, Version(version))


@pytest.mark.parametrize(
    ("version", "text", "message"),
    [
        ("1.2.0", "", "begins with 'nothing'"),
        ("1.2.0", "## 1.1.0 (2026-01-31)\n\n## 1.2.0 (2026-01-30)", "begins with '## 1.1.0"),
        ("1.2.0.dev0", "## 1.1.0 (2026-01-31)", "say there what the version changes"),
        ("1.2.0", "## 1.2.0 (not released)", "put the day"),
        ("1.2.0", "## 1.2.0", "put the day"),
        ("1.2.0", "## 1.2.0 (soon)", "put the day"),
        ("1.2.0.dev0", "## 1.2.0 (2026-01-31)", "take the .dev away, or the date"),
        ("1.2.0.dev0", "## 1.2.0", "take the .dev away, or the date"),
    ],
)
def test_a_changelog_of_another_version_is_refused(
    tmp_path: Path, version: str, text: str, message: str
) -> None:
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{text}\n")
    with pytest.raises(ReleaseError, match=message):
        check_changelog(tmp_path, Version(version))


def mentions() -> dict[str, str]:
    """Where a file names a version of ours, as tag or label of an image or argument; and which."""
    said = re.compile(
        r"(?:\bsecagg(?:-(?:server|keyholder|client))?:|SECAGG_VERSION:-|\bVERSION=|newTag:\s*"
        r"|kubernetes\.io/version:\s*)\"?v?(\d+\.\d+[\w.]*)"
    )
    found = {}
    for top in ("deploy", "docs", "README.md", "CONTRIBUTING.md", "SECURITY.md"):
        under = ROOT / top
        for path in [under] if under.is_file() else sorted(under.rglob("*")):
            if path.suffix in {".md", ".yaml", ".yml", ".toml", ".sh", ""} and path.is_file():
                for match in said.finditer(path.read_text(encoding="utf-8")):
                    found[f"{path.relative_to(ROOT)}: {match[0]}"] = match[1]
    return found


def test_every_other_mention_of_the_version_follows_pyproject() -> None:
    found = mentions()
    assert {where.partition(":")[0] for where in found} >= {"deploy/Dockerfile"}
    assert {where: said for where, said in found.items() if said != project_version()} == {}


# --- licences -----------------------------------------------------------------------------------


def test_everything_that_is_shipped_has_a_licence_that_may_be_shipped() -> None:
    check_licences(FOLDER)


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT AND (GPL-2.0-only OR ISC)", True),
        ("(MIT AND GPL-2.0-only) OR AGPL-3.0-only", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("LGPL-3.0-only", False),
    ],
)
def test_a_licence_is_allowed_only_if_each_part_of_it_is(expression: str, allowed: bool) -> None:
    known = Licences.read(FOLDER)
    licences = Licences(known.allowed, {}, {"leftpad": expression})
    if allowed:
        assert licences.of("leftpad") == expression
    else:
        with pytest.raises(ReleaseError, match="leftpad has"):
            licences.of("leftpad")


def test_an_exception_holds_for_its_package_alone() -> None:
    licences = Licences(frozenset({"MIT"}), {"psycopg": "LGPL-3.0-only"}, {"x": "LGPL-3.0-only"})
    assert licences.of("psycopg") == "LGPL-3.0-only"
    with pytest.raises(ReleaseError, match="x has LGPL"):
        licences.of("x")


@pytest.mark.parametrize(
    ("pattern", "by", "message"),
    [
        (r'^"idna" = .*\n', "", "licence of idna .* not there"),
        (r'^"idna" = .*', '"idna" = "Proprietary"', "SPDX expression for idna"),
        (r'^"idna" = .*', '"idna" = "MIT"', "idna .* declares, 'BSD-3-Clause'"),
        (r'^"attrs" = .*', '"attrs" = "ISC"', "attrs .* declares, 'MIT'"),
        (r'^"mpmath" = .*', '"mpmath" = "MIT"', "mpmath .* declares"),
        (r'^"yarl" = .*', '"yarl" = "Apache-2.0"\n"leftpad" = "MIT"', "leftpad is in none"),
        (r'^    "Zlib",\n', "", "numpy has"),
        (r'^"psycopg" = .*', "", "licence of psycopg in"),
    ],
)
def test_a_licence_that_is_not_so_is_refused(
    folder: Path, pattern: str, by: str, message: str
) -> None:
    replaced(folder / "licences.toml", pattern, by)
    with pytest.raises(ReleaseError, match=message):
        check_licences(folder)


# --- bills of materials -------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "some.whl"
    path.write_bytes(b"the bytes of a wheel")
    return path


@pytest.mark.parametrize("image", lock.IMAGES)
def test_a_bill_lists_what_the_image_holds(image: str, wheel: Path) -> None:
    text = bill(image, PROJECT, wheel, 1_700_000_000, FOLDER)
    assert bill(image, PROJECT, wheel, 1_700_000_000, FOLDER) == text
    check_bill(text)
    found = json.loads(text)
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    top = found["metadata"]["component"]
    assert (top["name"], top["version"]) == (f"secagg-{image}", str(PROJECT.version))
    assert found["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"

    parts = {part["name"]: part for part in found["components"]}
    assert len(parts) == len(found["components"])
    torch = {"torch"} if image == "client" else set()
    assert set(parts) == {"secagg"} | names(image) | torch
    for pin in lock.pins(image):
        part = parts[pin.name]
        assert part["version"] == pin.version
        assert part["purl"] == f"pkg:pypi/{pin.name}@{pin.version}"
        (files,) = part["externalReferences"]
        assert {each["content"] for each in files["hashes"]} == set(pin.hashes)
    assert all(part["licenses"] for part in parts.values())
    assert parts["secagg"]["hashes"] == [{"alg": "SHA-256", "content": sha256(wheel)}]
    assert all("externalReferences" not in parts[name] for name in torch)

    needs = {entry["ref"]: entry.get("dependsOn", []) for entry in found["dependencies"]}
    reached, open_ends = set[str](), [top["bom-ref"]]
    while open_ends:
        ref = open_ends.pop()
        if ref not in reached:
            reached.add(ref)
            open_ends += needs[ref]
    assert reached == {top["bom-ref"]} | {part["bom-ref"] for part in found["components"]}


def test_other_contents_make_another_bill(wheel: Path, folder: Path) -> None:
    def serial(image: str = "server") -> str:
        text = bill(image, PROJECT, wheel, 1_700_000_000, folder)
        return str(json.loads(text)["serialNumber"])

    serials = [serial(), serial("keyholder")]
    replaced(folder / "server.txt", "--hash=sha256:[0-9a-f]{8}", "--hash=sha256:00000000")
    serials.append(serial())
    wheel.write_bytes(b"another")
    serials.append(serial())
    assert len(set(serials)) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("bomFormat"),
        lambda found: found.update(serialNumber="1"),
        lambda found: found["components"][0].update(type="thing"),
        lambda found: found["components"][0].update(colour="blue"),
    ],
)
def test_a_bill_that_is_not_valid_is_refused(
    change: Callable[[dict[str, Any]], object], wheel: Path
) -> None:
    found = json.loads(bill("keyholder", PROJECT, wheel, 1_700_000_000, FOLDER))
    change(found)
    with pytest.raises(ReleaseError, match="valid CycloneDX"):
        check_bill(json.dumps(found))


# --- what may be released -----------------------------------------------------------------------


def run_git(folder: Path, *arguments: str) -> None:
    author = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]
    git(folder, *author, "-c", "commit.gpgsign=false", *arguments)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of a project of two files, all of it committed."""
    made = tmp_path / "checkout"
    made.mkdir()
    (made / "pyproject.toml").write_text(
        (ROOT / "pyproject.toml").read_text().replace(project_version(), "1.2.0")
    )
    (made / "CHANGELOG.md").write_text("## 1.2.0 (2026-01-31)\n")
    run_git(made, "init", "--quiet")
    run_git(made, "add", ".")
    run_git(made, "commit", "--quiet", "-m", "first")
    return made


def test_a_committed_release_may_be_made(checkout: Path) -> None:
    check_tree(checkout, Project.read(checkout), dev=False)
    check_changelog(checkout, Project.read(checkout).version)


def test_what_is_not_committed_is_not_released(checkout: Path) -> None:
    (checkout / "CHANGELOG.md").write_text("## 1.2.0 (2026-01-31)\n\nMore.\n")
    with pytest.raises(ReleaseError, match=r"CHANGELOG\.md.*commit it"):
        check_tree(checkout, Project.read(checkout), dev=True)
    run_git(checkout, "add", ".")
    with pytest.raises(ReleaseError, match=r"CHANGELOG\.md.*commit it"):
        check_tree(checkout, Project.read(checkout), dev=True)


def test_a_file_that_git_does_not_know_stops_a_release(checkout: Path) -> None:
    (checkout / "notes.txt").write_text("mine")
    with pytest.raises(ReleaseError, match=r"notes\.txt"):
        check_tree(checkout, Project.read(checkout), dev=True)


def test_what_is_in_development_is_released_on_purpose_only(checkout: Path) -> None:
    path = checkout / "pyproject.toml"
    path.write_text(path.read_text().replace('"1.2.0"', '"1.2.0.dev3"'))
    run_git(checkout, "commit", "--quiet", "-a", "-m", "next")
    check_tree(checkout, Project.read(checkout), dev=True)
    with pytest.raises(ReleaseError, match=r"1\.2\.0\.dev3.*--dev"):
        check_tree(checkout, Project.read(checkout), dev=False)


def test_a_folder_that_is_no_checkout_cannot_be_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ReleaseError, match="expected a git checkout"):
        commit_time(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ReleaseError, match="expected git"):
        commit_time(tmp_path)


# --- wheel and source distribution --------------------------------------------------------------

INFO = f"secagg-{PROJECT.version}.dist-info"


def metadata(**changes: str) -> bytes:
    said = {
        "Metadata-Version": "2.4",
        "Name": "secagg",
        "Version": str(PROJECT.version),
        "License-Expression": "Apache-2.0",
        "Requires-Python": PROJECT.metadata["requires-python"],
        "Description-Content-Type": "text/markdown",
    } | {key.replace("_", "-"): value for key, value in changes.items()}
    lines = [f"{key}: {value}" for key, value in said.items()]
    return "\n".join([*lines, *(f"Provides-Extra: {e}" for e in PROJECT.extras), "", ""]).encode()


def zipped(path: Path, files: Mapping[str, bytes], mode: int = 0o644) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFREG | mode) << 16
            made.writestr(entry, content)
    return path


WHEEL = {f"{package}/__init__.py": b"" for package in PROJECT.packages}
WHEEL[f"{INFO}/METADATA"] = metadata()


def test_a_wheel_of_the_packages_is_accepted(tmp_path: Path) -> None:
    more = {"secagg/py.typed": b"", f"{INFO}/RECORD": b"", f"{INFO}/licenses/LICENSE": b""}
    check_wheel(zipped(tmp_path / "a.whl", WHEEL | more), PROJECT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tests/test_it.py": b""}, "it has .*tests"),
        ({"setup.py": b""}, r"it has .*setup\.py"),
        ({"secagg/.env": b""}, r"code alone .*secagg/\.env"),
        ({"secagg/kits/key.pem": b""}, r"code alone .*key\.pem"),
        ({"secagg_recommender/ratings.csv": b""}, r"code alone .*ratings\.csv"),
        ({"secagg/module.cpython-311.pyc": b""}, r"code alone .*\.pyc"),
        ({f"{INFO}/METADATA": metadata(Version="0.0.1")}, r"version '.*'.*got '0\.0\.1'"),
        ({f"{INFO}/METADATA": metadata(Name="other")}, "name 'secagg'"),
        ({f"{INFO}/METADATA": metadata(License_Expression="MIT")}, "licence 'Apache-2.0'"),
        ({f"{INFO}/METADATA": metadata(License_Expression="Mine")}, "valid metadata"),
        ({f"{INFO}/METADATA": metadata(Requires_Python=">=3.8")}, "requires-python"),
        ({f"{INFO}/METADATA": metadata(Metadata_Version="9.9")}, "valid metadata"),
        ({f"{INFO}/METADATA": metadata(Description_Content_Type="text/plain")}, "description"),
        ({f"{INFO}/METADATA": metadata(Provides_Extra="more")}, "extras"),
    ],
)
def test_a_wheel_of_anything_else_is_refused(
    tmp_path: Path, change: dict[str, bytes], message: str
) -> None:
    with pytest.raises(ReleaseError, match=message):
        check_wheel(zipped(tmp_path / "a.whl", WHEEL | change), PROJECT)


def test_a_wheel_without_a_package_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in WHEEL.items() if "keyholder" not in name}
    with pytest.raises(ReleaseError, match=r"expected .*secagg_keyholder"):
        check_wheel(zipped(tmp_path / "a.whl", files), PROJECT)


@pytest.mark.parametrize("mode", [0o600, 0o666, 0o4755])
def test_a_wheel_that_not_all_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ReleaseError, match="everybody may read"):
        check_wheel(zipped(tmp_path / "a.whl", WHEEL, mode), PROJECT)


def packed(path: Path, *files: str) -> Path:
    with tarfile.open(path, "w:gz") as made:
        for name in (*files, "PKG-INFO"):
            entry = tarfile.TarInfo(f"secagg-{PROJECT.version}/{name}")
            content = metadata()
            entry.size = len(content)
            made.addfile(entry, BytesIO(content))
    return path


def test_a_source_distribution_holds_what_git_tracks(tmp_path: Path) -> None:
    sdist = packed(tmp_path / "a.tar.gz", "pyproject.toml", "secagg/__init__.py")
    check_sdist(sdist, PROJECT, ["secagg/__init__.py", "pyproject.toml"])
    with pytest.raises(ReleaseError, match=r"secagg/__init__\.py is in one alone"):
        check_sdist(sdist, PROJECT, ["pyproject.toml"])
    with pytest.raises(ReleaseError, match=r"README\.md is in one alone"):
        check_sdist(sdist, PROJECT, ["secagg/__init__.py", "pyproject.toml", "README.md"])


# --- the commands -------------------------------------------------------------------------------


def release(
    *arguments: str,
    folder: Path = ROOT,
    expected: int = 0,
    prefix: Sequence[str] = (),
    env: Mapping[str, str] = OUTSIDE,
    umask: int = -1,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "deploy.release", *arguments],
        cwd=folder,
        env=dict(env),
        umask=umask,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == expected, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def test_an_error_is_one_line(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("## 0.0.1\n")
    done = release("check", folder=tmp_path, expected=1)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "expected CHANGELOG.md to begin with" in done.stderr


@contextmanager
def advisories(vulnerable: str | None) -> Iterator[tuple[str, dict[str, set[str]]]]:
    """A service that knows one vulnerable package: its address, and what it was asked for."""
    asked: dict[str, set[str]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = query["package"]["name"]
            asked.setdefault(name, set()).add(query["version"])
            known = [{"id": "PYSEC-0000-1", "summary": "bad", "affected": []}]
            answer = json.dumps({"vulns": known} if name == vulnerable else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
def test_an_audit_asks_for_everything_that_is_locked_and_tells_what_is_vulnerable() -> None:
    with advisories("yarl") as (url, asked):
        done = release("audit", "--service", "osv", "--osv-url", url, expected=1)
        assert "PYSEC-0000-1" in done.stdout
        assert "expected no known vulnerability" in done.stderr
        for name in (*lock.IMAGES, lock.TORCH, lock.BUILD):
            for pin in lock.pins(name):
                assert pin.version in asked[pin.name]
        assert "secagg" not in asked
        release("audit", "--service", "osv", "--osv-url", url, "--ignore", "PYSEC-0000-1")


@pytest.mark.slow
def test_an_audit_that_nobody_answers_is_no_good_news() -> None:
    with advisories(None) as (url, _):
        pass  # its port is closed again
    done = release("audit", "--service", "osv", "--osv-url", url, expected=1)
    assert "expected no known vulnerability" in done.stderr


# --- the same bytes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is tracked here, or could be, as the one commit of a repository of its own."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("releases are made from a git checkout")
    made = tmp_path_factory.mktemp("repository") / "secagg"
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in listed.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, made / name)
    run_git(made, "init", "--quiet")
    run_git(made, "add", "--all")
    run_git(made, "commit", "--quiet", "-m", "all")
    return made


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_same_commit_makes_the_same_bytes_everywhere(repository: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    said = release("make", "--dev", "--out", str(first), folder=repository).stdout
    made = tree(first)
    version = project_version()
    assert set(made) == {
        f"secagg-{version}.tar.gz",
        f"secagg-{version}-py3-none-any.whl",
        *(f"secagg-{image}-{version}.cdx.json" for image in lock.IMAGES),
        SUMS,
    }
    listed = dict(reversed(line.split("  ")) for line in said.splitlines())
    assert made[SUMS].decode() == said
    assert listed == {name: sha256(first / name) for name in made if name != SUMS}
    assert (
        "there is one"
        in release("make", "--dev", "--out", str(first), folder=repository, expected=1).stderr
    )
    assert tree(first) == made

    # Another folder, deeper; other times, permissions, habits, and, where there may be one, user.
    with TemporaryDirectory(prefix="elsewhere") as elsewhere:
        Path(elsewhere).chmod(0o755)
        other = Path(elsewhere) / "a" / "b" / "other name"
        shutil.copytree(repository, other)
        for path in other.rglob("*"):
            if ".git" not in path.parts:
                os.utime(path, (1_000_000_000, 1_000_000_000))
                if path.is_file():
                    path.chmod(0o600 if path.stat().st_mode & 0o100 == 0 else 0o700)
        (other / "dist").mkdir()  # what is ignored stays out
        (other / "dist" / "leftover.py").write_text("left = 'over'\n")
        environment = OUTSIDE | {
            "HOME": elsewhere,
            "LC_ALL": "POSIX",
            "PYTHONHASHSEED": "7",
            "SOURCE_DATE_EPOCH": "1",
            "TMPDIR": elsewhere,
            "TZ": "Pacific/Kiritimati",
        }
        release(
            *("make", "--dev", "--out", f"{elsewhere}/out"),
            folder=other,
            prefix=another_user(),
            env=environment,
            umask=0o077,
        )
        assert tree(Path(elsewhere, "out")) == made


def another_user() -> list[str]:
    """What makes a command see another user than this one, where that may be done."""
    prefix = ["unshare", "--user", "--map-user=4321", "--map-group=4321"]
    if shutil.which("unshare") is None:
        return []
    tried = subprocess.run([*prefix, "id", "-u"], capture_output=True, text=True, check=False)
    return prefix if tried.stdout.strip() == "4321" else []
