"""Headers and indexes: what is accepted, what is refused, and how that compares with safetensors.

The safetensors library is the oracle: whatever it refuses on structure is refused here, and what is
refused here besides is the short list in `STRICTER`.

    pytest tests/checkpoint/test_header.py
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from moe_compose.checkpoint.header import (
    MAX_HEADER_BYTES,
    Header,
    encode_header,
    header_length,
    load_object,
    parse_header,
    parse_index,
)
from moe_compose.checkpoint.source import DTYPE_BITS, TensorInfo
from moe_compose.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
E = json.dumps(F32)


def read(content: bytes) -> Header:
    """A whole file through both steps."""
    length = header_length(content[:8], len(content), "f")
    return parse_header(content[8 : 8 + length], len(content), "f")


def ours(content: bytes) -> bool:
    try:
        read(content)
    except CheckpointError:
        return False
    return True


def theirs(content: bytes) -> bool:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        try:
            with safe_open(file.name, "pt") as opened:
                opened.keys()
        except (SafetensorError, OSError):
            return False
    return True


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**F32, **changes}}


ACCEPTED: dict[str, bytes] = {
    "one": file_of({"a": F32}, b"0000"),
    "no tensors": file_of({}),
    "no tensors but text": file_of({"__metadata__": {"format": "pt"}}),
    "padding": file_of(json.dumps({"a": F32}).encode() + b" \t\r\n", b"0000"),
    "empty name": file_of({"": F32}, b"0000"),
    "empty tensors before, between and after": file_of(
        {"z": {**EMPTY, "data_offsets": [4, 4]}, "a": F32, "b": EMPTY, "c": EMPTY}, b"0000"
    ),
    "scalar": file_of(with_entry(shape=[]), b"0000"),
    "order of offsets, not of names": file_of(
        {"a": {**F32, "data_offsets": [4, 8]}, "b": F32}, b"00001111"
    ),
    "escaped": file_of(f'{{"\\u00e9\\ud83d\\ude00":{E}}}'.encode(), b"0000"),
    "dimension beyond 32 bits": file_of(with_entry(shape=[0, 2**62], data_offsets=[0, 0])),
    **{
        dtype: file_of({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, b]}}, b"0" * b)
        for dtype, b in DTYPE_BITS.items()
    },
}

REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "8 bytes at least"),
    "7 bytes": (b"\2\0\0\0\0\0\0", "8 bytes at least"),
    "length over the limit": (b"\xff" * 8 + b"{}", f"{MAX_HEADER_BYTES} bytes"),
    "length over the file": ((100).to_bytes(8, "little") + b"{}", "truncated"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid ...", "git lfs pull"),
    "length zero": (bytes(8), "begins with"),
    "byte order mark": (file_of(b"\xef\xbb\xbf{}"), "begins with"),
    "list": (file_of([]), "begins with"),
    "cut JSON": (file_of(b'{"a": '), "line 1, column"),
    "JSON after JSON": (file_of(b"{}{}"), "Extra data"),
    "NUL padding": (file_of(b"{}\0\0"), "Extra data"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "UTF-8"),
    "half a surrogate pair": (file_of(f'{{"\\ud800":{E}}}'.encode(), b"0000"), "UTF-8"),
    "line break in a name": (file_of(f'{{"a\n":{E}}}'.encode(), b"0000"), "control character"),
    "too deep": (file_of(b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}"), "nested too deeply"),
    "NaN": (file_of(b'{"a": NaN}'), "must have dtype"),
    "entry is text": (file_of({"a": "F32"}), "must have dtype"),
    "entry without shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "shape"),
    "dtype is a number": (file_of(with_entry(dtype=4), b"0000"), "dtype must be text"),
    "negative": (file_of(with_entry(shape=[-1]), b"0000"), "≥ 0 ([-1])"),
    "minus zero": (file_of(b'{"a":' + E.replace("[1]", "[-0]").encode() + b"}"), "≥ 0"),
    "bool": (file_of(with_entry(shape=[True]), b"0000"), "≥ 0 ([True])"),
    "float": (file_of(with_entry(shape=[1.0]), b"0000"), "≥ 0 ([1.0])"),
    "shape is text": (file_of(with_entry(shape="1"), b"0000"), "list of whole numbers"),
    "10,000 digits": (file_of(f'{{"a":{E.replace("1", "1" * 10**4)}}}'.encode()), "≥ 0 ([inf])"),
    "overflow": (file_of(with_entry(shape=[2**62, 2**62]), b"0000"), "2^63 - 1 elements"),
    "dimension beyond 64 bits": (file_of(with_entry(shape=[2**64]), b"0000"), "2^63 - 1"),
    "one offset": (file_of(with_entry(data_offsets=[4]), b"0000"), "[begin, end]"),
    "three offsets": (file_of(with_entry(data_offsets=[0, 4, 4]), b"0000"), "[begin, end]"),
    "end before begin": (file_of(with_entry(data_offsets=[4, 0]), b"0000"), "begin ≤ end"),
    "bool offsets": (file_of(with_entry(data_offsets=[False, 4]), b"0000"), "begin ≤ end"),
    "too few bytes": (file_of(with_entry(data_offsets=[0, 2]), b"00"), "takes 4 bytes"),
    "too many bytes": (file_of(with_entry(data_offsets=[0, 8]), b"0" * 8), "takes 4 bytes"),
    "half a byte": (
        file_of({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, b"00"),
        "whole bytes",
    ),
    "behind the end": (file_of({"a": F32}, b"000"), "take 4 bytes, the file holds 3"),
    "left over": (file_of({"a": F32}, b"00000"), "1 bytes at the end"),
    "left over, no tensors": (file_of({}, b"0"), "1 bytes at the end"),
    "hole at the start": (file_of(with_entry(data_offsets=[4, 8]), b"0" * 8), "leaves a hole"),
    "overlap": (
        file_of({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, b"0" * 6),
        "overlaps the tensor before it (must begin at 4)",
    ),
    "same bytes twice": (file_of({"a": F32, "b": F32}, b"0000"), "overlaps"),
    "empty tensor inside another": (
        file_of({"a": F32, "b": {**EMPTY, "data_offsets": [2, 2]}}, b"0000"),
        "overlaps",
    ),
    "metadata is a list": (file_of({"__metadata__": []}), "text to text"),
    "metadata of numbers": (file_of({"__metadata__": {"n": 1}}), "text to text ({'n': 1})"),
    "metadata is a tensor": (file_of({"__metadata__": F32}, b"0000"), "text to text"),
    "field twice": (file_of(b'{"a":{"dtype":"F32",' + E[1:].encode() + b"}", b"0000"), "twice"),
}

#: What safetensors accepts and we do not, and why.
STRICTER: dict[str, tuple[bytes, str]] = {
    # other readers would keep the first
    "name twice": (file_of(f'{{"a":{E},"a":{E}}}'.encode(), b"0000"), "twice ('a')"),
    "text twice": (file_of(b'{"__metadata__":{"x":"1","x":"2"}}'), "twice ('x')"),
    # a copy would lose what the field says
    "unknown field": (file_of(with_entry(strides=[1]), b"0000"), "and no more"),
    # accidents of its parser, against its own format
    "metadata null": (file_of({"__metadata__": None}), "text to text"),
    "entry as a list": (file_of({"a": ["F32", [1], [0, 4]]}, b"0000"), "must have dtype"),
    "dtype as an object": (file_of(with_entry(dtype={"F32": None}), b"0000"), "must be text"),
    "leading space": (file_of(b" {}"), "begins with"),
    # torch could not hold the shape
    "zero of very many": (
        file_of(with_entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])),
        "2^63 - 1",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_as_by_safetensors(name: str) -> None:
    assert theirs(ACCEPTED[name])
    read(ACCEPTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_by_safetensors(name: str) -> None:
    content, message = REFUSED[name]
    assert not theirs(content)
    with pytest.raises(CheckpointError, match=r"^f") as error:
        read(content)
    assert message in str(error.value)


@pytest.mark.parametrize("name", STRICTER)
def test_refused_though_safetensors_accepts(name: str) -> None:
    content, message = STRICTER[name]
    assert theirs(content)
    with pytest.raises(CheckpointError, match=r"^f") as error:
        read(content)
    assert message in str(error.value)


def test_unknown_dtype_is_accepted_with_its_bytes() -> None:
    content = file_of({"a": {"dtype": "F99", "shape": [3], "data_offsets": [0, 7]}}, b"1234567")
    assert not theirs(content)
    assert read(content).tensors == (TensorInfo("a", "F99", (3,), 7),)


def test_offsets_count_from_the_start_of_the_file() -> None:
    content = ACCEPTED["order of offsets, not of names"]
    header = read(content)
    assert [info.name for info in header.tensors] == ["b", "a"]
    assert [content[o : o + 4] for o in header.offsets] == [b"0000", b"1111"]


def test_all_faults_are_told_at_once_and_ten_are_shown() -> None:
    entries = {f"t{i}": {**F32, "shape": [-1]} for i in range(25)}
    with pytest.raises(CheckpointError) as error:
        read(file_of(entries))
    assert len(error.value.problems) == 11
    assert error.value.problems[-1] == "... and 15 more"


def test_errors_are_short_and_escaped_whatever_the_names() -> None:
    with pytest.raises(CheckpointError) as error:
        read(file_of({"\x1b[31m" + "x" * 10**6: 1}))
    assert "\x1b" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_duplicate_keys_among_many_are_found_quickly() -> None:
    names = [*range(200_000), 199_999]
    text = "{" + ",".join(f'"{n}":1' for n in names) + "}"
    with pytest.raises(CheckpointError, match=r"twice \('199999'\)"):
        load_object(text.encode(), "f")


def test_a_header_of_100_000_tensors_is_read_in_about_a_second() -> None:
    name = "model.layers.{}.mlp.experts.{}.gate_proj.weight".format
    tensors = [TensorInfo.of(name(i // 500, i % 500), "BF16", (4, 8)) for i in range(100_000)]
    encoded = encode_header(tensors, {"format": "pt"})
    began = time.process_time()
    header = parse_header(encoded[8:], len(encoded) + sum(t.nbytes for t in tensors), "f")
    assert time.process_time() - began < 5  # 0.9 s where it was written
    assert header.tensors == tuple(tensors)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda name: name != "__metadata__"
)
infos = st.builds(
    lambda dtype, shape: (dtype, (*shape, 8)),
    st.sampled_from(sorted(DTYPE_BITS)),
    st.lists(st.integers(0, 3), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, infos, max_size=5), st.dictionaries(names, names, max_size=2))
def test_what_is_encoded_is_read_back_by_us_and_by_safetensors(
    tensors: dict[str, Any], metadata: dict[str, str]
) -> None:
    wanted = [TensorInfo.of(name, *rest) for name, rest in tensors.items()]
    encoded = encode_header(wanted, metadata)
    assert len(encoded) % 8 == 0
    content = encoded + bytes(sum(t.nbytes for t in wanted))
    assert theirs(content)
    header = read(content)
    # Empty tensors share their offset with a neighbour, so that only the rest has an order.
    assert sorted(header.tensors, key=lambda t: t.name) == sorted(wanted, key=lambda t: t.name)
    assert [t for t in header.tensors if t.nbytes] == [t for t in wanted if t.nbytes]
    assert header.metadata == metadata


small = st.one_of(st.integers(-1, 9), st.booleans(), st.floats(), st.none(), st.just(2**63))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "BOOL", "F6_E2M3"]),
        "shape": st.lists(st.one_of(st.integers(0, 4), small), max_size=3),
        "data_offsets": st.lists(st.one_of(st.integers(0, 16), small), min_size=2, max_size=2),
    }
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | small, max_size=3),
    st.integers(0, 16),
)
def test_same_verdict_as_safetensors_on_almost_valid_headers(
    header: dict[str, Any], data: int
) -> None:
    content = file_of(header, bytes(data))
    null = "__metadata__" in header and header["__metadata__"] is None
    if not null and "__metadata__" not in header:
        assert ours(content) == theirs(content)
    elif ours(content):
        assert theirs(content)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused_and_never_where_safetensors_refuses(
    data: st.DataObject,
) -> None:
    whole = bytearray(
        file_of({"__metadata__": {"k": "v"}, "a": F32, "b": {**F32, "data_offsets": [4, 8]}})
        + bytes(8)
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=2) | st.sampled_from([b'"', b"}", b"[", b"-", b"0", b"9", b"\\u"])
        )
    content = bytes(whole)
    if not ours(content):
        return
    known = all(info.dtype in DTYPE_BITS for info in read(content).tensors)
    assert theirs(content) == known


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.booleans())
def test_any_bytes_are_read_or_refused(text: bytes, as_object: bool) -> None:
    content = file_of(b"{" + text if as_object else text)
    if ours(content):
        assert theirs(content)
    for raw in (text, b'{"weight_map":' + text + b"}"):
        with contextlib.suppress(CheckpointError):
            assert all(isinstance(file, str) for file in parse_index(raw, "i").values())


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        names,
        st.one_of(
            st.just("model-1.safetensors"),
            st.builds("{}.safetensors".format, names),
            st.sampled_from(["../x.safetensors", "/x.safetensors", "C:x.safetensors", "x.bin"]),
            st.integers(),
        ),
    )
)
def test_index_names_never_leave_the_folder(weight_map: dict[str, Any]) -> None:
    try:
        found = parse_index(json.dumps({"weight_map": weight_map}).encode(), "i")
    except CheckpointError:
        return
    folder = Path("/a/b")
    assert all((folder / file).parent == folder for file in found.values())
    assert found == weight_map


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
        "x.bin",
        ".safetensors/..",
        "",
        7,
        None,
    ],
)
def test_index_file_names_are_plain(name: object) -> None:
    text = json.dumps({"weight_map": {"a": "ok.safetensors", "b": name}}).encode()
    with pytest.raises(CheckpointError, match="same folder") as error:
        parse_index(text, "i")
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "must be a JSON object"),
        (b"{}", "weight_map"),
        (b'{"weight_map": []}', "weight_map"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
    ],
)
def test_not_an_index(text: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_index(text, "i")


def test_config_json_may_hold_what_python_writes() -> None:
    """`Infinity` stands in published configs (`time_step_limit`)."""
    found = load_object(b'{"time_step_limit": [0.0, Infinity]}', "config.json")
    assert math.isinf(found["time_step_limit"][1])
