"""TLS contexts for the tunnel: 1.3, ALPN h2, both sides with certificates.

The wire facts are those of HBONE: no SNI, no resumption, and the name is checked as a SPIFFE id
after the handshake. Keys reach OpenSSL through a memory file, so they are never on a disk.
"""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.tunnel.messages import PutCertificate

ALPN = "h2"


def build_context(certificate: PutCertificate, *, is_server: bool) -> ssl.SSLContext:
    """Return a context for one identity (ssl.SSLError if its PEM texts do not fit together)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([ALPN])
    if is_server:
        context.num_tickets = 0
    context.load_verify_locations(cadata=certificate.roots.decode())
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(fd, certificate.key + certificate.chain)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context
