"""What a rule can ask of a connection, as sets of values; and the connection as rules see it. Pure.

A Term says that one attribute is in a set, or is not. A connection without an identity has no
principal, no namespace and no service account: no set contains what is not there, so a term that
asks for one fails and a negated one holds.

Sets are sorted tuples of plain values: small in memory, quick to send to a worker, and searched by
halving, so that a rule may list ten thousand addresses. Each pickles as a call of its class, which
takes a third of the time of a slotted dataclass's own way.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.model.identity import SpiffeId
    from agent.model.pod import Address, Network

AddressFact = tuple[int, int]  # version, number
Fact = str | int | AddressFact | None
Facts = tuple[Fact, ...]  # in the order of Attribute

BITS = {4: 32, 6: 128}


class Attribute(IntEnum):
    """What a term looks at; the number is its place among the facts."""

    PRINCIPAL = 0  # the SPIFFE id without `spiffe://`
    NAMESPACE = 1  # of the principal
    SERVICE_ACCOUNT = 2  # of the principal, `<namespace>/<account>`
    SOURCE_ADDRESS = 3
    DESTINATION_ADDRESS = 4
    DESTINATION_PORT = 5


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection to be judged; `identity` is None for plaintext."""

    source: Address
    identity: SpiffeId | None
    destination: Address
    port: int

    def facts(self) -> Facts:
        """List the values that terms are compared with."""
        source = (self.source.version, int(self.source))
        destination = (self.destination.version, int(self.destination))
        identity = self.identity
        if identity is None:
            return (None, None, None, source, destination, self.port)
        namespace, account = identity.namespace, identity.service_account
        principal = f"{identity.trust_domain}/ns/{namespace}/sa/{account}"
        return (principal, namespace, f"{namespace}/{account}", source, destination, self.port)


def _is_among(values: tuple[Any, ...], value: Any) -> bool:
    place = bisect_left(values, value)
    return place < len(values) and bool(values[place] == value)


@dataclass(frozen=True, slots=True)
class TextSet:
    """Texts, given whole, by their beginning or by their end; `is_any` has every text."""

    exact: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    is_any: bool = False

    def __reduce__(self) -> Any:
        return TextSet, (self.exact, self.prefixes, self.suffixes, self.is_any)

    def has(self, text: str) -> bool:
        return (
            self.is_any
            or _is_among(self.exact, text)
            or text.startswith(self.prefixes)
            or text.endswith(self.suffixes)
        )

    def __str__(self) -> str:
        shown = [*self.exact, *(f"{text}*" for text in self.prefixes)]
        shown += [f"*{text}" for text in self.suffixes]
        return ", ".join([*shown, "*"] if self.is_any else shown)


@dataclass(frozen=True, slots=True)
class NetworkSet:
    """Addresses by network: for each version and number of host bits, the networks' numbers."""

    blocks: tuple[tuple[int, int, tuple[int, ...]], ...]

    def __reduce__(self) -> Any:
        return NetworkSet, (self.blocks,)

    def has(self, address: AddressFact) -> bool:
        version, number = address
        return any(
            version == of_version and _is_among(numbers, number >> host_bits)
            for of_version, host_bits, numbers in self.blocks
        )

    def __str__(self) -> str:
        return ", ".join(
            str((IPv4Network if version == 4 else IPv6Network)((number << bits, length)))
            for version, bits, numbers in self.blocks
            for number in numbers
            for length in (BITS[version] - bits,)
        )


@dataclass(frozen=True, slots=True)
class PortSet:
    """Ports."""

    ports: tuple[int, ...]

    def __reduce__(self) -> Any:
        return PortSet, (self.ports,)

    def has(self, port: int) -> bool:
        return _is_among(self.ports, port)

    def __str__(self) -> str:
        return ", ".join(str(port) for port in self.ports)


ValueSet = TextSet | NetworkSet | PortSet


def text_set(patterns: Iterable[str]) -> TextSet:
    """Read patterns as Istio does: `*`, `*end`, `beginning*`, else the whole text."""
    exact, prefixes, suffixes = set(), set(), set()
    is_any = False
    for pattern in patterns:
        if pattern == "*":
            is_any = True
        elif pattern.startswith("*"):
            suffixes.add(pattern[1:])
        elif pattern.endswith("*"):
            prefixes.add(pattern[:-1])
        else:
            exact.add(pattern)
    return TextSet(tuple(sorted(exact)), tuple(sorted(prefixes)), tuple(sorted(suffixes)), is_any)


def network_set(networks: Iterable[Network]) -> NetworkSet:
    """Group networks by version and length."""
    blocks: dict[tuple[int, int], set[int]] = {}
    for network in networks:
        host_bits = network.max_prefixlen - network.prefixlen
        numbers = blocks.setdefault((network.version, host_bits), set())
        numbers.add(int(network.network_address) >> host_bits)
    return NetworkSet(
        tuple((*key, tuple(sorted(numbers))) for key, numbers in sorted(blocks.items()))
    )


def port_set(ports: Iterable[int]) -> PortSet:
    """Sort ports."""
    return PortSet(tuple(sorted(set(ports))))


@dataclass(frozen=True, slots=True)
class Term:
    """One attribute is in a set, or is not."""

    attribute: Attribute
    values: ValueSet
    is_negated: bool = False

    def __reduce__(self) -> Any:
        return Term, (self.attribute, self.values, self.is_negated)

    def holds(self, facts: Facts) -> bool:
        """Compare with the connection."""
        fact = facts[self.attribute]
        has: Any = self.values.has  # the attribute decides the kind of set, and of fact
        return (fact is not None and has(fact)) is not self.is_negated
