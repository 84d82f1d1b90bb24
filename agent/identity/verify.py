"""What a peer's certificate proves, after TLS has checked chain, validity and purpose. Pure.

Takes the names as `ssl.SSLSocket.getpeercert` gives them, so that a worker needs no further
library to know who it speaks to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.errors import UntrustedPeer
from agent.model.identity import SpiffeId, parse_spiffe_id

if TYPE_CHECKING:
    from collections.abc import Iterable


def peer_identity(names: Iterable[tuple[str, str]], trust_domain: str) -> SpiffeId:
    """Return the one SPIFFE id among a certificate's subject alternative names.

    Raises:
        UntrustedPeer: there is none, more than one URI, another kind of name, or it belongs to
            another trust domain (SPIFFE X.509-SVID §2: exactly one URI).
    """
    found = list(names)
    if len(found) != 1 or found[0][0] != "URI":
        shown = ", ".join(f"{kind}:{name}" for kind, name in found) or "nothing"
        raise UntrustedPeer(f"the certificate names {shown}, not one SPIFFE id")
    try:
        identity = parse_spiffe_id(found[0][1])
    except ValueError as error:
        raise UntrustedPeer(str(error)) from error
    if identity.trust_domain != trust_domain:
        raise UntrustedPeer(f"{identity} is not of trust domain {trust_domain}")
    return identity
