"""Verdicts as people read them."""

from __future__ import annotations

import pytest

from agent.model.policy import PolicyKey
from agent.model.verdict import Basis, Verdict

KEY = PolicyKey("shop", "p", "AuthorizationPolicy")
STRICT = PolicyKey("shop", "s", "PeerAuthentication")


@pytest.mark.parametrize(
    ("verdict", "decided_by", "text"),
    [
        (Verdict(True, Basis.NO_POLICY), None, "allowed: no policy"),
        (Verdict(True, Basis.RULE, KEY, 1), f"{KEY} rules[1]", f"allowed by {KEY} rules[1]"),
        (Verdict(False, Basis.RULE, KEY, 0), f"{KEY} rules[0]", f"denied by {KEY} rules[0]"),
        (Verdict(False, Basis.NOT_ALLOWED, KEY), str(KEY), f"denied: no rule .* {KEY}"),
        (Verdict(False, Basis.STRICT, STRICT), str(STRICT), f"denied: plaintext, and {STRICT}"),
        (Verdict(False, Basis.NO_WORKLOAD), None, "denied: the pod is not known"),
    ],
)
def test_verdict_names_policy_and_rule(verdict: Verdict, decided_by: str, text: str) -> None:
    assert verdict.decided_by == decided_by
    assert str(verdict).startswith(text.split(" .* ")[0])
