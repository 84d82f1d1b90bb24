"""libbpf through ctypes: the calls that the agent and the command line make, and no more.

Foreign errors end here: each call raises a KernelError that names the object and the errno. File
descriptors are plain integers that the caller owns and closes.

Called by the other modules of `agent.datapath`. Checked against libbpf 1.1 (Debian 12); the
structures are those of linux/bpf.h and of libbpf's bpf.h, whose members are append-only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent.errors import AttachError, FeatureMissing, LoadError, MapError

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM_TYPE_SK_LOOKUP = 30  # enum bpf_prog_type
ATTACH_SK_LOOKUP = 36  # enum bpf_attach_type
UPDATE_ANY = 0  # BPF_ANY
MAP_TYPE_SOCKHASH, MAP_TYPE_RINGBUF = 18, 27  # enum bpf_map_type
PER_CPU_MAP_TYPES = frozenset({5, 6, 10, 21})
LINK_TYPE_NETNS, LINK_TYPE_TCX = 5, 11  # enum bpf_link_type


class _MapInfo(ctypes.Structure):
    """struct bpf_map_info, up to the members that are read."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64),
        ("netns_ino", ctypes.c_uint64),
        ("btf_id", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
    )


class _ProgramInfo(ctypes.Structure):
    """struct bpf_prog_info, up to the members that are read."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", ctypes.c_uint32),
        ("xlated_prog_len", ctypes.c_uint32),
        ("jited_prog_insns", ctypes.c_uint64),
        ("xlated_prog_insns", ctypes.c_uint64),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
    )


class _LinkInfo(ctypes.Structure):
    """struct bpf_link_info: the head, and the union as a cgroup or netns link fills it."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("target", ctypes.c_uint64),
        ("attach_type", ctypes.c_uint32),
    )


class _BtfInfo(ctypes.Structure):
    """struct bpf_btf_info, up to the members that are read."""

    _fields_ = (
        ("btf", ctypes.c_uint64),
        ("btf_size", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
    )


class _ProgramLoadOptions(ctypes.Structure):
    """struct bpf_prog_load_opts of libbpf 1.0."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_cnt", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_void_p),
        ("line_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_char_p),
    )


@dataclass(frozen=True, slots=True)
class MapFacts:
    """What the kernel says of a map."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    name: str
    btf_id: int
    key_type_id: int
    value_type_id: int


@dataclass(frozen=True, slots=True)
class ProgramFacts:
    """What the kernel says of a loaded program."""

    type: int
    id: int
    tag: str
    name: str
    instruction_bytes: int
    loaded_at_ns: int


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """What the kernel says of a link; `target` is a cgroup id, a netns inode or an interface."""

    type: int
    id: int
    program_id: int
    attach_type: int
    target: int


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise FeatureMissing("libbpf.so.1 is missing: install the package libbpf1") from error


def _errno_text(result: int) -> str:
    # libbpf 1.x returns -errno and sets errno as well.
    number = -result if result < 0 else ctypes.get_errno()
    return f"{errno.errorcode.get(number, number)}, {os.strerror(number)}"


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """Close a descriptor at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def open_pin(path: Path) -> int:
    """Return a file descriptor of the object pinned at `path` (MapError if it is not there)."""
    fd = _library().bpf_obj_get(os.fsencode(path))
    if fd < 0:
        raise MapError(f"{path} cannot be opened as a BPF pin: {_errno_text(fd)}")
    return int(fd)


def pin(fd: int, path: Path) -> None:
    """Pin the object behind `fd` at `path`, which must not exist (AttachError)."""
    result = _library().bpf_obj_pin(fd, os.fsencode(path))
    if result < 0:
        raise AttachError(f"{path} cannot be pinned: {_errno_text(result)}")


@functools.cache
def possible_cpus() -> int:
    """Return how many values a per-CPU map gives for one key."""
    # "0-1", or "0,2-3": the last number is the highest that can ever be
    text = Path("/sys/devices/system/cpu/possible").read_text()
    return int(re.split(r"[,-]", text.strip())[-1]) + 1


@functools.cache
def _buffer_type(size: int) -> type[ctypes.Array[ctypes.c_char]]:
    # Kept, since ctypes makes one anew when no buffer is left, and the old one is cyclic garbage.
    return ctypes.c_char * size


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Return the value of `key`, or None."""
    value = _buffer_type(value_size)()
    result = _library().bpf_map_lookup_elem(fd, key, value)
    if result == 0:
        return value.raw
    if -result == errno.ENOENT:
        return None
    raise MapError(f"map lookup failed: {_errno_text(result)}")


def update(fd: int, key: bytes, value: bytes) -> None:
    """Write `value` under `key`, whether or not it exists."""
    result = _library().bpf_map_update_elem(fd, key, value, ctypes.c_uint64(UPDATE_ANY))
    if result < 0:
        raise MapError(f"map update failed: {_errno_text(result)}")


def delete(fd: int, key: bytes) -> bool:
    """Delete `key`; False if it was not there."""
    result = _library().bpf_map_delete_elem(fd, key)
    if result < 0 and -result != errno.ENOENT:
        raise MapError(f"map delete failed: {_errno_text(result)}")
    return bool(result == 0)


def keys(fd: int, key_size: int, limit: int) -> Iterator[bytes]:
    """Yield the keys, at most `limit`: a map that changes meanwhile may restart the walk."""
    key: bytes | None = None
    following = _buffer_type(key_size)()
    for _ in range(limit):
        result = _library().bpf_map_get_next_key(fd, key, following)
        if -result == errno.ENOENT:
            return
        if result < 0:
            raise MapError(f"map walk failed: {_errno_text(result)}")
        key = following.raw
        yield key


def _object_info(fd: int, info: ctypes.Structure) -> None:
    size = ctypes.c_uint32(ctypes.sizeof(info))
    result = _library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
    if result < 0:
        raise MapError(f"the kernel gives no facts of a BPF object: {_errno_text(result)}")


def map_facts(fd: int) -> MapFacts:
    """Return the kernel's facts of the map behind `fd`."""
    info = _MapInfo()
    _object_info(fd, info)
    return MapFacts(
        type=info.type,
        id=info.id,
        key_size=info.key_size,
        value_size=info.value_size,
        max_entries=info.max_entries,
        name=info.name.decode(),
        btf_id=info.btf_id,
        key_type_id=info.btf_key_type_id,
        value_type_id=info.btf_value_type_id,
    )


def program_facts(fd: int) -> ProgramFacts:
    """Return the kernel's facts of the program behind `fd`."""
    info = _ProgramInfo()
    _object_info(fd, info)
    return ProgramFacts(
        type=info.type,
        id=info.id,
        tag=bytes(info.tag).hex(),
        name=info.name.decode(),
        instruction_bytes=info.xlated_prog_len,
        loaded_at_ns=info.load_time,
    )


def open_program(program_id: int) -> int:
    """Return a file descriptor of the loaded program with that id (MapError if it is gone)."""
    fd = _library().bpf_prog_get_fd_by_id(ctypes.c_uint32(program_id))
    if fd < 0:
        raise MapError(f"program {program_id} cannot be opened: {_errno_text(fd)}")
    return int(fd)


def link_facts(fd: int) -> LinkFacts:
    """Return the kernel's facts of the link behind `fd`."""
    info = _LinkInfo()
    _object_info(fd, info)
    # A netns or tcx link fills {u32 inode or index, u32 attach type}, a cgroup link {u64 id, u32}.
    is_short = info.type in (LINK_TYPE_NETNS, LINK_TYPE_TCX)
    return LinkFacts(
        type=info.type,
        id=info.id,
        program_id=info.prog_id,
        attach_type=info.target >> 32 if is_short else info.attach_type,
        target=info.target & 0xFFFFFFFF if is_short else info.target,
    )


def read_btf(btf_id: int) -> bytes:
    """Return the raw type information with id `btf_id`."""
    fd = _library().bpf_btf_get_fd_by_id(ctypes.c_uint32(btf_id))
    if fd < 0:
        raise MapError(f"BTF {btf_id} cannot be opened: {_errno_text(fd)}")
    try:
        info = _BtfInfo()
        _object_info(fd, info)
        data = ctypes.create_string_buffer(info.btf_size)
        again = _BtfInfo(btf=ctypes.addressof(data), btf_size=info.btf_size)
        _object_info(fd, again)
        return data.raw
    finally:
        os.close(fd)


def load_sk_lookup(name: str, instructions: bytes) -> int:
    """Load an sk_lookup program and return its file descriptor (LoadError: verifier's log)."""
    log = ctypes.create_string_buffer(64 * 1024)
    options = _ProgramLoadOptions(
        sz=ctypes.sizeof(_ProgramLoadOptions),
        expected_attach_type=ATTACH_SK_LOOKUP,
        log_size=len(log),
        log_buf=ctypes.cast(log, ctypes.c_char_p),
    )
    fd = _library().bpf_prog_load(
        PROGRAM_TYPE_SK_LOOKUP,
        name.encode(),
        b"Dual BSD/GPL",
        instructions,
        ctypes.c_size_t(len(instructions) // 8),
        ctypes.byref(options),
    )
    if fd < 0:
        end = log.value.decode(errors="replace").strip()[-1000:]
        raise LoadError(f"the kernel refused program {name}: {_errno_text(fd)}\n{end}")
    return int(fd)


def create_link(program_fd: int, target_fd: int, attach_type: int, what: str) -> int:
    """Attach a program to a cgroup or netns; the link lives as long as the fd or a pin of it."""
    fd = _library().bpf_link_create(program_fd, target_fd, attach_type, None)
    if fd < 0:
        raise AttachError(f"{what} cannot be attached: {_errno_text(fd)}")
    return int(fd)


def detach_link(link_fd: int, what: str) -> None:
    """End what a link does, now (BPF_LINK_DETACH, Linux 5.9); fd and pins of it are husks then.

    A link whose last pin goes ends a moment later, when the kernel gets to it.
    """
    result = _library().bpf_link_detach(link_fd)
    if result < 0:
        raise AttachError(f"{what} cannot be detached: {_errno_text(result)}")


def update_link(link_fd: int, program_fd: int, what: str) -> None:
    """Put another program behind a link, atomically."""
    result = _library().bpf_link_update(link_fd, program_fd, None)
    if result < 0:
        raise AttachError(f"{what} cannot be updated: {_errno_text(result)}")
