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


class KeyExposed(ConfigError):
    """Others can read a private key or a token (exit code 2)."""

    reason = "key_exposed"


class NoAuthority(ConfigError):
    """The CA's own certificate, key or roots are missing or do not fit together (exit code 2)."""

    reason = "authority_invalid"


class RotationRefused(ConfigError):
    """A stage of the root's rotation would break connections now (exit code 2)."""

    reason = "rotation_refused"


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


class Contested(KernelError):
    """Somebody takes away again and again what the agent puts into the kernel."""

    reason = "contested"


class Unguarded(KernelError):
    """No interface of the node leads to a pod, so no guard can see its packets."""

    reason = "unguarded"


class PinsInUse(KernelError):
    """Another agent runs on these pins; one must stop first."""

    reason = "pins_in_use"


class HandoverFailed(SidestepError):
    """The agent that runs did not hand over; it goes on, and this one ends."""

    reason = "handover_failed"


class NetlinkError(KernelError):
    """A link, address, rule or route could not be changed."""

    reason = "netlink_failed"


class KubernetesError(SidestepError):
    """The cluster's API did not do what was asked."""

    reason = "kubernetes"


class IdentityError(SidestepError):
    """A certificate is missing or does not prove what it must."""

    reason = "identity"


class AuthorityUnavailable(IdentityError):
    """The CA did not answer; it is asked again later, more and more rarely."""

    reason = "authority_unavailable"


class AuthorityRefused(IdentityError):
    """The CA refused to sign, or what it signed is not what was asked for."""

    reason = "authority_refused"


class ClocksDiffer(IdentityError):
    """What the CA signed is not valid by this node's clock: one of the two clocks is wrong."""

    reason = "clocks_differ"


class CallerUnknown(IdentityError):
    """The CA does not know who asks: the token is missing, wrong, or not an agent's."""

    reason = "caller_unknown"


class RequestInvalid(IdentityError):
    """The CA cannot use what was sent: the signing request or its fields are wrong."""

    reason = "request_invalid"


class IdentityDenied(IdentityError):
    """The CA knows the caller, and no pod with that identity runs on the caller's node."""

    reason = "identity_denied"


class RevocationInvalid(IdentityError):
    """The file of revoked certificates cannot be used; the last good one stays in force."""

    reason = "revocation_invalid"


class UntrustedPeer(IdentityError):
    """The peer did not prove what it must; the kinds below say why."""

    reason = "peer_untrusted"


class PeerCertificateMissing(UntrustedPeer):
    """The peer showed no certificate."""

    reason = "peer_certificate_missing"


class PeerAuthorityUnknown(UntrustedPeer):
    """No trusted root stands behind the peer's certificate."""

    reason = "peer_authority_unknown"


class PeerExpired(UntrustedPeer):
    """The peer's certificate, or one above it, has ended."""

    reason = "peer_expired"


class PeerNotYetValid(UntrustedPeer):
    """The peer's certificate, or one above it, is from the future."""

    reason = "peer_not_yet_valid"


class PeerNames(UntrustedPeer):
    """The peer's certificate does not have exactly one URI, a SPIFFE id."""

    reason = "peer_names_wrong"


class PeerTrustDomain(UntrustedPeer):
    """The peer belongs to a trust domain that is neither ours nor an alias of it."""

    reason = "peer_trust_domain"


class PeerUsage(UntrustedPeer):
    """The peer's certificate is not meant for what it was used for."""

    reason = "peer_usage_wrong"


class PeerIsAuthority(UntrustedPeer):
    """The peer's certificate is one that signs others, so it names no workload."""

    reason = "peer_is_authority"


class PeerUnexpected(UntrustedPeer):
    """The peer proved an identity, but not that of the workload at its address."""

    reason = "peer_unexpected"


class PeerRevoked(UntrustedPeer):
    """The peer's certificate has been revoked."""

    reason = "peer_revoked"


class EnrollError(SidestepError):
    """One pod could not be enrolled; the others are not affected."""

    reason = "enroll_failed"


class SandboxNotFound(EnrollError):
    """The pod has no process yet, so its network namespace is not known."""

    reason = "sandbox_not_found"


class InstallFailed(SidestepError):
    """The CNI plugin could not be installed on, or taken from, this node."""

    reason = "install_failed"


class AdminError(SidestepError):
    """A command could not learn from an agent what it asked for."""

    reason = "admin"


class AgentRunning(AdminError):
    """Another agent listens at the socket that this one was to have."""

    reason = "agent_running"


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


class PodGone(TunnelError):
    """A pod left while its connection still waited for a certificate or a tunnel."""

    reason = "pod_gone"


class OutOfDescriptors(TunnelError):
    """The process may open no more files for connections."""

    reason = "out_of_descriptors"


class LocalProtocolError(TunnelError):
    """Our side broke the protocol: a defect of Sidestep."""

    reason = "protocol_local"


class RemoteProtocolError(TunnelError):
    """The peer broke the protocol; carries the HTTP/2 error code."""

    reason = "protocol_remote"

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
