"""No bytes from outside make anything raise but the errors that its caller expects."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.outside import KEPT, TARGETS

EXAMPLES = 60  # of each target; those that open sockets or sign take some milliseconds each
EDITS = st.lists(
    st.tuples(st.integers(0, 2**16), st.integers(0, 8), st.binary(max_size=8)), max_size=6
)


@cache
def samples(name: str) -> list[bytes]:
    return TARGETS[name].samples()


def edited(sample: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Replace some bytes of a sample, at places that are taken modulo its length."""
    for place, size, new in edits:
        at = place % (len(sample) + 1)
        sample = sample[:at] + new + sample[at + size :]
    return sample


@pytest.mark.parametrize("name", TARGETS)
def test_good_samples_are_taken(name: str) -> None:
    assert samples(name)
    for sample in samples(name):
        TARGETS[name].run(sample)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_changed_samples_and_noise_are_taken_or_refused(name: str, data: st.DataObject) -> None:
    changed = st.builds(edited, st.sampled_from(samples(name)), EDITS)
    TARGETS[name].run(data.draw(changed | st.binary(max_size=200)))


@pytest.mark.parametrize(
    ("name", "file"), [(path.parent.name, path.name) for path in sorted(KEPT.glob("*/*"))]
)
def test_what_once_failed_does_not_any_more(name: str, file: str) -> None:
    TARGETS[name].run((KEPT / name / file).read_bytes())
