"""Whatever is desired and observed: the steps lead from one to the other, and no further."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.model.pod import LocalPod
from agent.state.diff import Enroll, Unenroll, diff

pods = st.dictionaries(
    st.sampled_from("abcdef"),
    st.sampled_from(["cart", "web"]),
).map(
    lambda names: {uid: LocalPod(uid, "shop", name, "default", ()) for uid, name in names.items()}
)


@given(pods, pods)
def test_steps_make_observed_equal_desired(
    desired: dict[str, LocalPod], observed: dict[str, LocalPod]
) -> None:
    state = dict(observed)
    for step in diff(desired, observed):
        match step:
            case Unenroll():
                del state[step.uid]  # never what is not there
            case Enroll():
                assert step.pod.uid not in state  # never what is there still
                state[step.pod.uid] = step.pod
    assert state == desired
    assert diff(desired, state) == ()


@given(pods, pods)
def test_pod_that_did_not_change_is_not_touched(
    desired: dict[str, LocalPod], observed: dict[str, LocalPod]
) -> None:
    touched = {
        step.uid if isinstance(step, Unenroll) else step.pod.uid for step in diff(desired, observed)
    }
    same = {uid for uid in desired.keys() & observed.keys() if desired[uid] == observed[uid]}
    assert touched & same == set()
