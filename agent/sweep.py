"""Take away what an agent before us left for pods that are no longer its concern.

An agent that is killed undoes nothing: pods stay captured, with nobody listening, which is closed
and safe. The next agent enrolls the pods that want the mesh over what is there; here go the others:
those that ended meanwhile, and those whose label was taken away.

Called by the composition root, once after the first pass. A pod that is wanted and could not be
enrolled yet is left as it is, closed, but for the exceptions that it had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent import guard, netns, sandbox
from agent.datapath import links
from agent.enroll import clean_namespace

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from agent.datapath.btf import Value
    from agent.datapath.pins import Pins

# Where a pod's cookie stands in each map's key; outbound capture first, as unenroll has it.
COOKIE_IN_KEY = {
    "ss_pods": "value",
    "ss_listeners": "value",
    "ss_bypass": "netns_cookie",
    "ss_ports": "netns_cookie",
    "ss_captures": "netns_cookie",
    "ss_pod_names": "value",
}


def forget_exceptions(pins: Pins, kept: Collection[tuple[str, bytes]]) -> None:
    """Forget what an agent before us left uncaptured, but for `kept` (`enroll.exceptions`)."""
    for name in ("ss_bypass", "ss_ports"):
        opened = pins.maps[name]
        for key in [key for key, _value in opened.items()]:
            if (name, opened.key.encode(**key)) not in kept:
                opened.delete(key)


def sweep(pins: Pins, wanted_uids: Collection[str], pod_cgroups: Path) -> list[str]:
    """Unenroll every pod whose uid is not wanted; return the uids, empty ones for unknown pods."""
    uids = _known_pods(pins)
    stale = {cookie: uid for cookie, uid in uids.items() if uid not in wanted_uids}
    for name, member in COOKIE_IN_KEY.items():
        opened = pins.maps[name]
        for key in [key for key, _value in opened.items() if key[member] in stale]:
            opened.delete(key)
    local = pins.maps["ss_local"]
    for key in [key for key, value in local.items() if value["netns_cookie"] in stale]:
        local.delete(key)
    for cookie in stale:
        links.detach_lookup(pins, cookie)
    for key, value in list(pins.maps["ss_guards"].items()):
        owner, ifindex = value["netns_cookie"], key["value"]
        if owner in stale:
            assert isinstance(owner, int)
            assert isinstance(ifindex, int)
            guard.detach(pins, owner, ifindex)
            pins.maps["ss_guards"].delete(key)
    for fd in sandbox.all_netns(pod_cgroups):
        if netns.netns_cookie(fd) in stale:
            netns.run_in(fd, clean_namespace)
    return sorted(stale.values())


def _known_pods(pins: Pins) -> dict[int, str]:
    """Return the uid of each pod that left a trace, by its netns cookie."""
    cookies = {
        key["value"] for name in ("ss_pods", "ss_listeners") for key, _ in pins.maps[name].items()
    }
    names: dict[Value, str] = {}
    for key, value in pins.maps["ss_pod_names"].items():
        uid = value["uid"]
        assert isinstance(uid, bytes)
        names[key["value"]] = uid.rstrip(b"\0").decode(errors="replace")
    found = {*cookies, *names, *links.looked_up_cookies(pins)}
    return {cookie: names.get(cookie, "") for cookie in found if isinstance(cookie, int)}
