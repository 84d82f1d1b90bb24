"""A worker's own certificates: who needs one that is not there yet waits for it."""

from __future__ import annotations

import ssl
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from agent.identity.local import LocalAuthority
from agent.tunnel import contexts as contexts_module
from agent.tunnel.contexts import Contexts
from agent.tunnel.messages import PutCertificate
from agent.tunnel.reactor import Reactor
from tests.support.descriptors import descriptors_left
from tests.support.loop import run_until
from tests.support.tunnel import CLIENT, TRUST_DOMAIN

if TYPE_CHECKING:
    from pathlib import Path

NAME = str(CLIENT)
Given = list[tuple[ssl.SSLContext | None, str]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> LocalAuthority:
    return LocalAuthority.create(tmp_path_factory.mktemp("ca"), TRUST_DOMAIN)


def certificate(authority: LocalAuthority, seconds: float = 3600) -> PutCertificate:
    issued = authority.issue(CLIENT, timedelta(seconds=seconds))
    return PutCertificate(NAME, issued.chain, issued.key, issued.roots)


class Asking:
    """Contexts with what they asked for and what they gave."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.wanted: list[str] = []
        self.given: Given = []
        self.contexts = Contexts(self.reactor, self.wanted.append)

    def ask(self, *, is_server: bool = False) -> None:
        ask = self.contexts.server if is_server else self.contexts.client
        ask(NAME, lambda context, reason: self.given.append((context, reason)))


def test_what_is_there_is_given_at_once_and_the_same_again(authority: LocalAuthority) -> None:
    asking = Asking()
    asking.contexts.put(certificate(authority))
    asking.ask()
    asking.ask()
    asking.ask(is_server=True)
    contexts = [context for context, _reason in asking.given]
    assert contexts[0] is contexts[1]
    assert contexts[2] is not contexts[0]
    assert asking.wanted == []


def test_all_that_wait_go_on_when_it_comes_and_it_is_asked_for_once(
    authority: LocalAuthority,
) -> None:
    asking = Asking()
    for is_server in (False, True, False):
        asking.ask(is_server=is_server)
    assert (asking.wanted, asking.given) == ([NAME], [])
    asking.contexts.put(certificate(authority))
    assert [reason for _context, reason in asking.given] == ["", "", ""]
    assert all(context is not None for context, _reason in asking.given)


def test_a_renewed_certificate_is_used_at_once(authority: LocalAuthority) -> None:
    asking = Asking()
    for _ in range(2):
        asking.contexts.put(certificate(authority))
        asking.ask()
    (first, _), (second, _) = asking.given
    assert first is not second


def test_who_waits_too_long_is_told_why_and_the_next_one_asks_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contexts_module, "WAIT_SECONDS", 0.05)
    asking = Asking()
    asking.ask()
    asking.ask()
    run_until(asking.reactor, lambda: len(asking.given) == 2)
    for context, reason in asking.given:
        assert context is None
        assert reason == f"there is no certificate for {NAME} yet: see `sidestep certs`"
    asking.ask()
    assert asking.wanted == [NAME, NAME]


def test_an_ended_certificate_is_as_good_as_none(
    authority: LocalAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_module, "WAIT_SECONDS", 0.05)
    asking = Asking()
    asking.contexts.put(certificate(authority, seconds=-1))
    asking.ask()
    assert (asking.wanted, asking.given) == ([NAME], [])
    run_until(asking.reactor, lambda: asking.given)
    assert "has ended" in asking.given[0][1]


def test_a_forgotten_identity_is_asked_for_again(authority: LocalAuthority) -> None:
    asking = Asking()
    asking.contexts.put(certificate(authority))
    asking.contexts.remove(NAME)
    asking.contexts.remove(NAME)
    asking.ask()
    assert (asking.wanted, asking.given) == ([NAME], [])


def test_a_certificate_that_fits_no_key_is_told(authority: LocalAuthority, tmp_path: Path) -> None:
    one, other = certificate(authority), certificate(authority)
    asking = Asking()
    asking.contexts.put(PutCertificate(NAME, one.chain, other.key, one.roots))
    asking.ask()
    (context, reason), *_ = asking.given
    assert context is None
    assert "cannot be used" in reason
    assert "PRIVATE KEY" not in reason


def test_context_that_finds_no_descriptor_is_made_the_next_time(authority: LocalAuthority) -> None:
    asking = Asking()
    asking.contexts.put(certificate(authority))
    with descriptors_left(0):
        asking.ask()
    ((context, reason),) = asking.given
    assert context is None
    assert "Too many open files" in reason
    asking.ask()
    assert asking.given[1][0] is not None
