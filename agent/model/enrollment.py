"""Which pods take part in the mesh: selectors and exclusions, as in Istio. Pure.

    1. in an excluded namespace, or one of our own pods     no
    2. a pair of selectors holds, of pod and namespace      yes
    3. otherwise                                            no

What a pod's spec rules out whatever the labels say (the host's network, a sidecar, its end) is
known to the translator, which asks here for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.model.policy import Labels

MODE_LABEL = "istio.io/dataplane-mode"
# Ours are known by namespace and label: a label alone would let any pod leave unseen.
OWN_NAMESPACE = "sidestep-system"
OWN_LABEL = ("app.kubernetes.io/part-of", "sidestep")


class Operator(StrEnum):
    """How a label selector compares; Kubernetes' names."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One requirement on one label."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def holds(self, labels: Labels) -> bool:
        """Tell whether the labels meet it; a missing label is in no list, so NotIn holds."""
        found = [value for key, value in labels if key == self.key]
        if self.operator is Operator.EXISTS:
            return bool(found)
        if self.operator is Operator.DOES_NOT_EXIST:
            return not found
        is_listed = any(value in self.values for value in found)
        return is_listed == (self.operator is Operator.IN)


@dataclass(frozen=True, slots=True)
class SelectorPair:
    """What a pod's labels and its namespace's labels must meet; no requirement is everything."""

    of_pod: tuple[Requirement, ...] = ()
    of_namespace: tuple[Requirement, ...] = ()

    def holds(self, pod: Labels, namespace: Labels) -> bool:
        """Tell whether all requirements hold."""
        return all(each.holds(pod) for each in self.of_pod) and all(
            each.holds(namespace) for each in self.of_namespace
        )


AMBIENT = Requirement(MODE_LABEL, Operator.IN, frozenset({"ambient"}))
NOT_NONE = Requirement(MODE_LABEL, Operator.NOT_IN, frozenset({"none"}))
# The pod's own word comes first; one that is neither leaves the choice to the namespace.
DEFAULT_PAIRS = (SelectorPair(of_pod=(AMBIENT,)), SelectorPair((NOT_NONE,), (AMBIENT,)))


class Refusal(StrEnum):
    """Why a pod takes no part, as people are told."""

    NAMESPACE = "its namespace is excluded from the mesh"
    OWN = "it is one of the mesh's own pods"
    SIDECAR = "it has a sidecar of another mesh"
    NOT_LABELED = f"neither its label {MODE_LABEL} nor that of its namespace says ambient"
    OPTED_OUT = f"its label {MODE_LABEL} says none"
    NOT_SELECTED = "no selector of this installation holds for its labels and its namespace's"


@dataclass(frozen=True, slots=True)
class EnrollmentRules:
    """What an operator decides about who takes part."""

    pairs: tuple[SelectorPair, ...] = DEFAULT_PAIRS
    excluded_namespaces: frozenset[str] = frozenset({"kube-system"})
    own_namespace: str = OWN_NAMESPACE

    def refusal(
        self, namespace: str, pod_labels: Labels, namespace_labels: Labels
    ) -> Refusal | None:
        """Tell why a pod of `namespace` takes no part; None if it does."""
        if namespace in self.excluded_namespaces:
            return Refusal.NAMESPACE
        if namespace == self.own_namespace and OWN_LABEL in pod_labels:
            return Refusal.OWN
        if any(pair.holds(pod_labels, namespace_labels) for pair in self.pairs):
            return None
        if self.pairs != DEFAULT_PAIRS:
            return Refusal.NOT_SELECTED
        return Refusal.NOT_LABELED if NOT_NONE.holds(pod_labels) else Refusal.OPTED_OUT


DEFAULT_RULES = EnrollmentRules()
