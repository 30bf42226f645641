"""The Kubernetes manifests: valid, hardened, open to whom they must be, and true to the code."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubelet import Node, Secrets, answer
from manifests import KUBERNETES, Document, built, kubectl, named, of_kind, rendered
from network_policies import Endpoint, allowed, selects
from pod_security import violations
from ports import free_addresses
from yamllint import linter
from yamllint.config import YamlLintConfig

from secagg.errors import ConfigurationError
from secagg.provision import Federation
from secagg.rpc.lifecycle import GRACE_S, LIVENESS
from secagg.settings import Settings, load, validated
from secagg_keyholder.config import KeyHolderSettings
from secagg_server.config import ServerSettings

VERSIONS = ("1.29.0", "1.37.0")
"""The oldest Kubernetes that has everything we use, and the newest that can be checked."""

PARTIES = ("server", "keyholder")
SETTINGS: dict[str, type[Settings]] = {"server": ServerSettings, "keyholder": KeyHolderSettings}
LISTENERS = {
    "clients": "listen",
    "server": "listen",
    "operators": "admin_listen",
    "probe": "probe_listen",
    "monitor": "monitor_listen",
}
"""Names of container ports, and the settings that open them."""

OF_SERVER = ("postgresql", "monitoring/server")
OF_KEY_HOLDER = ("custodians", "monitoring/keyholder")
CHOICES = {
    "base/server": OF_SERVER,
    "base/keyholder": OF_KEY_HOLDER,
    "overlays/one-cluster": OF_SERVER + OF_KEY_HOLDER,
    "overlays/two-clusters/server": OF_SERVER,
    "overlays/two-clusters/keyholder": OF_KEY_HOLDER,
}
"""What can be applied, and the components that go with it."""

Rendering = Callable[..., list[Document]]


@pytest.fixture(scope="module")
def render(tmp_path_factory: pytest.TempPathFactory) -> Rendering:
    """Documents of an overlay with some components; a copy, to be changed at will."""

    @functools.cache
    def once(overlay: str, components: tuple[str, ...]) -> list[Document]:
        return rendered(tmp_path_factory.mktemp("kustomize") / "it", overlay, components)

    return lambda overlay, *components: copy.deepcopy(once(overlay, components))


def everything(render: Rendering) -> Iterator[list[Document]]:
    """Each overlay, with none and with all of its components."""
    for overlay, components in CHOICES.items():
        yield render(overlay)
        yield render(overlay, *components)


def pod_of(documents: list[Document], party: str) -> Document:
    """The template of a party's pod."""
    found: Document = named(of_kind(documents, "StatefulSet"), f"secagg-{party}")["spec"][
        "template"
    ]
    return found


def container_of(documents: list[Document], party: str) -> Document:
    """The one container of a party's pod."""
    (found,) = pod_of(documents, party)["spec"]["containers"]
    return dict(found)


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Party and template of every pod there is."""
    for each in of_kind(documents, "StatefulSet"):
        yield each["metadata"]["name"].removeprefix("secagg-"), each["spec"]["template"]


def environment(documents: list[Document], party: str) -> dict[str, str]:
    """A container's variables; where a Secret has the value, a word in its place."""
    return {
        each["name"]: each.get("value", "from-a-secret")
        for each in container_of(documents, party)["env"]
    }


def settings_of(documents: list[Document], party: str) -> Settings:
    """What the program makes of its variables.

    Raises:
        ConfigurationError: a setting that it does not have, or a value it refuses.
    """
    kind = SETTINGS[party]
    variables = environment(documents, party)
    names = {name: name.removeprefix(kind.env_prefix).lower() for name in variables}
    assert all(name.startswith(kind.env_prefix) for name in variables)
    return validated(kind, {names[name]: value for name, value in variables.items()})


def port_of(address: str) -> int:
    """The port of ``host:port``."""
    return int(address.rpartition(":")[2])


# What the files are.


def test_every_file_is_tidy_yaml() -> None:
    rules = YamlLintConfig(
        "{extends: default, rules: {line-length: {max: 100}, document-start: disable}}"
    )
    files = sorted(KUBERNETES.rglob("*.yaml"))
    assert len(files) > 20
    problems = [
        f"{file.relative_to(KUBERNETES)}: {problem}"
        for file in files
        for problem in linter.run(file.read_text(encoding="utf-8"), rules)
    ]
    assert problems == []


def test_every_file_is_used_by_a_kustomization() -> None:
    for folder in {file.parent for file in KUBERNETES.rglob("*.yaml")}:
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
        patches = [each["path"] for each in kustomization.get("patches", [])]
        named_files = {"kustomization.yaml", *patches, *kustomization.get("resources", [])}
        assert {file.name for file in folder.glob("*.yaml")} <= named_files


def test_everything_that_can_be_applied_is_looked_at_here() -> None:
    found = {
        str(file.parent.relative_to(KUBERNETES)) for file in KUBERNETES.rglob("kustomization.yaml")
    }
    components = {f"components/{each}" for choice in CHOICES.values() for each in choice}
    # For an hour of need, not to go with anything else.
    assert found == set(CHOICES) | components | {"components/restore"}


def test_components_go_together(render: Rendering) -> None:
    for documents in everything(render):
        keys = [
            (each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"])
            for each in documents
        ]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_is_what_the_api_expects(render: Rendering, version: str) -> None:
    texts = {json.dumps(each) for documents in everything(render) for each in documents}
    assert len(texts) > 20
    for text in texts:
        kubernetes_validate.validate(json.loads(text), version, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "replica"], 1),
        (["spec", "template", "spec", "securityContext", "runAsNonroot"], True),
        (["spec", "template", "spec", "containers", 0, "readinessProbe", "grpc", "port"], "probe"),
        (["spec", "template", "spec", "containers", 0, "volumeMounts", 0, "mountPaths"], "/state"),
        (["spec", "template", "spec", "volumes", 0, "secret", "secretKeyRef"], "kit"),
        (["spec", "selector"], "app.kubernetes.io/name=secagg-server"),
    ],
)
def test_the_schemas_refuse_what_is_misspelt(
    render: Rendering, path: list[Any], value: object
) -> None:
    document = named(of_kind(render("base/server"), "StatefulSet"), "secagg-server")
    functools.reduce(lambda inner, key: inner[key], path[:-1], document)[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


def test_everything_is_in_the_namespace_of_its_party(render: Rendering) -> None:
    for documents in everything(render):
        for document in documents:
            party = document["metadata"].get("labels", {}).get("app.kubernetes.io/component")
            if document["kind"] == "Namespace":
                assert document["metadata"]["name"] == f"secagg-{party}"
            else:
                namespace = document["metadata"]["namespace"]
                assert namespace in {f"secagg-{each}" for each in ([party] if party else PARTIES)}


# How the pods run.


def test_pods_conform_to_the_restricted_profile_that_their_namespace_enforces(
    render: Rendering,
) -> None:
    for documents in everything(render):
        for _, pod in pods(documents):
            assert violations(pod["spec"]) == []
        for namespace in of_kind(documents, "Namespace"):
            labels = namespace["metadata"]["labels"]
            assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hostNetwork", True),
        ("hostPID", True),
        ("hostIPC", True),
        ("volumes/0", {"name": "kit", "hostPath": {"path": "/etc"}}),
        ("volumes/0", {"name": "kit", "nfs": {"server": "nfs", "path": "/"}}),
        ("volumes/0", {"name": "kit"}),
        ("securityContext/runAsNonRoot", False),
        ("securityContext/runAsNonRoot", None),
        ("securityContext/runAsUser", 0),
        ("securityContext/seccompProfile", {}),
        ("securityContext/seccompProfile", {"type": "Unconfined"}),
        ("securityContext/sysctls", [{"name": "kernel.msgmax", "value": "1"}]),
        ("securityContext/seLinuxOptions", {"type": "spc_t"}),
        ("securityContext/appArmorProfile", {"type": "Unconfined"}),
        ("containers/0/securityContext/privileged", True),
        ("containers/0/securityContext/procMount", "Unmasked"),
        ("containers/0/securityContext/runAsUser", 0),
        ("containers/0/securityContext/runAsNonRoot", False),
        ("containers/0/securityContext/allowPrivilegeEscalation", True),
        ("containers/0/securityContext/allowPrivilegeEscalation", None),
        ("containers/0/securityContext/capabilities", {}),
        ("containers/0/securityContext/capabilities/drop", ["NET_RAW"]),
        ("containers/0/securityContext/capabilities/add", ["SYS_ADMIN"]),
        ("containers/0/securityContext/seccompProfile", {"type": "Unconfined"}),
        ("containers/0/ports/0/hostPort", 7400),
        ("containers/0/livenessProbe", {"httpGet": {"host": "192.0.2.1", "port": 80}}),
        ("containers/0/lifecycle", {"preStop": {"tcpSocket": {"host": "192.0.2.1", "port": 1}}}),
        ("initContainers", [{"name": "first"}]),
    ],
)
def test_what_the_restricted_profile_forbids_is_noticed(
    render: Rendering, path: str, value: object
) -> None:
    pod = pod_of(render("base/server"), "server")["spec"]
    assert violations(pod) == []
    *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    functools.reduce(lambda inner, key: inner[key], way, pod)[last] = value
    assert violations(pod)


def test_containers_write_to_their_volumes_alone(render: Rendering) -> None:
    for documents in everything(render):
        for _, pod in pods(documents):
            (container,) = pod["spec"]["containers"]
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            kinds = {each["name"]: set(each) - {"name"} for each in pod["spec"]["volumes"]}
            for mount in container["volumeMounts"]:
                of_secrets = kinds.get(mount["name"], set()) & {"secret", "projected"}
                assert mount.get("readOnly", False) == bool(of_secrets)
                # A file that is mounted by itself never follows its Secret.
                assert "subPath" not in mount


def test_pods_have_nothing_to_say_to_the_cluster(render: Rendering) -> None:
    for documents in everything(render):
        assert not [each for each in documents if "Role" in each["kind"]]
        for party, pod in pods(documents):
            account = named(of_kind(documents, "ServiceAccount"), f"secagg-{party}")
            assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"]
            assert account["automountServiceAccountToken"] is False
            assert pod["spec"]["automountServiceAccountToken"] is False


def test_there_is_one_writer(render: Rendering) -> None:
    for documents in everything(render):
        for each in of_kind(documents, "StatefulSet"):
            assert each["spec"]["replicas"] == 1
            (claim,) = each["spec"]["volumeClaimTemplates"]
            assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
            kept = each["spec"]["persistentVolumeClaimRetentionPolicy"]
            assert set(kept.values()) == {"Retain"}
        assert {each["kind"] for each in documents}.isdisjoint({"Deployment", "DaemonSet"})


def test_memory_is_bounded_and_asked_for(render: Rendering) -> None:
    for documents in everything(render):
        for _, pod in pods(documents):
            (container,) = pod["spec"]["containers"]
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert {"memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
            for volume in pod["spec"]["volumes"]:
                assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"]


def test_the_key_holder_is_never_on_a_node_with_a_server(render: Rendering) -> None:
    documents = render("overlays/one-cluster")
    affinity = pod_of(documents, "keyholder")["spec"]["affinity"]["podAntiAffinity"]
    (rule,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert rule["namespaceSelector"] == {}
    server, key_holder = (pod_of(documents, each)["metadata"]["labels"] for each in PARTIES)
    assert selects(rule["labelSelector"], server)
    # Else it could never start.
    assert not selects(rule["labelSelector"], key_holder)


def test_round_keys_are_in_memory_and_the_volume_has_none(render: Rendering) -> None:
    for overlay in ("base/keyholder", "overlays/two-clusters/keyholder"):
        documents = render(overlay)
        settings = settings_of(documents, "keyholder")
        assert isinstance(settings, KeyHolderSettings)
        pod = pod_of(documents, "keyholder")["spec"]
        mounts = {Path(each["mountPath"]): each["name"] for each in mounted(pod)}
        # The folder itself is for its owner alone; the root of a volume is open to its group.
        volume = named(pod["volumes"], mounts[settings.round_keys.parent])
        assert volume["emptyDir"]["medium"] == "Memory"
        assert not settings.round_keys.is_relative_to(settings.state_dir)


def mounted(pod: Document) -> list[Document]:
    """Where the volumes of a pod's one container are."""
    (container,) = pod["containers"]
    return list(container["volumeMounts"])


def test_volumes_with_files_of_mode_0600_are_not_opened_to_the_group(render: Rendering) -> None:
    for documents in everything(render):
        for _, pod in pods(documents):
            context = pod["spec"]["securityContext"]
            assert context["fsGroupChangePolicy"] == "OnRootMismatch"
            assert context["fsGroup"] == context["runAsGroup"] == context["runAsUser"] == 10001


# True to the code.


def test_images_are_of_this_version(render: Rendering) -> None:
    version = importlib.metadata.version("secagg")
    assert version != "latest"
    for documents in everything(render):
        for party, pod in pods(documents):
            (container,) = pod["spec"]["containers"]
            assert container["image"] == f"secagg-{party}:{version}"


def test_variables_are_settings_with_values_that_they_take(render: Rendering) -> None:
    for documents in everything(render):
        for party, pod in pods(documents):
            settings = settings_of(documents, party)
            for name, value in environment(documents, party).items():
                setting = name.removeprefix(settings.env_prefix).lower()
                assert str(value) in (str(getattr(settings, setting)), "true", "from-a-secret") or (
                    setting == "share_files"
                )
            folders = [Path(each["mountPath"]) for each in mounted(pod["spec"])]
            for path in filter(None, paths(settings)):
                assert any(path.is_relative_to(folder) for folder in folders), path


def paths(settings: Settings) -> Iterator[Path | None]:
    """Every file and folder that a program is told of."""
    for value in settings.model_dump(exclude_unset=True).values():
        yield from (
            each
            for each in (value if isinstance(value, list) else [value])
            if isinstance(each, Path)
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SECAGG_SERVER_LISTENS", "0.0.0.0:7400"),
        ("SECAGG_SERVER_PORT", "tcp://10.0.0.1:7400"),
        ("SECAGG_SERVER_MIN_CLIENTS", "two"),
    ],
)
def test_variables_that_are_no_settings_are_noticed(
    render: Rendering, name: str, value: str
) -> None:
    documents = render("base/server")
    pod_of(documents, "server")["spec"]["containers"][0]["env"].append(
        {"name": name, "value": value}
    )
    with pytest.raises(ConfigurationError):
        settings_of(documents, "server")


def test_services_put_no_variables_into_pods_where_they_would_be_taken_for_settings(
    render: Rendering, monkeypatch: pytest.MonkeyPatch
) -> None:
    for documents in everything(render):
        for _, pod in pods(documents):
            assert pod["spec"]["enableServiceLinks"] is False
    # What they would do.
    monkeypatch.setenv("SECAGG_SERVER_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ConfigurationError, match="service_host"):
        load(ServerSettings, None, {})


def test_ports_are_those_of_the_settings_and_of_the_services(render: Rendering) -> None:
    for documents in everything(render):
        for party, pod in pods(documents):
            settings = settings_of(documents, party)
            (container,) = pod["spec"]["containers"]
            ports = {each["name"]: each["containerPort"] for each in container["ports"]}
            listening = {
                name: port_of(value)
                for name, value in settings.model_dump(exclude_unset=True).items()
                if name in LISTENERS.values()
            }
            assert {LISTENERS[name]: port for name, port in ports.items()} == listening
            services = [
                each
                for each in of_kind(documents, "Service")
                if each["metadata"]["namespace"] == f"secagg-{party}"
            ]
            for service in services:
                assert selects(
                    {"matchLabels": service["spec"]["selector"]}, pod["metadata"]["labels"]
                )
                for port in service["spec"]["ports"]:
                    assert ports[port["targetPort"]] == port["port"]
            # Probes are for the node alone, which needs no Service.
            served = {port["targetPort"] for each in services for port in each["spec"]["ports"]}
            assert served == set(ports) - {"probe"}


def test_the_server_dials_the_service_of_the_key_holder(render: Rendering) -> None:
    documents = render("overlays/one-cluster")
    settings = settings_of(documents, "server")
    assert isinstance(settings, ServerSettings)
    host, _, port = settings.key_holder.rpartition(":")
    service = named(of_kind(documents, "Service"), "secagg-keyholder")
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    assert host == f"{name}.{namespace}.svc"
    assert int(port) == service["spec"]["ports"][0]["port"]


def test_probes_ask_the_listener_made_for_them_for_services_that_are_served(
    render: Rendering,
) -> None:
    for documents in everything(render):
        for party, pod in pods(documents):
            settings: Any = settings_of(documents, party)
            (container,) = pod["spec"]["containers"]
            probes = {
                kind: container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")
            }
            assert {each["grpc"]["port"] for each in probes.values()} == {
                port_of(settings.probe_listen)
            }
            asked = {kind: each["grpc"].get("service", "") for kind, each in probes.items()}
            # Restarted for being stuck, never for waiting for the other party.
            assert asked == {"startup": LIVENESS, "liveness": LIVENESS, "readiness": ""}


def test_a_restore_has_what_the_key_holder_has_and_nothing_that_runs(render: Rendering) -> None:
    awake, asleep = render("base/keyholder"), render("base/keyholder", "restore")
    container = container_of(asleep, "keyholder")
    assert container["command"] == ["sleep", "infinity"]
    changed = {"command", "args", "startupProbe", "livenessProbe", "readinessProbe"}
    assert changed & set(container) == {"command"}
    kept = {key: value for key, value in container.items() if key not in changed}
    assert kept.items() <= container_of(awake, "keyholder").items()
    (pods_set,) = of_kind(asleep, "StatefulSet")
    kubernetes_validate.validate(pods_set, VERSIONS[-1], strict=True)
    for documents in (awake, asleep):
        del pod_of(documents, "keyholder")["spec"]["containers"]
    assert awake == asleep


def test_there_is_time_to_drain(render: Rendering) -> None:
    for documents in everything(render):
        for party, pod in pods(documents):
            listeners = len([each for each in environment(documents, party) if "LISTEN" in each])
            # One after the other, and as long again for the disk.
            assert pod["spec"]["terminationGracePeriodSeconds"] >= 2 * GRACE_S * listeners


def test_budgets_are_for_the_pods(render: Rendering) -> None:
    for documents in everything(render):
        for party, pod in pods(documents):
            budget = named(of_kind(documents, "PodDisruptionBudget"), f"secagg-{party}")
            assert budget["metadata"]["namespace"] == f"secagg-{party}"
            assert selects(budget["spec"]["selector"], pod["metadata"]["labels"])
            # One that is broken must not stop the upgrade of a node.
            assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


# Whose secrets.

SECRETS = {
    "server": {"secagg-server-kit", "secagg-server-database"},
    "keyholder": {
        *("secagg-keyholder-kit", "secagg-keyholder-passphrase"),
        *(f"secagg-keyholder-share-{letter}" for letter in "abc"),
    },
}


def secrets_in(node: object) -> Iterator[str]:
    """The names of Secrets anywhere in a pod's spec."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "secret":
                yield value.get("secretName") or value["name"]
            elif key in ("secretKeyRef", "secretRef"):
                yield value["name"]
            yield from secrets_in(value)
    elif isinstance(node, list):
        for each in node:
            yield from secrets_in(each)


def test_each_secret_is_mounted_by_the_party_that_owns_it(render: Rendering) -> None:
    for documents in everything(render):
        assert not of_kind(documents, "Secret")
        for party, pod in pods(documents):
            assert set(secrets_in(pod["spec"])) <= SECRETS[party]
    assert SECRETS["server"].isdisjoint(SECRETS["keyholder"])


def test_what_unseals_the_key_holder_is_either_the_passphrase_or_shares(render: Rendering) -> None:
    for components in ((), ("custodians",)):
        documents = render("base/keyholder", *components)
        settings = settings_of(documents, "keyholder")
        assert isinstance(settings, KeyHolderSettings)
        pod = pod_of(documents, "keyholder")["spec"]
        files = settings.share_files or [settings.passphrase_file]
        assert (settings.passphrase_file is None) == bool(components)
        (folder,) = {each.parent for each in files if each}
        (mount,) = (each for each in mounted(pod) if each["mountPath"] == str(folder))
        volume = named(pod["volumes"], mount["name"])
        # Apart from the kit that it opens.
        assert "secagg-keyholder-kit" not in set(secrets_in(volume))
        if components:
            sources = volume["projected"]["sources"]
            given = [item["path"] for each in sources for item in each["secret"]["items"]]
            assert given == [each.name for each in files if each]


def test_files_of_secrets_are_for_their_reader_alone(render: Rendering) -> None:
    for documents in everything(render):
        for _, pod in pods(documents):
            for volume in pod["spec"]["volumes"]:
                source = volume.get("secret") or volume.get("projected")
                assert source is None or source["defaultMode"] == 0o400


# Who reaches whom.

OURS = {"server": "secagg-server", "keyholder": "secagg-keyholder"}
PORTS = (22, 53, 80, 443, 5432, 6443, *range(7400, 7407), 9090)
WAYS = [*((port, "TCP") for port in PORTS), (53, "UDP"), (443, "UDP"), (7402, "UDP")]
SERVER, KEY_HOLDER = "the server", "the key holder"


def world(documents: list[Document]) -> list[Endpoint]:
    """Our pods as they are labelled, pods that only claim to be, and whoever else there is."""
    own = {
        party: (dict(pod["metadata"]["labels"]), container_of(documents, party)["ports"])
        for party, pod in pods(documents)
    }

    def ours(name: str, address: str, party: str) -> list[Endpoint]:
        if party not in own:
            return []
        labels, ports = own[party]
        numbers = {each["name"]: each["containerPort"] for each in ports}
        return [Endpoint(name, address, OURS[party], labels, numbers)]

    def pod(name: str, address: str, namespace: str, app: str = "") -> Endpoint:
        return Endpoint(name, address, namespace, {"app.kubernetes.io/name": app} if app else {})

    return [
        *ours(SERVER, "10.1.0.1", "server"),
        *ours(KEY_HOLDER, "10.1.0.2", "keyholder"),
        pod("an operator", "10.1.0.3", "secagg-server", "secagg-operator"),
        pod("a stranger beside the server", "10.1.0.4", "secagg-server"),
        pod("a stranger beside the key holder", "10.1.0.5", "secagg-keyholder"),
        pod("an operator beside the key holder", "10.1.0.6", "secagg-keyholder", "secagg-operator"),
        pod("a server beside the key holder", "10.1.0.7", "secagg-keyholder", "secagg-server"),
        pod("a server elsewhere", "10.1.0.8", "default", "secagg-server"),
        pod("an operator elsewhere", "10.1.0.9", "default", "secagg-operator"),
        pod("a key holder elsewhere", "10.1.0.10", "default", "secagg-keyholder"),
        pod("a client in the cluster", "10.1.0.11", "default", "secagg-client"),
        pod("Prometheus", "10.1.0.12", "monitoring", "prometheus"),
        pod("Grafana", "10.1.0.13", "monitoring", "grafana"),
        pod("Prometheus elsewhere", "10.1.0.14", "default", "prometheus"),
        Endpoint("DNS", "10.1.0.15", "kube-system", {"k8s-app": "kube-dns"}),
        pod("the API's proxy", "10.1.0.16", "kube-system", "kube-proxy"),
        pod("the database", "10.1.0.17", "postgresql", "postgresql"),
        pod("another database", "10.1.0.18", "default", "postgresql"),
        Endpoint("a client", "203.0.113.7"),
        Endpoint("the other cluster's server", "192.0.2.10"),
        Endpoint("the other cluster's neighbour", "192.0.2.11"),
        Endpoint("the other cluster's key holder", "198.51.100.20"),
        Endpoint("the other key holder's neighbour", "198.51.100.21"),
        Endpoint("the node's metadata", "169.254.169.254"),
        Endpoint("an address far away", "2001:db8::1"),
    ]


Connection = tuple[str, str, int, str]


def reached(documents: list[Document]) -> tuple[set[Connection], int]:
    """The connections that policies allow from or to our namespaces, and how many they deny."""
    policies, everybody = of_kind(documents, "NetworkPolicy"), world(documents)
    namespaces = {each["metadata"]["name"] for each in of_kind(documents, "Namespace")}
    found, denied = set(), 0
    for source, target in itertools.permutations(everybody, 2):
        if not {source.namespace, target.namespace} & namespaces:
            continue
        for port, protocol in WAYS:
            if allowed(policies, source, target, port, protocol):
                found.add((source.name, target.name, port, protocol))
            else:
                denied += 1
    return found, denied


def free_to_call(documents: list[Document]) -> set[str]:
    """Everybody who is in none of our namespaces, and so has no policy of ours."""
    namespaces = {each["metadata"]["name"] for each in of_kind(documents, "Namespace")}
    return {each.name for each in world(documents) if each.namespace not in namespaces}


def of_the_server(documents: list[Document]) -> set[Connection]:
    """What the server's policies are for, but for the way to the key holder."""
    return {
        *((who, SERVER, 7400, "TCP") for who in free_to_call(documents)),
        ("an operator", SERVER, 7401, "TCP"),
        *((who, "DNS", 53, how) for who in (SERVER, "an operator") for how in ("TCP", "UDP")),
    }


def test_in_one_cluster_nobody_reaches_more_than_they_must(render: Rendering) -> None:
    documents = render("overlays/one-cluster")
    found, denied = reached(documents)
    assert found == of_the_server(documents) | {(SERVER, KEY_HOLDER, 7402, "TCP")}
    assert denied > 100 * len(found)


def test_the_key_holder_hears_the_server_alone_and_calls_nobody(render: Rendering) -> None:
    for components in ((), CHOICES["overlays/one-cluster"]):
        found, _ = reached(render("overlays/one-cluster", *components))
        assert {each for each in found if each[0] == KEY_HOLDER} == set()
        callers = {(who, port) for who, whom, port, _ in found if whom == KEY_HOLDER}
        assert callers - {("Prometheus", 7404)} == {(SERVER, 7402)}


def test_each_component_adds_its_connection_and_no_other(render: Rendering) -> None:
    plain, _ = reached(render("overlays/one-cluster"))
    added = {
        "postgresql": {(SERVER, "the database", 5432, "TCP")},
        "monitoring/server": {("Prometheus", SERVER, 7403, "TCP")},
        "monitoring/keyholder": {("Prometheus", KEY_HOLDER, 7404, "TCP")},
        "custodians": set(),
    }
    assert set(added) == set(CHOICES["overlays/one-cluster"])
    for component, connections in added.items():
        found, _ = reached(render("overlays/one-cluster", component))
        assert found - plain == connections
        assert plain <= found


def test_the_server_of_two_clusters_calls_the_one_address(render: Rendering) -> None:
    documents = render("overlays/two-clusters/server")
    found, _ = reached(documents)
    way = (SERVER, "the other cluster's key holder", 7402, "TCP")
    assert found == of_the_server(documents) | {way}


def test_the_key_holder_of_two_clusters_hears_the_one_address(render: Rendering) -> None:
    found, _ = reached(render("overlays/two-clusters/keyholder"))
    assert found == {("the other cluster's server", KEY_HOLDER, 7402, "TCP")}


@pytest.mark.parametrize("removed", ["secagg-server", "secagg-keyholder"])
def test_a_namespace_without_its_default_is_noticed(render: Rendering, removed: str) -> None:
    documents = render("overlays/one-cluster")
    before, _ = reached(documents)
    kept = [
        each
        for each in documents
        if (each["metadata"]["name"], each["metadata"].get("namespace"))
        != ("default-deny", removed)
    ]
    assert len(kept) == len(documents) - 1
    after, _ = reached(kept)
    assert before < after
    # Without it the key holder could tell anybody what it knows.
    if removed == "secagg-keyholder":
        assert (KEY_HOLDER, "a client", 443, "TCP") in after


@pytest.mark.parametrize(
    ("namespace", "name", "path", "value", "gained"),
    [
        (
            "keyholder",
            "from-server",
            "ingress/0/from/0/podSelector",
            {},
            "a stranger beside the server",
        ),
        (
            "keyholder",
            "from-server",
            "ingress/0/from/0/namespaceSelector",
            {},
            "a server elsewhere",
        ),
        ("keyholder", "from-server", "ingress/0/from", [], "a client"),
        ("keyholder", "from-server", "ingress/0/ports", [], SERVER),
        ("keyholder", "from-server", "ingress/0/ports/0/endPort", 7406, SERVER),
        ("keyholder", "from-server", "egress", [{}], KEY_HOLDER),
        ("server", "from-operators", "ingress/0/from", None, "a client"),
        (
            "server",
            "from-operators",
            "ingress/0/from/0/namespaceSelector",
            {},
            "an operator elsewhere",
        ),
        ("server", "from-clients", "ingress/0/ports", None, "a client"),
        ("server", "to-key-holder", "egress/0/to/0/podSelector", {}, SERVER),
        ("server", "to-dns", "egress/0/to", None, SERVER),
        ("server", "to-dns", "podSelector", {}, "a stranger beside the server"),
    ],
)
def test_a_policy_that_is_wider_than_it_was_is_noticed(
    render: Rendering, namespace: str, name: str, path: str, value: object, gained: str
) -> None:
    documents = half_open(render, namespace)
    before, _ = reached(documents)
    spec = policy(documents, name, namespace)
    if path == "egress":
        spec["policyTypes"] = ["Ingress", "Egress"]
    *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    functools.reduce(lambda inner, key: inner[key], way, spec)[last] = value
    after, _ = reached(documents)
    assert gained in {who for who, *_ in after - before}


def half_open(render: Rendering, namespace: str) -> list[Document]:
    """Everything is allowed in the other namespace: a connection takes the rules of both sides."""
    documents = render("overlays/one-cluster")
    (other,) = set(OURS) - {namespace}
    policy(documents, "default-deny", other).update(ingress=[{}], egress=[{}])
    return documents


def policy(documents: list[Document], name: str, party: str) -> Document:
    """What a policy of a party's namespace says."""
    own = [
        each
        for each in of_kind(documents, "NetworkPolicy")
        if each["metadata"]["namespace"] == OURS[party]
    ]
    found: Document = named(own, name)["spec"]
    return found


@pytest.mark.parametrize(
    "change",
    [
        {"podselector": {}},
        {"podSelector": {"matchLabel": {}}},
        {"ingress": [{"form": []}]},
        {"ingress": [{"from": [{"podSelectors": {}}]}]},
        {"ingress": [{"ports": [{"ports": 7400}]}]},
    ],
)
def test_the_evaluator_refuses_what_it_does_not_know(change: Document) -> None:
    spec: Document = {"podSelector": {}} | change
    typo = {"metadata": {"name": "typo", "namespace": "here"}, "spec": spec}
    pod = Endpoint("a pod", "10.1.0.1", "here")
    with pytest.raises(ValueError, match="expected"):
        allowed([typo], Endpoint("a client", "203.0.113.7"), pod, 7400)


def test_the_evaluator_reads_policies_as_the_standard_does() -> None:
    there = Endpoint("there", "10.2.0.1", "there", {"app": "a"})
    here = Endpoint("here", "10.1.0.1", "here", {"app": "b"}, {"web": 8080})
    outside = Endpoint("outside", "203.0.113.7")

    def ways(spec: Document, source: Endpoint, target: Endpoint) -> set[int]:
        policies = [{"metadata": {"name": "it", "namespace": "here"}, "spec": spec}]
        return {port for port in (80, 8080, 8081) if allowed(policies, source, target, port)}

    every = {80, 8080, 8081}
    # No policy selects the pod; then one does, for the directions it names and no other.
    assert ways({"podSelector": {"matchLabels": {"app": "c"}}}, there, here) == every
    assert ways({"podSelector": {}}, there, here) == set()
    assert ways({"podSelector": {}}, here, there) == every
    assert ways({"podSelector": {}, "egress": []}, here, there) == set()
    assert ways({"podSelector": {}, "policyTypes": ["Egress"]}, there, here) == every
    # Peers: of this namespace, of one, of one and with a label, by address.
    by: Callable[..., Document] = lambda *peers, **rule: {  # noqa: E731
        "podSelector": {},
        "ingress": [{"from": list(peers), **rule}],
    }
    assert ways(by({"podSelector": {}}), there, here) == set()
    assert ways(by({"namespaceSelector": {}}), there, here) == every
    wrong = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "b"}}}
    assert ways(by(wrong), there, here) == set()
    # Two peers are alternatives; two selectors in one peer hold together.
    assert ways(by({"namespaceSelector": {}}, {"podSelector": {}}), there, here) == every
    block = {"ipBlock": {"cidr": "203.0.113.0/24", "except": ["203.0.113.8/29"]}}
    assert ways(by(block), outside, here) == every
    assert ways(by(block), Endpoint("excepted", "203.0.113.9"), here) == set()
    assert ways(by({"namespaceSelector": {}}), outside, here) == set()
    # Ports: by name, as a range, of another protocol.
    assert ways(by(ports=[{"port": "web"}]), outside, here) == {8080}
    assert ways(by(ports=[{"port": 8080, "endPort": 8081}]), outside, here) == {8080, 8081}
    assert ways(by(ports=[{"port": 80, "protocol": "UDP"}]), outside, here) == set()
    # Expressions.
    among = {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["b"]}]}
    assert ways({"podSelector": among}, there, here) == every
    exists = {"matchExpressions": [{"key": "app", "operator": "Exists"}]}
    assert ways({"podSelector": exists}, there, here) == set()


# As the page says.


def section() -> str:
    """What docs/deploy.md says of Kubernetes."""
    page = (KUBERNETES.parents[1] / "docs" / "deploy.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^## Kubernetes$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_commands_on_the_page_make_the_secrets_that_the_pods_mount(
    render: Rendering, tmp_path: Path
) -> None:
    commands = re.findall(r"^\$ (.*)$", section(), re.MULTILINE)
    init = next(shlex.split(each) for each in commands if each.startswith("secagg provision init"))
    hosts = [value for option, value in itertools.pairwise(init) if option == "--key-holder-host"]
    federation = Federation.create(tmp_path / "federation", key_holder_hosts=hosts)
    (tmp_path / "share-1.txt").write_text("a share", encoding="utf-8")
    made_here: dict[str, Document] = {}
    for command in (each for each in commands if each.startswith("kubectl create secret")):
        client = shlex.split(command.partition(" | ")[0].partition(" --dry-run")[0])[1:]
        done = subprocess.run(
            [kubectl(), *client, "--dry-run=client", "--output", "yaml"],
            cwd=tmp_path,
            env=os.environ | {"KUBECONFIG": os.devnull},
            capture_output=True,
            text=True,
            check=True,
        )
        secret = yaml.safe_load(done.stdout)
        kubernetes_validate.validate(secret, VERSIONS[-1], strict=True)
        made_here[secret["metadata"]["name"]] = secret
    for party in PARTIES:
        mounted_there = set(secrets_in(pod_of(render("overlays/one-cluster"), party)["spec"]))
        assert mounted_there <= set(made_here)
        for name in mounted_there:
            assert made_here[name]["metadata"]["namespace"] == OURS[party]
    kit = made_here["secagg-keyholder-kit"]["data"]
    assert set(kit) == {file.name for file in federation.kit("key-holder").iterdir()}
    assert set(made_here["secagg-keyholder-passphrase"]["data"]) == {"passphrase"}
    share = made_here["secagg-keyholder-share-a"]
    assert set(share["data"]) == {"share"}
    # The name that the server dials is one of the certificate's, or TLS would refuse it.
    dialled = environment(render("overlays/one-cluster"), "server")["SECAGG_SERVER_KEY_HOLDER"]
    assert dialled.rpartition(":")[0] in hosts


def test_the_overlay_on_the_page_can_be_rendered(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", section(), re.DOTALL)
    overlay = yaml.safe_load(text)
    for key in ("resources", "components"):
        overlay[key] = [
            os.path.relpath(
                KUBERNETES.parents[1] / each.removeprefix("secagg/"), tmp_path.resolve()
            )
            for each in overlay[key]
        ]
    documents = built(tmp_path, overlay)
    assert container_of(documents, "server")["image"].startswith("registry.example.org/secagg-")
    settings = settings_of(documents, "keyholder")
    assert isinstance(settings, KeyHolderSettings)
    assert settings.policy.require_privacy
    assert settings.share_files
    assert named(of_kind(documents, "Service"), "secagg-server")["spec"]["type"] == "LoadBalancer"
    for document in documents:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


def test_the_addresses_on_the_page_are_those_of_services(render: Rendering) -> None:
    documents = render("overlays/one-cluster", *CHOICES["overlays/one-cluster"])
    services = {
        f"{each['metadata']['name']}.{each['metadata']['namespace']}.svc": {
            port["port"] for port in each["spec"]["ports"]
        }
        for each in of_kind(documents, "Service")
    }
    told = re.findall(r"([\w-]+\.[\w-]+\.svc)\b(?::(\d+))?", section())
    assert len({name for name, _ in told}) >= 4
    for name, port in told:
        assert name in services
        assert not port or int(port) in services[name]


def test_the_table_on_the_page_has_the_ports_that_are_open(render: Rendering) -> None:
    (table,) = re.findall(
        r"^\| from \| to \| port \|\n(.*?)\n\n", section(), re.MULTILINE | re.DOTALL
    )
    told = {int(port) for row in table.splitlines()[1:] for port in re.findall(r"\d+", row)}
    found, _ = reached(render("overlays/one-cluster", *CHOICES["overlays/one-cluster"]))
    assert told == {port for _, _, port, _ in found}


# As processes, with what a pod has: user, variables, volumes, probes.

USER = 10001
START_S = 60


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder for pods; skips the test where they cannot be run as the kubelet would."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv, to run as another user with Secrets of a group")
    return tmp_path


def made(folder: Path) -> tuple[Federation, Secrets]:
    """A federation, and what its Secrets hold."""
    federation = Federation.create(folder, clients=["alice"], custodians=None)
    files = {
        "secagg-server-kit": federation.kit("server"),
        "secagg-keyholder-kit": federation.kit("key-holder"),
        "secagg-keyholder-passphrase": folder / "custodians",
    }
    return federation, {name: kit_files(kit) for name, kit in files.items()}


def kit_files(folder: Path) -> dict[str, bytes]:
    """The files of a kit."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def claims(documents: list[Document], party: str) -> list[str]:
    """The volumes that come from claims."""
    spec = named(of_kind(documents, "StatefulSet"), f"secagg-{party}")["spec"]
    return [each["metadata"]["name"] for each in spec["volumeClaimTemplates"]]


def program(party: str) -> list[str]:
    """What stands for the entry point of an image."""
    return [sys.executable, "-m", f"secagg_{party}.cli"]


def until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Wait, but not for ever."""
    give_up_at = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < give_up_at, what()
        time.sleep(0.1)


@pytest.mark.slow
def test_both_pods_start_answer_their_probes_and_follow_their_secrets(
    render: Rendering, node: Path
) -> None:
    documents = render("overlays/one-cluster")
    federation, secrets = made(node / "federation")
    ports = dict(zip((7400, 7401, 7402, 7403, 7404, 7405, 7406), free_addresses(7), strict=True))
    addresses = {f"0.0.0.0:{port}": address for port, address in ports.items()}
    addresses[environment(documents, "server")["SECAGG_SERVER_KEY_HOLDER"]] = ports[7402]
    pods_ = {
        party: Node(
            node / party, pod_of(documents, party)["spec"], secrets, claims(documents, party)
        )
        for party in PARTIES
    }
    running: dict[str, subprocess.Popen[bytes]] = {}

    def probe(party: str, kind: str) -> str:
        asked = container_of(documents, party)[f"{kind}Probe"]["grpc"]
        return answer(ports[asked["port"]], asked.get("service", ""))

    def expect(party: str, kind: str, status: str) -> None:
        log = node / party / "log"
        until(lambda: probe(party, kind) == status, lambda: log.read_text(encoding="utf-8"))

    def start(party: str) -> None:
        monitor = {f"SECAGG_{party.upper()}_MONITOR_LISTEN": "off"}
        running[party] = pods_[party].run(program(party), addresses, monitor)

    with contextlib.ExitStack() as stack:
        for party in PARTIES:
            start(party)
            stack.enter_context(running[party])
            stack.callback(running[party].kill)
            expect(party, "startup", "SERVING")
            if party == "server":
                # Alone it lives, and is of no use to anybody.
                assert probe(party, "readiness") == "NOT_SERVING"
                assert probe(party, "liveness") == "SERVING"
        for party in PARTIES:
            expect(party, "readiness", "SERVING")
        # Nothing else is served there, and where it is, a certificate is asked for.
        assert answer(ports[7405], "no such service") == "NOT_FOUND"
        for port in (7400, 7401, 7402):
            assert answer(ports[port], "") == "UNAVAILABLE"
        # The Secret changes: a list that the authority has not signed, then one that it has.
        federation.enrol("bob")
        good = kit_files(federation.kit("server"))
        kit = pods_["server"].secrets["secagg-server-kit"]
        kit.write(good | {"enrolment.json": good["enrolment.json"][:-9]})
        expect("server", "readiness", "NOT_SERVING")
        assert probe("server", "liveness") == "SERVING"
        kit.write(good)
        expect("server", "readiness", "SERVING")
        # What is kept is for the pod's user alone, round keys in a folder of their own.
        for party in PARTIES:
            for file in pods_[party].path("/var/lib/secagg").rglob("*.key"):
                assert file.stat().st_mode & 0o777 == 0o600
        open_rounds = pods_["keyholder"].path("/run/secagg/round-keys/open")
        assert (open_rounds.stat().st_mode & 0o777, open_rounds.stat().st_uid) == (0o700, USER)
        for party in reversed(PARTIES):
            running[party].send_signal(signal.SIGTERM)
            grace = pod_of(documents, party)["spec"]["terminationGracePeriodSeconds"]
            assert running[party].wait(grace) == 0


@pytest.mark.slow
def test_three_custodians_unseal_the_key_holder(render: Rendering, node: Path) -> None:
    documents = render("base/keyholder", "custodians")
    folder = node / "federation"
    federation = Federation.create(folder, custodians=(3, 5))
    shares = [kit_files(folder / "custodians")[f"share-{number}.txt"] for number in (2, 3, 5)]
    secrets: dict[str, dict[str, bytes]] = {
        "secagg-keyholder-kit": kit_files(federation.kit("key-holder")),
        **{
            f"secagg-keyholder-share-{letter}": {"share": share}
            for letter, share in zip("abc", shares, strict=True)
        },
    }
    three = checking(documents, node / "three", secrets)
    # One share twice is two shares.
    secrets["secagg-keyholder-share-b"] = secrets["secagg-keyholder-share-a"]
    two = checking(documents, node / "two", secrets)
    assert three.wait(START_S) == 0, (node / "three" / "log").read_text(encoding="utf-8")
    assert two.wait(START_S) == ConfigurationError.exit_code


@pytest.mark.slow
def test_secrets_that_others_could_read_or_change_are_refused(
    render: Rendering, node: Path
) -> None:
    _, secrets = made(node / "federation")
    for volume, name, mode in (
        ("kit", "private.key", 0o444),
        ("kit", "private.key", 0o460),
        ("unsealing", "passphrase", 0o444),
    ):
        documents = render("base/keyholder")
        named(pod_of(documents, "keyholder")["spec"]["volumes"], volume)["secret"][
            "defaultMode"
        ] = mode
        folder = node / f"{name}-{mode:o}"
        assert checking(documents, folder, secrets).wait(START_S) != 0
        assert name in (folder / "log").read_text(encoding="utf-8")


def checking(documents: list[Document], folder: Path, secrets: Secrets) -> subprocess.Popen[bytes]:
    """`config check` with what the key holder's pod has."""
    pod = copy.deepcopy(pod_of(documents, "keyholder")["spec"])
    pod["containers"][0]["args"] = ["config", "check"]
    return Node(folder, pod, secrets, claims(documents, "keyholder")).run(program("keyholder"), {})
