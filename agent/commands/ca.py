"""`sidestep ca`: the certificate authority, and the rotation of its root."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent import ca as authority
from agent import logs
from agent.commands.examples import examples
from agent.discovery.directory import DirectorySource
from agent.errors import ConfigError
from agent.heap import share_one_arena
from agent.identity import custody
from agent.identity.custody import DirectoryStore
from agent.identity.tokens import TokenFile
from agent.secrecy import keep_memory_private

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from agent.ca import Source
    from agent.identity.custody import Stage, Store
    from agent.identity.service import Authenticator

_FILE = click.Path(path_type=Path, dir_okay=False)
_DIRECTORY = click.Path(path_type=Path, file_okay=False)
DAY_SECONDS = 24 * 3600
LISTEN = "[::]:15012"
AUDIENCE = "istio-ca"
AGENT_ACCOUNT = "sidestep-system/sidestep-agent"


def _store_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--trust-domain", default="cluster.local", show_default=True,
            help="First part of every identity that is signed.",
        ),
        click.option(
            "--longest", type=click.IntRange(5), default=DAY_SECONDS, show_default=True,
            metavar="SECONDS", help="No certificate is valid for longer.",
        ),
        click.option(
            "--secret", metavar="NAMESPACE/NAME", help="Kubernetes Secret with the CA's key."
        ),
        click.option("--directory", type=_DIRECTORY, help="Directory with the CA's key."),
    ):  # fmt: skip
        command = option(command)
    return command


def _open_store(directory: Path | None, secret: str | None) -> Store:
    if (directory is None) == (secret is None):
        raise ConfigError("give the place of the CA's key: either --directory or --secret")
    if directory is not None:
        return DirectoryStore(directory)
    assert secret is not None
    # Here, since only a CA in a cluster has to carry the client's memory.
    from agent.discovery.secret import SecretStore

    return SecretStore.open(secret)


def _open_source(source: str | None, objects: Path | None) -> Source:
    if (source is None) == (objects is None):
        raise ConfigError(
            "the CA must know which pod runs on which node: "
            "give either --source kubernetes or --objects"
        )
    if objects is not None:
        return DirectorySource(objects)
    from agent.discovery.kubernetes import PODS, KubernetesSource

    return KubernetesSource.open(resources=(PODS,))


def _open_publisher(place: str | None) -> Callable[[str], None]:
    if place is None:
        return lambda _roots: None
    from agent.discovery.roots import RootsPublisher

    return RootsPublisher.open(place).publish


@click.group(
    invoke_without_command=True,
    epilog=examples(
        "sidestep ca --secret sidestep-system/sidestep-ca --source kubernetes",
        "sidestep ca --directory ./ca --objects ./objects --tokens ./tokens",
        "sidestep ca rotate-root --stage trust --directory ./ca",
    ),
)
@_store_options
@click.option("--listen", default=LISTEN, show_default=True, help="ADDRESS:PORT or unix:PATH.")
@click.option(
    "--host", "hosts", multiple=True, default=("localhost",), show_default=True,
    help="Name or address in the CA's own certificate.",
)  # fmt: skip
@click.option(
    "--source", "source_name", type=click.Choice(["kubernetes"]),
    help="Where pods and their nodes are known from: the cluster that this process is in.",
)  # fmt: skip
@click.option(
    "--objects", type=_DIRECTORY, help="Instead of --source: a directory of Kubernetes objects."
)
@click.option("--tokens", type=_FILE, help="File with a token and a node in each line.")
@click.option(
    "--audience", default=AUDIENCE, show_default=True,
    help="What tokens must be meant for, where Kubernetes reviews them.",
)  # fmt: skip
@click.option(
    "--agent-account", "accounts", multiple=True, default=(AGENT_ACCOUNT,), show_default=True,
    metavar="NAMESPACE/NAME", help="Service account of the agents.",
)  # fmt: skip
@click.option(
    "--publish-roots", "roots_place", metavar="NAMESPACE/NAME",
    help="Kubernetes ConfigMap that is to have the trusted roots, for the agents' --ca-root.",
)  # fmt: skip
@click.pass_context
def ca(
    context: click.Context,
    directory: Path | None,
    secret: str | None,
    longest: int,
    trust_domain: str,
    listen: str,
    hosts: tuple[str, ...],
    source_name: str | None,
    objects: Path | None,
    tokens: Path | None,
    audience: str,
    accounts: tuple[str, ...],
    roots_place: str | None,
) -> None:
    """Run the certificate authority of the mesh: sign for the pods of the agent that asks."""
    if context.invoked_subcommand is not None:
        return
    if objects is not None and tokens is None:
        raise ConfigError("give --tokens beside --objects: no cluster is there to review tokens")
    keep_memory_private()
    share_one_arena()
    store = _open_store(directory, secret)
    source = _open_source(source_name, objects)
    publish = _open_publisher(roots_place)
    authenticator: Authenticator
    if tokens is not None:
        authenticator = TokenFile(tokens)
    else:
        from agent.discovery.token_review import TokenReviewer

        authenticator = TokenReviewer.open(audience, accounts)
    logs.set_up()
    settings = authority.CaSettings(listen, hosts, trust_domain, timedelta(seconds=longest))

    async def run() -> None:
        await authority.run(settings, store, authenticator, source, publish)

    asyncio.run(run())


@ca.command(
    "rotate-root",
    epilog=examples(
        "sidestep ca rotate-root --stage trust --secret sidestep-system/sidestep-ca",
        "sidestep ca rotate-root --stage sign --secret sidestep-system/sidestep-ca",
        "sidestep ca rotate-root --stage finish --secret sidestep-system/sidestep-ca",
    ),
)
@click.option(
    "--stage", type=click.Choice(["trust", "sign", "finish"]), required=True,
    help="trust: a new root beside the old; sign: the new one signs; finish: the old one goes.",
)  # fmt: skip
@click.option(
    "--now", "is_forced", is_flag=True,
    help="Do not wait until certificates of the stage before are renewed: connections may fail.",
)  # fmt: skip
@_store_options
def rotate_root(
    stage: Stage,
    is_forced: bool,
    directory: Path | None,
    secret: str | None,
    longest: int,
    trust_domain: str,
) -> None:
    """Replace the CA's root in three stages, without a failed connection."""
    store = _open_store(directory, secret)
    patience = timedelta(0) if is_forced else timedelta(seconds=longest)
    now = datetime.now(UTC)
    custody.rotate_root(store, stage, trust_domain, patience, now)
    roots = custody.list_roots(store.read())
    click.echo(f"stage {stage} is done; trusted roots: {', '.join(roots)}")
    if stage == "trust":
        click.echo(f"next: --stage sign, after {(now + patience).isoformat(timespec='seconds')}")
    elif stage == "sign":
        click.echo(f"next: --stage finish, after {(now + patience).isoformat(timespec='seconds')}")
