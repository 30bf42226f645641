"""The Pod Security Standard "restricted", control by control, for a pod's spec.

Written after the standard of Kubernetes 1.34. A cluster enforces it where a
namespace says ``pod-security.kubernetes.io/enforce: restricted``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["violations"]

_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
    *("persistentVolumeClaim", "projected", "secret"),
}
_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
}
_SELINUX = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
_LISTS = ("containers", "initContainers", "ephemeralContainers")


def violations(pod: Mapping[str, Any]) -> list[str]:
    """What the restricted profile forbids in this pod's spec; empty when it conforms."""
    context = pod.get("securityContext", {})
    found = [*_of_the_pod(pod, context)]
    for container in (each for name in _LISTS for each in pod.get(name, [])):
        found += [f"{container['name']}: {what}" for what in _of_a_container(container, context)]
    return found


def _of_the_pod(pod: Mapping[str, Any], context: Mapping[str, Any]) -> Iterator[str]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield key
    for volume in pod.get("volumes", []):
        kinds = set(volume) - {"name"}
        if not (kinds and kinds <= _VOLUMES):
            yield f"volume {volume['name']} of type {sorted(kinds)}"
    for sysctl in context.get("sysctls", []):
        if sysctl["name"] not in _SYSCTLS:
            yield f"sysctl {sysctl['name']}"
    yield from _of_both(context)


def _of_both(context: Mapping[str, Any]) -> Iterator[str]:
    """What may be said of a pod or of a container, and must be harmless at both places."""
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield "hostProcess"
    linux = context.get("seLinuxOptions", {})
    if linux.get("type") not in _SELINUX or linux.get("user") or linux.get("role"):
        yield "seLinuxOptions"
    if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") == "Unconfined":
        yield "appArmorProfile"
    if context.get("runAsUser") == 0:
        yield "runAsUser 0"
    if context.get("runAsNonRoot") is False:
        yield "runAsNonRoot false"
    if context.get("seccompProfile", {}).get("type", "RuntimeDefault") == "Unconfined":
        yield "seccompProfile Unconfined"


def _of_a_container(container: Mapping[str, Any], pod: Mapping[str, Any]) -> Iterator[str]:
    context = container.get("securityContext", {})
    yield from _of_both(context)
    if context.get("privileged"):
        yield "privileged"
    if context.get("procMount", "Default") != "Default":
        yield "procMount"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    capabilities = context.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "capabilities not dropped"
    if not set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"}:
        yield "capabilities added"
    if context.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot not set"
    profile = context.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
    if profile not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile not set"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "hostPort"
    if _hosts_asked(container):
        yield "probe of another host"


def _hosts_asked(container: Mapping[str, Any]) -> bool:
    """Whether a probe or a hook names a host, so that the node would ask others than the pod."""
    hooks = container.get("lifecycle", {})
    probes = [container.get(f"{kind}Probe", {}) for kind in ("liveness", "readiness", "startup")]
    asked = [*probes, hooks.get("postStart", {}), hooks.get("preStop", {})]
    return any(each.get(how, {}).get("host") for each in asked for how in ("httpGet", "tcpSocket"))
