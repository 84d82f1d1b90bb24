"""The SPIFFE id that a workload proves with its certificate: parse and format. Pure.

    spiffe://<trust domain>/ns/<namespace>/sa/<service account>

Exactly this form is accepted, byte for byte: no other scheme spelling, no empty or dot
segment, no query, no escape. So two ids are equal if and only if their texts are.
Called wherever a peer's certificate is checked or a certificate is requested.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SCHEME = "spiffe://"
# SPIFFE-ID §2.1 and §2.2: the allowed characters; §2.3: the longest id to be supported.
TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}", re.ASCII)
SEGMENT = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
LONGEST = 2048


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """Who a workload is, everywhere in the mesh."""

    trust_domain: str
    namespace: str
    service_account: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"


def parse_spiffe_id(text: str) -> SpiffeId:
    """Parse an id; raises ValueError that says what is wrong with it."""
    if not text.startswith(SCHEME):
        raise ValueError(f"SPIFFE id {text!r} does not start with {SCHEME}")
    if len(text) > LONGEST:
        raise ValueError(f"SPIFFE id is longer than {LONGEST} bytes")
    parts = text.removeprefix(SCHEME).split("/")
    if len(parts) != 5 or (parts[1], parts[3]) != ("ns", "sa"):
        raise ValueError(f"SPIFFE id {text!r} is not <trust domain>/ns/<namespace>/sa/<account>")
    trust_domain, _, namespace, _, service_account = parts
    if not TRUST_DOMAIN.fullmatch(trust_domain):
        raise ValueError(f"SPIFFE id {text!r} has a wrong trust domain")
    for noun, segment in (("namespace", namespace), ("service account", service_account)):
        if not SEGMENT.fullmatch(segment) or segment in {".", ".."}:
            raise ValueError(f"SPIFFE id {text!r} has a wrong {noun}")
    return SpiffeId(trust_domain, namespace, service_account)
