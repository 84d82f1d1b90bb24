"""The wire format, byte for byte against Google's implementation."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from agent.identity import wire

FIELD = descriptor_pb2.FieldDescriptorProto


def make_types() -> tuple[Any, Any]:
    """Build the messages as istio's ca.proto has them."""
    file = descriptor_pb2.FileDescriptorProto(
        name="ca.proto",
        package="istio.v1.auth",
        syntax="proto3",
        dependency=["google/protobuf/struct.proto"],
    )
    request = file.message_type.add(name="IstioCertificateRequest")
    request.field.add(name="csr", number=1, type=FIELD.TYPE_STRING, label=FIELD.LABEL_OPTIONAL)
    request.field.add(
        name="validity_duration", number=3, type=FIELD.TYPE_INT64, label=FIELD.LABEL_OPTIONAL
    )
    request.field.add(
        name="metadata",
        number=4,
        type=FIELD.TYPE_MESSAGE,
        label=FIELD.LABEL_OPTIONAL,
        type_name=".google.protobuf.Struct",
    )
    response = file.message_type.add(name="IstioCertificateResponse")
    response.field.add(
        name="cert_chain", number=1, type=FIELD.TYPE_STRING, label=FIELD.LABEL_REPEATED
    )
    pool = descriptor_pool.DescriptorPool()
    struct = descriptor_pb2.FileDescriptorProto()
    struct_pb2.DESCRIPTOR.CopyToProto(struct)
    pool.Add(struct)
    pool.Add(file)
    found = message_factory.GetMessageClassesForFiles(["ca.proto"], pool)
    return (
        found["istio.v1.auth.IstioCertificateRequest"],
        found["istio.v1.auth.IstioCertificateResponse"],
    )


REQUEST, RESPONSE = make_types()
TEXT = st.text(st.characters(codec="utf-8"))
INT64 = st.integers(-(2**63), 2**63 - 1)


@given(TEXT, INT64, TEXT)
def test_request_is_what_protobuf_writes(csr: str, validity: int, impersonated: str) -> None:
    theirs = REQUEST(csr=csr, validity_duration=validity)
    if impersonated:
        theirs.metadata[wire.IMPERSONATED] = impersonated
    ours = wire.Request(csr, validity, impersonated)
    assert wire.build_request(ours) == theirs.SerializeToString(deterministic=True)
    assert wire.parse_request(theirs.SerializeToString()) == ours


@given(TEXT, st.dictionaries(TEXT, st.one_of(TEXT, st.floats(), st.booleans())), TEXT)
def test_other_metadata_is_skipped(csr: str, others: dict[str, Any], impersonated: str) -> None:
    theirs = REQUEST(csr=csr)
    for key, value in others.items():
        theirs.metadata[key] = value
    theirs.metadata[wire.IMPERSONATED] = impersonated
    assert wire.parse_request(theirs.SerializeToString()).impersonated == impersonated


@given(st.lists(TEXT))
def test_response_is_what_protobuf_writes(chain: list[str]) -> None:
    theirs = RESPONSE(cert_chain=chain).SerializeToString()
    assert wire.build_response(chain) == theirs
    assert wire.parse_response(theirs) == chain


@given(st.binary())
def test_bytes_that_are_no_request_are_an_error_and_nothing_else(data: bytes) -> None:
    theirs = REQUEST()
    try:
        theirs.ParseFromString(data)
    except Exception:  # DecodeError, or the text's
        return
    # What protobuf reads we read as well, but for groups, which nobody sends.
    try:
        wire.parse_request(data)
    except ValueError as error:
        assert str(error) in {  # noqa: PT017  # which of several errors
            "a field of the message has the unknown kind 3",
            "a field of the message has the unknown kind 4",
        }


def test_numbers_of_fixed_size_are_skipped() -> None:
    fields = b"\x49" + bytes(8) + b"\x55" + bytes(4)  # fields 9 and 10, which we do not know
    assert wire.parse_request(fields + b"\x0a\x03csr").csr == "csr"


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x05abc",  # shorter than it says
        b"\x0a",  # no length
        b"\x00\x00",  # field 0
        b"\x0b",  # a group
        b"\x18" + b"\xff" * 10,  # a number without an end
        b"\x19\x00",  # eight bytes of which one is there
        b"\x0a\x01\xff",  # not UTF-8
    ],
)
def test_broken_request_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        wire.parse_request(data)
