"""What was decided about a connection, and by what. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.model.policy import PolicyKey


class Basis(StrEnum):
    """Why a connection passes or does not."""

    NO_POLICY = "no_policy"  # nothing limits who may connect
    RULE = "rule"  # the rule of an ALLOW or DENY policy matches
    NOT_ALLOWED = "not_allowed"  # there are ALLOW policies, and no rule of them matches
    STRICT = "strict"  # plaintext, where a PeerAuthentication asks for mutual TLS
    NO_WORKLOAD = "no_workload"  # the pod is not known, so neither is what applies to it


@dataclass(frozen=True, slots=True)
class Verdict:
    """One decision.

    `policy` decided; of several ALLOW policies that all do not match it is the first. `would_be`
    is what it would be with the dry-run policies enforced as well, if that is not the same.
    """

    is_allowed: bool
    basis: Basis
    policy: PolicyKey | None = None
    rule: int | None = None
    would_be: Verdict | None = None

    @property
    def decided_by(self) -> str | None:
        """Name policy and rule, as logs and commands show them."""
        if self.policy is None:
            return None
        return str(self.policy) if self.rule is None else f"{self.policy} rules[{self.rule}]"

    def __str__(self) -> str:
        match self.basis:
            case Basis.NO_POLICY:
                return "allowed: no policy limits who may connect"
            case Basis.RULE:
                return f"{'allowed' if self.is_allowed else 'denied'} by {self.decided_by}"
            case Basis.NOT_ALLOWED:
                return f"denied: no rule of an ALLOW policy matches, the first is {self.policy}"
            case Basis.STRICT:
                return f"denied: plaintext, and {self.policy} is STRICT"
            case _:
                return "denied: the pod is not known to the mesh"
