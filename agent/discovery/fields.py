"""Fields of a Kubernetes object, read by path: a wrong one tells where and what is wrong. Pure.

Objects come from people's files as well as from an API server, so nothing about their shape is
taken for granted. Called by the readers of `translate` and `policies`; a WrongField ends there.

What is wrong with a field that an object can do without is excused: the object is used without it,
and whoever asked for it finds in `excused` what is to be said of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.model.pod import Address, Network

Found = TypeVar("Found")
# RFC 1123, as Kubernetes checks names; a uid is free text there, and part of a path here.
LABEL_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
SUBDOMAIN_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9.]*[a-z0-9])?", re.ASCII)
UID = re.compile(r"[A-Za-z0-9][-_.A-Za-z0-9]{0,127}", re.ASCII)


class WrongField(Exception):
    """A field cannot be used; never leaves this package."""

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(path, detail)
        self.path = path
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Field:
    """A value of unknown shape with its path; None is an absent field.

    `excused` is what was wrong of the whole object and is left out.
    """

    value: object
    path: str
    excused: list[WrongField] = field(default_factory=list, compare=False, repr=False)

    def get(self, key: str) -> Field:
        """Go to a member; of an absent field every member is absent."""
        path = f"{self.path}[{key}]" if "/" in key else f"{self.path}.{key}".lstrip(".")
        if self.value is None:
            return Field(None, path, self.excused)
        if not isinstance(self.value, dict):
            raise self.wrong("must be a mapping")
        return Field(self.value.get(key), path, self.excused)

    def items(self) -> Iterator[Field]:
        """Go through the items of a list; an absent one has none."""
        if self.value is None:
            return
        if not isinstance(self.value, list):
            raise self.wrong("must be a list")
        for index, value in enumerate(self.value):
            yield Field(value, f"{self.path}[{index}]", self.excused)

    def members(self) -> Iterator[tuple[object, Field]]:
        """Go through the members of a mapping; an absent one has none."""
        if self.value is None:
            return
        if not isinstance(self.value, dict):
            raise self.wrong("must be a mapping")
        for key, value in self.value.items():
            yield key, Field(value, f"{self.path}[{key}]", self.excused)

    def excuse(self, read: Callable[[Field], Found], default: Found) -> Found:
        """Read what the object can do without: where it is wrong, `default` takes its place."""
        try:
            return read(self)
        except WrongField as wrong:
            self.excused.append(wrong)
            return default

    def only(self, *names: str) -> None:
        """Refuse members with other names."""
        for name, _member in self.members():
            if name not in names:
                raise self.get(str(name)).wrong(f"is not known here; known are {', '.join(names)}")

    @property
    def field_name(self) -> str:
        """The last part of the path: `from`, `when[1]`."""
        return self.path.rpartition(".")[2]

    def text(self, default: str | None = None) -> str:
        """Read a string; without a default the field is required."""
        if self.value is None and default is not None:
            return default
        if self.value is None:
            raise self.wrong("is required")
        if not isinstance(self.value, str):
            raise self.wrong(f"must be a string, not {self.value!r}: quote it")
        return self.value

    def name(self, pattern: re.Pattern[str], default: str | None = None) -> str:
        """Read a string that becomes part of an identity or a path."""
        text = self.text(default)
        if not pattern.fullmatch(text):
            raise self.wrong(f"{text!r} is not a valid name")
        return text

    def port(self) -> int:
        """Read a port number."""
        if self.value is None:
            raise self.wrong("is required")
        if type(self.value) is not int or not 1 <= self.value <= 65535:  # a bool is an int
            raise self.wrong(f"{self.value!r} is not a port from 1 to 65535")
        return self.value

    def flag(self, *, default: bool) -> bool:
        """Read a boolean."""
        if self.value is None:
            return default
        if not isinstance(self.value, bool):
            raise self.wrong(f"must be true or false, not {self.value!r}")
        return self.value

    def address(self) -> Address:
        """Read an IP address."""
        try:
            return ip_address(self.text())
        except ValueError:
            raise self.wrong(f"{self.value!r} is not an IP address") from None

    def ports(self) -> frozenset[int]:
        """Read a comma-separated list of ports."""
        # int() alone would accept "+80", "8_0" and digits of other scripts
        return frozenset(
            Field(int(item) if item.isascii() and item.isdecimal() else item, self.path).port()
            for item in self._listed()
        )

    def networks(self) -> tuple[Network, ...]:
        """Read a comma-separated list of CIDRs; a bare address is a network of one."""
        networks: list[Network] = []
        for item in self._listed():
            try:
                networks.append(ip_network(item, strict=False))
            except ValueError:
                raise self.wrong(f"{item!r} is not an IP range such as 10.0.0.0/8") from None
        return tuple(networks)

    def _listed(self) -> list[str]:
        return [item.strip() for item in self.text("").split(",") if item.strip()]

    def wrong(self, detail: str) -> WrongField:
        """Make the error that names this field."""
        return WrongField(self.path or "object", detail)


def read_created(metadata: Field) -> str:
    """Read when an object was made, in UTC as the API server writes it; empty if nobody says."""
    created = metadata.get("creationTimestamp")
    if isinstance(created.value, datetime):  # YAML reads one without quotes so
        moment = created.value if created.value.tzinfo else created.value.replace(tzinfo=UTC)
        return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return created.text("")
