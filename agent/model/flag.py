"""How a connection failed, in the words of Istio's `response_flags`. Pure."""

from __future__ import annotations

from enum import StrEnum


class Flag(StrEnum):
    """The values that ambient mesh uses; `-` is a connection that did not fail."""

    NONE = "-"
    DENIED = "DENY"
    CONNECT = "CONNECT"  # the next hop could not be reached, or did not want the connection
    TLS = "TLS_FAILURE"
    HTTP2 = "H2_HANDSHAKE_FAILURE"
    NETWORK_POLICY = "NETWORK_POLICY"  # no answer at 15008, which a NetworkPolicy may block
    IDENTITY = "IDENTITY_ERROR"  # no certificate of our own
    REVOKED = "CERT_REVOKED"


class Failure(str):
    """A reason for people that carries its flag."""

    __slots__ = ("flag",)
    flag: Flag

    def __new__(cls, text: str, flag: Flag) -> Failure:
        made = super().__new__(cls, text)
        made.flag = flag
        return made


def flag_of(reason: str, otherwise: Flag) -> Flag:
    """Return the flag that a reason carries."""
    return reason.flag if isinstance(reason, Failure) else otherwise
