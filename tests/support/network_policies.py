"""Who may reach whom, by NetworkPolicies alone: an evaluator of networking.k8s.io/v1.

A connection is allowed if the sender's policies let it out and the receiver's let it in. A pod that
no policy selects for a direction is open in that direction; an address outside the cluster has no
policies. Fields that are not known here are refused, so that none is passed over in silence.

Where the standard leaves a choice to the network, the more open reading is taken: an `ipBlock` also
matches the addresses of pods.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Endpoint", "allowed", "selects"]


@dataclass(frozen=True)
class Endpoint:
    """A pod, or an address outside when ``namespace`` is None.

    Attributes:
        name: for messages.
        address: IP address.
        namespace: name of its namespace, whose one label is that name.
        labels: of the pod.
        ports: numbers of named container ports.
    """

    name: str
    address: str
    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    ports: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def namespace_labels(self) -> dict[str, str]:
        """What every cluster puts on a namespace."""
        return {"kubernetes.io/metadata.name": self.namespace or ""}


def allowed(
    policies: Iterable[Mapping[str, Any]],
    source: Endpoint,
    target: Endpoint,
    port: int,
    protocol: str = "TCP",
) -> bool:
    """Whether a connection can be made.

    Raises:
        ValueError: a policy has a field that is not known here.
    """
    policies = list(policies)
    return all(
        _passes(policies, direction, pod, peer, (target, port, protocol))
        for direction, pod, peer in (("Egress", source, target), ("Ingress", target, source))
    )


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    _known(selector, "matchLabels", "matchExpressions")
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(_holds(each, labels) for each in selector.get("matchExpressions", []))


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    _known(expression, "key", "operator", "values")
    value, values = labels.get(expression["key"]), expression.get("values", [])
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case other:
            raise ValueError(f"unknown operator {other!r}")


def _passes(
    policies: list[Mapping[str, Any]],
    direction: str,
    pod: Endpoint,
    peer: Endpoint,
    to: tuple[Endpoint, int, str],
) -> bool:
    concerned = [
        policy
        for policy in policies
        if pod.namespace is not None
        and policy["metadata"]["namespace"] == pod.namespace
        and direction in _directions(policy["spec"])
        and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    key, whom = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    rules = [rule for policy in concerned for rule in policy["spec"].get(key, [])]
    return not concerned or any(_rule(rule, whom, pod.namespace, peer, to) for rule in rules)


def _directions(spec: Mapping[str, Any]) -> list[str]:
    _known(spec, "podSelector", "policyTypes", "ingress", "egress")
    by_default = ["Ingress", "Egress"] if "egress" in spec else ["Ingress"]
    return list(spec.get("policyTypes") or by_default)


def _rule(
    rule: Mapping[str, Any],
    whom: str,
    namespace: str | None,
    peer: Endpoint,
    to: tuple[Endpoint, int, str],
) -> bool:
    _known(rule, whom, "ports")
    peers, ports = rule.get(whom), rule.get("ports")
    return (not peers or any(_peer(each, namespace, peer) for each in peers)) and (
        not ports or any(_port(each, *to) for each in ports)
    )


def _peer(peer: Mapping[str, Any], namespace: str | None, other: Endpoint) -> bool:
    _known(peer, "ipBlock", "namespaceSelector", "podSelector")
    if (block := peer.get("ipBlock")) is not None:
        _known(block, "cidr", "except")
        inside = _within(other.address, block["cidr"])
        return inside and not any(_within(other.address, each) for each in block.get("except", []))
    if other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        near = selects(peer["namespaceSelector"], other.namespace_labels)
    else:
        near = other.namespace == namespace
    return near and selects(peer.get("podSelector", {}), other.labels)


def _within(address: str, cidr: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(cidr)


def _port(rule: Mapping[str, Any], target: Endpoint, port: int, protocol: str) -> bool:
    _known(rule, "port", "endPort", "protocol")
    if rule.get("protocol", "TCP") != protocol:
        return False
    if "port" not in rule:
        return True
    if isinstance(first := rule["port"], str):
        return target.ports.get(first) == port
    return bool(first <= port <= rule.get("endPort", first))


def _known(found: Mapping[str, Any], *names: str) -> None:
    if unknown := set(found) - set(names):
        raise ValueError(f"expected {', '.join(names)} in a policy; got also {sorted(unknown)}")
