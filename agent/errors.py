"""The error tree: a family says who must act, `reason` says why.

Every error that Sidestep raises across a module border is one of these. Foreign
exceptions are converted where they enter (`discovery`, `identity`, `netlink`,
`datapath`), so that callers never match on a library's classes. `reason` is a stable
snake_case word: metric label, log field and key of docs/errors.md.
"""

from __future__ import annotations


class SidestepError(Exception):
    """Base of all errors; the message tells an operator what to check."""

    reason = "internal"


class ConfigError(SidestepError):
    """A flag, setting or file is wrong; the operator corrects it (exit code 2)."""

    reason = "config_invalid"


class ManifestError(ConfigError):
    """A Kubernetes object cannot be used; names file, object and field."""

    reason = "manifest_invalid"


class KernelError(SidestepError):
    """The node's kernel refused something."""

    reason = "kernel"


class FeatureMissing(KernelError):
    """A privilege or kernel feature is not there (exit code 2)."""

    reason = "feature_missing"


class LoadError(KernelError):
    """A program did not compile or the verifier refused it; carries the log's end."""

    reason = "program_refused"


class AttachError(KernelError):
    """A link could not be made, opened or updated."""

    reason = "attach_failed"


class MapError(KernelError):
    """A map operation failed."""

    reason = "map_failed"


class AbiMismatch(KernelError):
    """A pin directory is truncated, foreign, or of another layout."""

    reason = "pins_foreign"


class NetlinkError(KernelError):
    """A link, address, rule or route could not be changed."""

    reason = "netlink_failed"


class IdentityError(SidestepError):
    """A certificate is missing or does not prove what it must."""

    reason = "identity"


class NoCertificate(IdentityError):
    """No certificate could be had for an identity."""

    reason = "certificate_missing"


class UntrustedPeer(IdentityError):
    """The peer's certificate does not carry the identity that is required."""

    reason = "peer_untrusted"


class EnrollError(SidestepError):
    """One pod could not be enrolled; the others are not affected."""

    reason = "enroll_failed"


class SandboxNotFound(EnrollError):
    """The pod has no process yet, so its network namespace is not known."""

    reason = "sandbox_not_found"


class AdminError(SidestepError):
    """A command could not learn from an agent what it asked for."""

    reason = "admin"


class AgentUnreachable(AdminError):
    """No agent answers at its socket."""

    reason = "agent_unreachable"


class RequestRefused(AdminError):
    """The agent cannot answer what it was asked."""

    reason = "request_refused"


class NameUnknown(AdminError):
    """A name is of no pod, service or address, or of several."""

    reason = "name_unknown"


class LabError(SidestepError):
    """The lab's description or the machine does not allow what was asked."""

    reason = "lab"


class TunnelError(SidestepError):
    """A tunnel or one of its streams failed."""

    reason = "tunnel"


class LocalProtocolError(TunnelError):
    """Our side broke the protocol: a defect of Sidestep."""

    reason = "protocol_local"


class RemoteProtocolError(TunnelError):
    """The peer broke the protocol; carries the HTTP/2 error code."""

    reason = "protocol_remote"

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
