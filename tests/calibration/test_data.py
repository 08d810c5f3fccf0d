"""Text in all its forms, and what is wrong with it, said before anything is opened.

Run: pytest tests/calibration/test_data.py
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_compose.calibration.data import Domain, domains_of, parse_domains, read_domains
from moe_compose.calibration.tokens import TokenSet, tokenise
from moe_compose.errors import OptionError


class Words:
    """A tokenizer: one id a word, and 1 before each text."""

    bos_token_id, pad_token_id, chat_template = 1, 0, "yes"

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        body = [2 + zlib_id(word) for word in text.split()]
        return {"input_ids": [1, *body] if add_special_tokens else body}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        return " ".join(f"<{m['role']}> {m['content']}" for m in messages)


def zlib_id(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "little") % 90


def read_one(path: Path) -> Domain:
    return read_domains({"x": [path]})[0]


def test_documents_of_all_kinds(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("one two<|endoftext|>\n<|endoftext|>three", encoding="utf-8")
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbfvier", mtime=0))
    lines = tmp_path / "c.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    lines.write_text('{"text": "five"}\n\n' + json.dumps({"messages": chat}) + "\n")
    found = read_domains({"x": [plain, packed], "y": [lines]})
    assert [d.name for d in found] == ["x", "y"]
    assert found[0].documents == ("one two", "three", "vier")
    assert found[1].documents == ("five", (chat[0],))
    assert found[0].files[0].sha256 == hashlib.sha256(plain.read_bytes()).hexdigest()
    assert found[0].files[1].name == "b.txt.gz"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n<|endoftext|> ", "holds no text"),
        ("a.txt", b"GIF89a\0\0", "binary, not text .a zero byte at 6"),
        ("a.txt", b"ok\nK\xf6ln", r"not UTF-8 text .byte 0xf6 at 4, line 2"),
        ("a.txt.gz", b"plain", "no gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "no gzip file"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": 1}', r"a.jsonl:2: neither 'text' nor .*'txt'"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: text must be a string, not int"),
        ("a.jsonl", b'["a"]', "a.jsonl:1: an object is expected, not list"),
        ("a.jsonl", b'{"text": "a"', "a.jsonl:1: Expecting"),
        ("a.jsonl", b'{"messages": [{"content": "a"}]}', "a.jsonl:1: messages must be a list"),
        ("a.jsonl", b"x\n" * 9, "and 4 more lines"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        read_one(path)


def test_all_bad_files_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(OptionError) as caught:
        read_domains({"x": [tmp_path / "empty.txt"], "y": [tmp_path / "none.txt"]})
    assert "empty.txt holds no text" in str(caught.value)
    assert "cannot read none.txt: No such file" in str(caught.value)


@pytest.mark.parametrize(
    ("domains", "data", "message"),
    [
        ([], [], "there is no text"),
        (["a=b"], ["c"], "both --domain and --data"),
        (["a", "=b", "c=", "a/b=c"], [], "--domain a/b=c: it must be name=FILE"),
    ],
)
def test_bad_words(domains: list[str], data: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_domains(domains, data)


def test_words() -> None:
    assert parse_domains(["a=x=1.txt", "b=y", "a=z"]) == {"a": ["x=1.txt", "z"], "b": ["y"]}
    assert parse_domains(data=["x", "y"]) == {"text": ["x", "y"]}


def test_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OptionError, match=r"needs the package datasets.*not installed"):
        read_domains({"x": ["hf:org/name:train:text"]})
    with pytest.raises(OptionError, match="hf:org/name:split:column"):
        read_domains({"x": ["hf:org/name"]})
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return [{"text": "a b"}, {"text": ""}, {"text": "c"}]

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    [found] = read_domains({"x": ["hf:org/name/sub@v1:train:text"]})
    assert found.documents == ("a b", "c")
    assert asked[0][0] == ("org/name", "sub")
    assert asked[0][1] == {"revision": "v1", "split": "train", "streaming": True}
    with pytest.raises(OptionError, match=r"row 0 has no column 'body' \(text\)"):
        read_domains({"x": ["hf:org/name:train:body"]})


TEXTS = {"en": [" ".join(f"w{i}" for i in range(n)) for n in (3, 40, 100)], "de": ["a b c d e f"]}


def test_sequences_are_parts_of_documents() -> None:
    found = tokenise(domains_of(TEXTS), Words(), tokens=60, seq_len=16, seed=3)
    assert found.tokens == {"en": 30, "de": 7}
    assert all(2 <= len(s.ids) <= 16 and s.ids[0] == 1 for s in found.sequences)
    assert {s.half for s in found.sequences if s.domain == 0} == {0, 1}
    again = tokenise(domains_of(TEXTS), Words(), tokens=60, seq_len=16, seed=3)
    other = tokenise(domains_of(TEXTS), Words(), tokens=60, seq_len=16, seed=4)
    assert found.digest() == again.digest() != other.digest()


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    tokens=st.integers(2, 200),
    seq_len=st.integers(2, 20),
    size=st.integers(1, 5),
)
def test_no_token_is_lost_or_made(lengths: list[int], tokens: int, seq_len: int, size: int) -> None:
    texts = [" ".join(["w"] * n) for n in lengths]
    found = tokenise(domains_of(texts), Words(), tokens=tokens, seq_len=seq_len)
    total = sum(found.tokens.values())
    assert total <= tokens
    assert total == sum(int(rows.real.sum()) for rows in found.batches(size))
    order = [i for rows in found.batches(size) for i in rows.sequence_B.tolist()]
    assert sorted(order) == list(range(len(found.sequences)))


def test_batches_are_padded_on_the_right() -> None:
    found = TokenSet.of_ids({"a": [[5, 6], [7, 8, 9]], "b": [[4, 4, 4]]}, padding=0)
    first, second = found.batches(2)
    assert first.batch.ids.tolist() == [[7, 8, 9], [4, 4, 4]] and first.batch.mask is None
    assert second.batch.ids.tolist() == [[5, 6]] and second.domain_B.tolist() == [0]
    [rows] = found.batches(3)
    assert rows.batch.ids[2].tolist() == [5, 6, 0]
    assert rows.real.tolist()[2] == [True, True, False]


@pytest.mark.parametrize(
    ("texts", "sizes", "message"),
    [
        (["a b c"], {"tokens": 1, "seq_len": 1}, "seq_len .1. must be at least 2"),
        (["a b c"], {"tokens": 20, "seq_len": 8, "vocabulary": 30}, "beyond the model's vocab"),
        ([""], {"tokens": 20, "seq_len": 8}, "holds no text"),
        ("abc", {"tokens": 20, "seq_len": 8}, "is one string"),
    ],
)
def test_text_that_cannot_be_run(texts: Any, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tokenise(domains_of(texts), Words(), **sizes)


def test_too_short() -> None:
    short = Domain("x", ("word",))

    class Bare(Words):
        def __call__(self, text: str, **rest: Any) -> Any:
            return {"input_ids": [7] * len(text.split())}

    with pytest.raises(OptionError, match="x is too short: no document has 2 tokens"):
        tokenise([short], Bare(), tokens=10, seq_len=4)


def test_chats_go_through_the_template() -> None:
    chat = ({"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"})
    found = tokenise([Domain("x", (chat,))], Words(), tokens=10, seq_len=8)
    assert len(found.sequences[0].ids) == 5, "<user> a b <assistant> c, and no other 1 before it"
    tokenizer = Words()
    tokenizer.chat_template = None  # type: ignore[assignment]
    with pytest.raises(OptionError, match=r"x holds chats, and .* has no chat template"):
        tokenise([Domain("x", (chat,))], tokenizer, tokens=10, seq_len=8)


def test_the_sample_is_the_same_however_it_is_batched() -> None:
    from moe_compose.calibration.sampling import sample_of

    ids = {"a": [list(range(n)) for n in (9, 3, 20)], "b": [[50 + i for i in range(4)]]}
    tokens, drawn = TokenSet.of_ids(ids), []
    for size in (1, 2, 4):
        rows = tokens.batches(size)
        found: dict[int, tuple[int, int]] = {}
        for batch, (places, slots) in sample_of(rows, 12, seed=1).items():
            width = rows[batch].batch.ids.shape[1]
            for place, slot in zip(places.tolist(), slots.tolist(), strict=True):
                row, column = divmod(place, width)
                assert bool(rows[batch].real[row, column])
                found[slot] = int(rows[batch].sequence_B[row]), column
        assert sorted(found) == list(range(12)) and len(set(found.values())) == 12
        drawn.append(found)
    assert drawn[0] == drawn[1] == drawn[2]
    assert sum(s == 3 for s, _ in drawn[0].values()) == 4, "all of the short domain"
    assert sum(len(p) for p, _ in sample_of(tokens.batches(2), 99, seed=1).values()) == 36
