"""The images, as far as can be told without building them; `make images` builds and runs them.

That takes minutes, root, and tools that few machines have, so no test does it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import pytest
from dockerfiles import Dockerfile, in_context
from typer.core import TyperGroup
from typer.main import get_command

import secagg_client.cli
import secagg_keyholder.cli
import secagg_server.cli
from deploy.rehearsal import IMAGES
from deploy.rehearsal.behaviour import heeds, locked_down
from deploy.rehearsal.contents import (
    Image,
    distributions,
    privileged,
    read,
    secrets,
    unaccounted,
    uncompiled,
)
from deploy.rehearsal.pip_settings import folders, pip_conf
from deploy.rehearsal.report import markdown
from secagg.settings import Settings, load
from secagg_client.config import ClientSettings
from secagg_keyholder.config import KeyHolderSettings
from secagg_server.config import ServerSettings

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
IGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SETTINGS: Mapping[str, type[Settings]] = {
    "server": ServerSettings,
    "keyholder": KeyHolderSettings,
    "client": ClientSettings,
}
PROGRAMS = {
    "server": secagg_server.cli.app,
    "keyholder": secagg_keyholder.cli.app,
    "client": secagg_client.cli.app,
}
LABELS = ("title", "description", "version", "revision", "source", "created", "licenses")


@pytest.fixture(scope="module")
def recipe() -> Dockerfile:
    return Dockerfile.read(DOCKERFILE)


# Style.


def _hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed")
    return subprocess.run([program, path], capture_output=True, text=True, check=False)


def test_hadolint_has_nothing_to_say() -> None:
    done = _hadolint(DOCKERFILE)
    assert done.returncode == 0, done.stdout
    assert "hadolint ignore" not in DOCKERFILE.read_text(encoding="utf-8")
    assert not list(ROOT.glob(".hadolint.y*ml"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("USER 10001:10001", "USER root"),
        ('ENTRYPOINT ["secagg-server"]', "ENTRYPOINT secagg-server"),
        ("COPY deploy/requirements/build.txt .", "ADD deploy/requirements/build.txt ."),
    ],
)
def test_hadolint_would_have(tmp_path: Path, before: str, after: str) -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert before in text
    (tmp_path / "Dockerfile").write_text(text.replace(before, after))
    assert _hadolint(tmp_path / "Dockerfile").returncode == 1


# What each image is.


def test_images_are_those_that_are_rehearsed(recipe: Dockerfile) -> None:
    used = {stage.base for stage in recipe.stages.values()}
    copied = {
        each.option("from") for stage in recipe.stages.values() for each in stage.instructions
    }
    assert {name for name in recipe.stages if name not in used | copied} == set(IMAGES)


@pytest.mark.parametrize("target", IMAGES)
def test_nobody_is_root(recipe: Dockerfile, target: str) -> None:
    user = recipe.last(target, "USER")
    assert user is not None
    assert user.text == "10001:10001"
    last = [each.name for each in recipe.effective(target)]
    assert "RUN" not in last[last.index("USER") :]


@pytest.mark.parametrize("target", IMAGES)
def test_entrypoint_is_the_program_itself(recipe: Dockerfile, target: str) -> None:
    entry, command = recipe.last(target, "ENTRYPOINT"), recipe.last(target, "CMD")
    assert entry is not None
    assert command is not None
    assert entry.listed == [f"secagg-{target}"]
    assert entry.listed[0] in PROJECT["scripts"]
    assert len(command.listed) == 1
    stop = recipe.last(target, "STOPSIGNAL")
    assert stop is not None
    assert stop.text == "SIGTERM"


@pytest.mark.parametrize("target", IMAGES)
def test_commands_of_the_image_exist(recipe: Dockerfile, target: str) -> None:
    command, health = recipe.last(target, "CMD"), recipe.last(target, "HEALTHCHECK")
    assert command is not None
    assert health is not None
    program = get_command(PROGRAMS[target])
    assert isinstance(program, TyperGroup)
    asked = [] if health.text == "NONE" else health.listed[1:]
    assert {*command.listed, *asked} <= set(program.commands)


@pytest.mark.parametrize("target", ["server", "keyholder"])
def test_services_are_asked_for_their_health(recipe: Dockerfile, target: str) -> None:
    health = recipe.last(target, "HEALTHCHECK")
    assert health is not None
    assert health.listed == [f"secagg-{target}", "health"]
    assert " CMD [" in health.text


def test_a_client_has_no_health(recipe: Dockerfile) -> None:
    health = recipe.last("client", "HEALTHCHECK")
    assert health is not None
    assert health.text == "NONE"


@pytest.mark.parametrize("target", IMAGES)
def test_labels(recipe: Dockerfile, target: str) -> None:
    labels = recipe.values(target, "LABEL")
    assert {f"org.opencontainers.image.{name}" for name in LABELS} <= set(labels)
    assert labels["org.opencontainers.image.title"] == f"secagg-{target}"
    assert labels["org.opencontainers.image.version"] == "${VERSION}"
    assert labels["org.opencontainers.image.licenses"] == PROJECT["license"]


def test_version_is_the_projects(recipe: Dockerfile) -> None:
    assert recipe.arguments["VERSION"] == PROJECT["version"]
    declared = [
        each.text
        for stage in recipe.stages.values()
        for each in stage.instructions
        if each.name == "ARG" and each.text.startswith("VERSION")
    ]
    assert set(declared) == {"VERSION"}  # no stage has a default of its own


@pytest.mark.parametrize("target", IMAGES)
def test_settings_of_the_image_are_settings(
    recipe: Dockerfile, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = SETTINGS[target]
    given = {
        name: value
        for name, value in recipe.values(target, "ENV").items()
        if name.startswith("SECAGG_")
    }
    assert all(name.startswith(kind.env_prefix) for name in given)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = load(kind, None, {}).model_dump()
    volume = recipe.last(target, "VOLUME")
    assert volume is not None
    assert Path(volume.text) in (found.get("data_dir"), found.get("state_dir"))
    assert found["kit"] == Path("/run/secagg/kit")
    assert found["insecure"] is False


@pytest.mark.parametrize("target", ["server", "keyholder"])
def test_exposed_ports_are_those_it_listens_on(recipe: Dockerfile, target: str) -> None:
    environment = recipe.values(target, "ENV")
    prefix = SETTINGS[target].env_prefix
    defaults = SETTINGS[target].model_fields
    listens = {name for name in defaults if name.endswith("listen")}
    ports = {
        str(environment.get(prefix + name.upper(), defaults[name].default)).rpartition(":")[2]
        for name in listens
    }
    exposed = recipe.last(target, "EXPOSE")
    assert exposed is not None
    assert set(exposed.words) == ports - {"off"}


@pytest.mark.parametrize("target", IMAGES)
def test_nothing_listens_in_the_clear_by_default(recipe: Dockerfile, target: str) -> None:
    names = recipe.values(target, "ENV")
    assert not [name for name in names if re.search(r"INSECURE|OPEN|PROBE|PASS", name)]


# What goes in.


def test_nothing_is_fetched_but_by_pip(recipe: Dockerfile) -> None:
    for stage in recipe.stages.values():
        for each in stage.instructions:
            assert each.name != "ADD"
            assert not re.search(r"\b(curl|wget|git clone|apt-get|apt)\b|https?://", each.text)


def test_bases_are_pinned_and_ours(recipe: Dockerfile) -> None:
    assert re.fullmatch(r"\S+:\d+\.\d+-slim-[a-z]+", recipe.arguments["PYTHON_IMAGE"])
    for stage in recipe.stages.values():
        assert stage.base == "${PYTHON_IMAGE}" or stage.base in recipe.stages
    assert "syntax=" not in DOCKERFILE.read_text(encoding="utf-8").splitlines()[0]


def test_whatever_is_installed_is_locked(recipe: Dockerfile) -> None:
    installs = [
        line
        for stage in recipe.stages.values()
        for each in stage.instructions
        if each.name == "RUN"
        for line in each.text.split("&&")
        if re.search(r"\bpip\b.*\binstall\b", line)
    ]
    assert len(installs) == 6
    for line in installs:
        assert "--no-deps" in line
        assert "--no-compile" in line or "-r build.txt" in line
        if "--no-index" in line:
            continue
        assert "--only-binary :all:" in line
        assert "--require-hashes" in line or line.rstrip().endswith("-r client-torch.txt")


def test_secrets_come_by_mounts_alone(recipe: Dockerfile) -> None:
    for stage in recipe.stages.values():
        for each in stage.instructions:
            if each.name in ("ARG", "ENV"):
                assert not re.search(r"(?i)token|password|secret|credential|index_url", each.text)
            if mount := each.option("mount"):
                assert mount == "type=secret,id=pip,target=/etc/pip.conf,required=false"


def test_what_is_copied_exists(recipe: Dockerfile) -> None:
    for stage in recipe.stages.values():
        for each in stage.instructions:
            if each.name != "COPY":
                continue
            if source := each.option("from"):
                assert source in recipe.stages
                continue
            assert stage.name not in IMAGES  # images take nothing of the context
            for path in each.words[:-1]:
                assert (ROOT / path).exists(), path
                assert in_context(IGNORE, path), path


@pytest.mark.parametrize("target", IMAGES)
def test_images_take_two_folders(recipe: Dockerfile, target: str) -> None:
    copies = [each.text for each in recipe.effective(target) if each.name == "COPY"]
    assert copies == [
        f"--from={target}-packages /opt/secagg /opt/secagg",
        "--from=project /project /opt/secagg",
    ]


def _locked(target: str) -> dict[str, str]:
    text = (ROOT / f"deploy/requirements/{target}.txt").read_text(encoding="utf-8")
    joined = text.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.lstrip().startswith("#")]
    return {line.partition("==")[0].strip(): line for line in lines}


@pytest.mark.parametrize("target", [*IMAGES, "build"])
def test_locks_name_each_file_by_its_hash(target: str) -> None:
    locked = _locked(target)
    assert locked
    for line in locked.values():
        assert re.match(r"[\w.-]+(\[[\w,]+\])?==\S+( ;.*?)?\s+--hash=sha256:[0-9a-f]{64}", line)


@pytest.mark.parametrize(
    ("target", "unwanted"),
    [
        ("server", {"torch", "pandas", "grpcio-tools", "pip", "setuptools", "pytest"}),
        (
            "keyholder",
            {"torch", "pandas", "sqlalchemy", "grpcio-tools", "pip", "setuptools", "pytest"},
        ),
        ("client", {"torch", "sqlalchemy", "grpcio-tools", "pip", "pytest"}),
    ],
)
def test_images_have_no_more_than_they_need(target: str, unwanted: set[str]) -> None:
    assert not unwanted & set(_locked(target))


# What stays out of the builder's sight.


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".env",
        "pip.conf",
        "federation/server/private.key",
        "federation/custodians/passphrase",
        "keyholder.passphrase",
        "kits/clients/client-1/signing.key",
        "data/ml-100k/ratings.csv",
        "runs/latest/model.npz",
        "secagg-data/server/server.sqlite3",
        "build/wheel.whl",
        "tests/conftest.py",
        "deploy/compose.yaml",
        "deploy/kits/server/private.key",
        # Within folders that go in.
        "secagg/kits/server/certificate.pem",
        "secagg/private.key",
        "secagg/.env",
        "secagg/rpc/__pycache__/workers.cpython-311.pyc",
        "client/kit/signing.key",
        "client/secagg_client/secagg-data/client/identity.key",
        "client/secagg_client/federation/authority/federation.json",
        "client/secagg_client/ratings.csv",
        "server/data/server.sqlite3",
        "server/secagg_server/server.sqlite3-wal",
        "server/secagg_server/passphrase.txt",
        "bench/results/check_cost.json",
        "bench/secagg_bench/runs.log",
        "deploy/requirements/pip.conf",
    ],
)
def test_context_is_without(path: str) -> None:
    assert not in_context(IGNORE, path)


def test_context_has_the_code_and_nothing_else() -> None:
    folders = [
        ROOT / path for path in ("secagg", "client", "server", "bench", "deploy/requirements")
    ]
    here = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }
    sent = {path for path in here if in_context(IGNORE, path)}
    odd = {
        path for path in sent if not re.search(r"\.(pyi?|typed|txt|toml|html|css|js|svg)$", path)
    }
    assert not odd
    packages = ("secagg/", "client/secagg_", "server/secagg_", "bench/secagg_")
    code = {path for path in here if path.endswith(".py") and path.startswith(packages)}
    assert code <= sent


# Looking into layers.


def _tar(files: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _image(
    tmp_path: Path,
    *layers: Mapping[str, bytes | tarfile.TarInfo],
    environment: tuple[str, ...] = (),
    base: int = 0,
) -> Image:
    packed = [_tar(layer) for layer in layers]
    digests = [f"sha256:{number}" for number in range(len(packed))]
    config = {"config": {"Env": list(environment)}, "rootfs": {"diff_ids": digests}}
    names = [f"{number}.tar" for number in range(len(packed))]
    files = {
        "manifest.json": json.dumps([{"Config": "config.json", "Layers": names}]).encode(),
        "config.json": json.dumps(config).encode(),
        **dict(zip(names, packed, strict=True)),
    }
    (tmp_path / "image.tar").write_bytes(_tar(files))
    return read(tmp_path / "image.tar", base=frozenset(digests[:base]), canary="the-canary")


SITE = "opt/secagg/lib/python3.11/site-packages"
KEY = b"-----BEGIN PRIVATE KEY-----\n" + b"A" * 64 + b"\n-----END PRIVATE KEY-----\n"
URL = b"postgresql://reader:" + b"hunter2@store.invalid/x"


def _wheel(files: Mapping[str, bytes], name: str = "numpy") -> dict[str, bytes]:
    lines = [
        f"{path},sha256={urlsafe_b64encode(sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for path, data in files.items()
    ]
    info = f"{name}-1.0.dist-info"
    lines.append(f"{info}/RECORD,,")
    found = {f"{SITE}/{path}": data for path, data in files.items()}
    return found | {f"{SITE}/{info}/RECORD": "\n".join(lines).encode()}


@pytest.mark.parametrize(
    "files",
    [
        {"opt/notes.txt": KEY},
        {"opt/notes.txt": b"\x7fELF" + KEY.replace(b"PRIVATE", b"RSA PRIVATE")},
        {"opt/notes.txt": b"index = " + URL},
        {"opt/notes.txt": b"... the-canary ..."},
        {"etc/pip.conf": b""},
        {"root/.netrc": b""},
        {"src/.git/HEAD": b""},
        {"run/secagg/kit/private.key": b""},
        {"run/secagg/kit/enrolment.json": b""},
        {"var/lib/secagg/server.sqlite3": b""},
        {f"{SITE}/secagg/kits/passphrase": b""},
        {"opt/link": b"", "opt/.env": b""},
    ],
)
def test_secrets_are_found_also_where_a_later_layer_hides_them(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    hidden = {
        str(Path(path).with_name(f".wh.{Path(path).name}")): tarfile.TarInfo() for path in files
    }
    image = _image(tmp_path, {"bin/sh": b""}, files, hidden, base=1)
    assert not set(files) & set(image.merged())
    assert len(secrets(image)) == 1


def test_secrets_in_the_configuration_are_found(tmp_path: Path) -> None:
    image = _image(tmp_path, {"bin/sh": b""}, environment=(f"STORE={URL.decode()}",))
    assert secrets(image) == ["configuration: a URL with a password"]


def test_examples_in_published_files_are_no_secrets(tmp_path: Path) -> None:
    wheel = _wheel({"numpy/docs.py": KEY + URL, "numpy/data/test.key": b""})
    wheel |= {f"{SITE}/numpy/__pycache__/docs.cpython-311.pyc": KEY + URL}
    image = _image(tmp_path, wheel)
    assert secrets(image) == []
    assert unaccounted(image) == []


def test_the_projects_own_files_are_not_taken_for_published(tmp_path: Path) -> None:
    image = _image(tmp_path, _wheel({"secagg/kit.py": KEY}, name="secagg"))
    assert len(secrets(image)) == 1


def test_a_changed_file_of_a_wheel_is_nobodys(tmp_path: Path) -> None:
    wheel = _wheel({"numpy/core.py": b"pass", "numpy/other.py": b"pass"})
    wheel[f"{SITE}/numpy/core.py"] = b"import os"
    assert unaccounted(_image(tmp_path, wheel)) == [f"layer 0: {SITE}/numpy/core.py"]


@pytest.mark.parametrize(
    "path",
    [
        "opt/secagg/bin/helper",
        f"{SITE}/numpy/extra.py",
        f"{SITE}/numpy/__pycache__/extra.cpython-311.pyc",
        f"{SITE}/secagg/model.npz",
        "root/notes",
    ],
)
def test_files_that_nobody_brought_are_told(tmp_path: Path, path: str) -> None:
    wheel = _wheel({"numpy/core.py": b"pass"})
    assert unaccounted(_image(tmp_path, wheel | {path: b""})) == [f"layer 0: {path}"]


def test_code_of_the_project_is_accounted_for(tmp_path: Path) -> None:
    files = {
        "opt/secagg/bin/secagg-server": b"",
        "opt/secagg/pyvenv.cfg": b"",
        f"{SITE}/secagg/cli.py": b"",
        f"{SITE}/secagg/__pycache__/cli.cpython-311.pyc": b"",
        f"{SITE}/secagg_server/py.typed": b"",
        f"{SITE}/secagg_server/page/icon.svg": b"",
        "etc/passwd": b"",
    }
    assert unaccounted(_image(tmp_path, files)) == []


def _special(kind: bytes, mode: int, uid: int = 0, capability: bool = False) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.mode, info.uid = kind, mode, uid
    if capability:
        info.pax_headers = {"SCHILY.xattr.security.capability": "x"}
    return info


@pytest.mark.parametrize(
    ("path", "entry"),
    [
        ("bin/su", _special(tarfile.REGTYPE, 0o4755)),
        ("bin/wall", _special(tarfile.REGTYPE, 0o2755)),
        ("bin/ping", _special(tarfile.REGTYPE, 0o755, capability=True)),
        ("dev/sda", _special(tarfile.BLKTYPE, 0o600)),
        ("etc/passwd", _special(tarfile.REGTYPE, 0o666)),
        ("opt/all", _special(tarfile.DIRTYPE, 0o777)),
        ("opt/secagg/bin/secagg", _special(tarfile.REGTYPE, 0o755, uid=10001)),
    ],
)
def test_privileges_are_found_until_they_are_taken_away(
    tmp_path: Path, path: str, entry: tarfile.TarInfo
) -> None:
    assert len(privileged(_image(tmp_path, {path: entry}))) == 1
    harmless = _special(entry.type, 0o755) if entry.type != tarfile.BLKTYPE else None
    above = {path: harmless} if harmless else {"dev/.wh.sda": tarfile.TarInfo()}
    assert privileged(_image(tmp_path, {path: entry}, above)) == []


@pytest.mark.parametrize(
    ("bytecode", "findings"),
    [
        ({}, 1),
        ({"core.cpython-311.pyc": b"head" + bytes(4) + b"time"}, 1),
        ({"core.cpython-311.pyc": b"head" + b"\x03" + bytes(3) + b"hash"}, 1),
        ({"core.cpython-312.pyc": b"head" + b"\x01" + bytes(3) + b"hash"}, 1),
        ({"core.cpython-311.pyc": b"head" + b"\x01" + bytes(3) + b"hash"}, 0),
    ],
    ids=["none", "by time", "checked", "another Python", "good"],
)
def test_bytecode_is_there_and_holds(
    tmp_path: Path, bytecode: dict[str, bytes], findings: int
) -> None:
    files = {f"{SITE}/numpy/__pycache__/{name}": data for name, data in bytecode.items()}
    image = _image(tmp_path, {"usr/lib/x.py": b""}, {f"{SITE}/numpy/core.py": b""} | files, base=1)
    assert len(uncompiled(image)) == findings


def test_a_sticky_folder_for_everybody_is_fine(tmp_path: Path) -> None:
    assert privileged(_image(tmp_path, {"tmp": _special(tarfile.DIRTYPE, 0o1777)})) == []


def test_distributions_are_what_is_left(tmp_path: Path) -> None:
    gone = {f"{SITE}/.wh.pip-24.0.dist-info": tarfile.TarInfo()}
    files = {
        f"{SITE}/pip-24.0.dist-info/METADATA": b"",
        f"{SITE}/dp_accounting-0.6.dist-info/METADATA": b"",
        f"{SITE}/setuptools/_vendor/wheel-0.4.dist-info/METADATA": b"",
    }
    assert distributions(_image(tmp_path, files, gone)) == {"dp-accounting"}


# Looking at processes.

FINE = {
    "Uid": "10001\t10001\t10001\t10001",
    "Gid": "10001\t10001\t10001\t10001",
    "Groups": "10001",
    "CapInh": "0000000000000000",
    "CapPrm": "0000000000000000",
    "CapEff": "0000000000000000",
    "CapBnd": "0000000000000000",
    "CapAmb": "0000000000000000",
    "NoNewPrivs": "1",
    "State": "S (sleeping)",
}


def test_a_process_without_privileges_is_fine() -> None:
    assert locked_down(FINE) == []


@pytest.mark.parametrize(
    "change",
    [
        {"Uid": "10001\t0\t10001\t10001"},
        {"Gid": "0\t0\t0\t0"},
        {"Groups": "0 10001"},
        {"CapBnd": "00000000a80425fb"},
        {"CapEff": "0000000000000001"},
        {"NoNewPrivs": "0"},
        {"State": "Z (zombie)"},
    ],
)
def test_privileges_of_a_process_are_told(change: dict[str, str]) -> None:
    assert len(locked_down(FINE | change)) == 1


def test_whether_a_process_heeds_a_signal() -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        assert heeds(os.getpid(), signal.SIGUSR1)
        for disposition in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGUSR1, disposition)
            assert not heeds(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


# pip elsewhere.


def test_pip_is_told_the_same_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "index" / "simple").mkdir(parents=True)
    (tmp_path / "ca.crt").touch()
    found = {
        "cert": str(tmp_path / "ca.crt"),
        "find-links": f"{tmp_path}/wheels {tmp_path}/nowhere",
        "extra-index-url": f"\nfile://{tmp_path}/index/simple\nhttps://packages.invalid/simple",
        "timeout": "180",
    }
    text = pip_conf(found)
    assert f"extra-index-url = file://{tmp_path}/index/simple https://packages.invalid" in text
    assert folders(found) == [tmp_path]
    del found["cert"]
    assert folders(found) == [tmp_path / "index", tmp_path / "wheels"]


# What was measured.


def test_the_page_has_the_figures_of_the_results() -> None:
    figures = json.loads((ROOT / "bench/results/images.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert f"<!-- images -->\n{markdown(figures)}<!-- /images -->" in page
    assert figures["version"] == PROJECT["version"]
    assert set(figures["images"]) == set(IMAGES)
    assert figures["planted_secrets_found"] >= 4
