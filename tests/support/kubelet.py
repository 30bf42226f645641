"""What a pod finds on a node, without a cluster: Secret volumes as the kubelet lays them out.

A Secret's files belong to root and to the pod's ``fsGroup``, and the group may read them whatever
``defaultMode`` says. Each name is a link through ``..data``, which one rename points at a new set
of files when the Secret has changed. Only root can make this.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["Node", "SecretVolume", "Secrets", "answer"]

Secrets = Mapping[str, Mapping[str, bytes]]
"""Files by name, by the name of their Secret."""


# None but to look into every folder: the interpreter and the test's files may be in root's own.
# That the group may read a Secret has to be told from its mode.
_RIGHTS = ["--no-new-privs"] + [
    f"--{each}=-all,+dac_read_search" for each in ("inh-caps", "ambient-caps", "bounding-set")
]


class SecretVolume:
    """A Secret's volume, and the kubelet that keeps it up to date.

    Args:
        folder: where it is mounted; made here.
        group: the pod's ``fsGroup``.
        mode: of the files, before what ``fsGroup`` adds.
    """

    def __init__(self, folder: Path, group: int, mode: int = 0o400) -> None:
        self.folder = folder
        self._group, self._mode = group, mode
        self._numbers = itertools.count()
        folder.mkdir(parents=True)
        _give(folder, group, 0o3777)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Show these files, all at once, in the place of those before."""
        data = self.folder / "..data"
        old = data.resolve() if data.is_symlink() else None
        new = self.folder / f"..2026_01_01_{next(self._numbers):09}"
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
            _give(new / name, self._group, self._mode | 0o440)
        _give(new, self._group, 0o2755)
        draft = self.folder / "..data_tmp"
        draft.symlink_to(new.name)
        draft.replace(data)
        for name in files:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(Path("..data", name))
        if old is not None:
            shutil.rmtree(old)

    def copy(self, kit: Path) -> None:
        """Show the files of a folder, as `kubectl create secret --from-file` takes them."""
        self.write({file.name: file.read_bytes() for file in kit.iterdir() if file.is_file()})


class Node:
    """Runs the one container of a pod's spec as a process, under a folder in the place of ``/``.

    User, groups, variables, arguments and volumes are the spec's. What is replaced are paths, by
    those below the folder, and addresses, by those of a loopback interface.

    Args:
        folder: of this pod.
        pod: the pod's spec.
        secrets: what is in its Secrets.
        claims: names of volumes that a StatefulSet's claims bring.
    """

    def __init__(
        self, folder: Path, pod: Mapping[str, Any], secrets: Secrets, claims: list[str]
    ) -> None:
        self.folder = folder
        self.secrets: dict[str, SecretVolume] = {}
        self._context = pod["securityContext"]
        (self._container,) = pod["containers"]
        volumes = {each["name"]: each for each in pod["volumes"]} | {
            name: {"emptyDir": {}} for name in claims
        }
        for mount in self._container["volumeMounts"]:
            self._mount(self.path(mount["mountPath"]), volumes[mount["name"]], secrets)

    def path(self, inside: str) -> Path:
        """Where a path of the container is on this machine."""
        return self.folder / inside.lstrip("/")

    def run(
        self,
        program: list[str],
        addresses: Mapping[str, str],
        more: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start the container.

        Args:
            program: in the place of the image's entry point.
            addresses: what goes in the place of addresses among the variables.
            more: variables on top of the spec's.
        """
        variables = {each["name"]: each.get("value", "") for each in self._container["env"]}
        for name, value in variables.items():
            parts = [str(self.path(part)) if part[:1] == "/" else part for part in value.split(",")]
            variables[name] = addresses.get(value, ",".join(parts))
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [*self._as_the_user(), *program, *self._container["args"]],
                env={"PATH": os.environ["PATH"], "HOME": "/", **variables, **(more or {})},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=0o022,
            )

    def _as_the_user(self) -> list[str]:
        user, group, files = (
            str(self._context[name]) for name in ("runAsUser", "runAsGroup", "fsGroup")
        )
        return ["setpriv", "--reuid", user, "--regid", group, "--groups", files, *_RIGHTS]

    def _mount(self, folder: Path, volume: Mapping[str, Any], secrets: Secrets) -> None:
        group = self._context["fsGroup"]
        if "emptyDir" in volume:
            folder.mkdir(parents=True)
            return _give(folder, group, 0o2777)
        source = volume.get("secret") or volume["projected"]
        shown = SecretVolume(folder, group, source["defaultMode"])
        files: dict[str, bytes] = {}
        for each in [{"secret": source}] if "secret" in volume else source["sources"]:
            name = each["secret"].get("secretName") or each["secret"]["name"]
            items = each["secret"].get("items")
            paths = {item["key"]: item["path"] for item in items or ()}
            chosen = {key: data for key, data in secrets[name].items() if not items or key in paths}
            files |= {paths.get(key, key): data for key, data in chosen.items()}
            self.secrets[name] = shown
        shown.write(files)
        return None


def answer(address: str, service: str) -> str:
    """What the kubelet's ``grpc`` probe of a service hears: a status, or why there is none."""
    request = health_pb2.HealthCheckRequest(service=service)
    with grpc.insecure_channel(address) as channel:
        try:
            found = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
        except grpc.RpcError as error:
            code: Callable[[], grpc.StatusCode] = error.code
            return code().name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(found.status))


def _give(path: Path, group: int, mode: int) -> None:
    os.chown(path, 0, group)
    path.chmod(mode)
