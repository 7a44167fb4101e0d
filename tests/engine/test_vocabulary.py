"""Tokenizers out of weight files, against sentencepiece itself and transformers' T5Tokenizer."""

from __future__ import annotations

import array
import io
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.engine.tiny_models import reference_class
from wanfit.engine.tokenizer import TextTokenizer
from wanfit.engine.weights import vocabulary
from wanfit.engine.weights.container import open_container
from wanfit.engine.weights.vocabulary import from_gguf, from_sentencepiece
from wanfit.errors import WeightsBroken

CORPUS = (
    "A red circle moves over the blue wall, 2024 times; 1000 stars fall slowly to the left.",
    "The quick brown fox jumps over the lazy dog while it rains on the old harbour town.",
    "Two anthropomorphic cats in comfy boxing gear fight intensely on a spotlighted stage.",
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量",  # noqa: RUF001
    "Schöne Grüße aus München, où l'été est très élégant; señor, mañana ¿qué tal?",
)
TEXTS = [
    "",
    " ",
    "   \t ",
    "a red circle",
    "  a  red   circle moves  ",
    "the  lazy dog 1024 times, 3.14",
    "色调艳丽，过曝 red 画面 鑫",  # noqa: RUF001
    "full width ｆｕｌｌ ＷＩＤＴＨ ① ﬁne ½",  # noqa: RUF001
    "a\u3000b\u00a0c\u200bd",
    "cat 🐈 and 👩‍👩‍👧 and 🦓🦓",
    "schön e\u0301te\u0301 mañana",
    "tab\there\nand there",
    "Привет мир नमस्ते สวัสดี",
    "\u2581already marked \u2581 so",
    "zzzzqqqq xkcd QQQ",
    "the red" * 60,
]
# The smallest vocabulary that is read.
GOOD = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁a", -1.0, 1), ("a", -2.0, 1)]
# What sentencepiece and the tokenizers library are both known to read alike, without the clusters
# of combining marks that the latter cleans one at a time.
PLAIN = st.text(
    st.one_of(
        st.sampled_from("aeiou thrdsln  .,19"),
        st.sampled_from("色调画éüñ🐈ａＡ①\u3000\u00a0"),
        st.characters(categories=["Lu", "Ll", "Nd", "Po"], max_codepoint=0xFFFF),
    ),
    max_size=60,
)


def trained(**options: Any) -> bytes:
    """A small sentencepiece model; ids as google/umt5-xxl has them unless told."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=out, hard_vocab_limit=False,
        minloglevel=2, num_threads=1,
        **{
            "model_type": "unigram", "vocab_size": 420, "character_coverage": 0.98,
            "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, **options,
        },
    )  # fmt: skip
    return out.getvalue()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"normalization_rule_name": "identity"},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "nfkc_cf": {"normalization_rule_name": "nfkc_cf"},
    "bytes": {"byte_fallback": True, "vocab_size": 600},
    "keep_spaces": {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    "no_prefix": {"add_dummy_prefix": False},
    "across_words": {"split_by_whitespace": False, "remove_extra_whitespaces": False},
}


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return {kind: trained(**options) for kind, options in KINDS.items()}


def spoken(proto: bytes, text: str) -> list[int]:
    """What sentencepiece itself makes of it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    return [*processor.encode(text), processor.eos_id()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_those_of_sentencepiece(kind: str, text: str, models: dict[str, bytes]) -> None:
    assert from_sentencepiece(models[kind]).encode(text).ids == spoken(models[kind], text)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_those_of_sentencepiece_for_any_text(kind: str, models: dict[str, bytes]) -> None:
    ours = from_sentencepiece(models[kind])

    @settings(deadline=None, max_examples=150)
    @given(PLAIN)
    @example(" 1  2 ")
    def compare(text: str) -> None:
        assert ours.encode(text).ids == spoken(models[kind], text)

    compare()


def test_the_models_above_differ_where_they_should(models: dict[str, bytes]) -> None:
    """Or the comparisons would prove less than they say."""
    ids = {kind: from_sentencepiece(model).encode("Ａ  🦓").ids for kind, model in models.items()}  # noqa: RUF001
    assert 3 in ids["plain"]
    assert 3 not in ids["bytes"]
    assert len(ids["bytes"]) > len(ids["nfkc"])
    assert len(ids["keep_spaces"]) > len(ids["plain"])
    text = "a red circle"
    assert (
        from_sentencepiece(models["no_prefix"]).encode(text).ids
        != from_sentencepiece(models["nfkc"]).encode(text).ids
    )


@pytest.mark.parametrize("text", [*TEXTS[:13], "a </s> b", "a<one>b <two>", "x <unk> y<pad>"])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_ids_equal_those_of_transformers(text: str, rule: str) -> None:
    """Its T5Tokenizer, which wants `<unk>` third; special and user-defined pieces too."""
    proto = trained(
        unk_id=2, bos_id=-1, normalization_rule_name=rule, user_defined_symbols=["<one>", "<two>"]
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    count = processor.get_piece_size()
    theirs = reference_class("transformers", "T5Tokenizer")(
        vocab=[(processor.id_to_piece(i), processor.get_score(i)) for i in range(count)],
        _spm_precompiled_charsmap=charsmap_of(proto) or None,
        extra_ids=0,
    )
    theirs.add_tokens(["<one>", "<two>"])
    if rule == "identity" and text != " ".join(text.split()):
        text = " ".join(text.split())  # it strips every white space, sentencepiece the blank
    assert from_sentencepiece(proto).encode(text).ids == theirs(text).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_gives_the_same_ids(kind: str, models: dict[str, bytes], tmp_path: Path) -> None:
    """Written with gguf's own writer, as llama.cpp's convert_hf_to_gguf.py does, padding too."""
    path = tmp_path / "umt5.gguf"
    write_gguf(path, models[kind], pads=40)
    ours = from_gguf(open_container(path).metadata)
    for text in [*TEXTS, "[PAD3] [PAD39]"]:
        assert ours.encode(text).ids == spoken(models[kind], text)


@pytest.mark.parametrize("text", ["abcd", "abcd gone abcd", "gone", "aabcdd x"])
def test_a_score_of_an_unused_piece_changes_no_text(text: str) -> None:
    """Of padding: -1000. `abc` and an unknown `d` stay better than `a`, `b`, `cd`."""
    pieces = [
        *GOOD[:3], ("▁", -2.0, 1), ("a", -10.0, 1), ("b", -10.0, 1), ("cd", -10.0, 1),
        ("abc", -1.0, 1), ("gone", -1000.0, 5), ("go", -3.0, 1), ("ne", -3.0, 1),
    ]  # fmt: skip
    proto = proto_of(pieces)
    assert from_sentencepiece(proto).encode(text).ids == spoken(proto, text)
    assert from_gguf(metadata_of(pieces)).encode(text).ids == spoken(proto, text)


def test_an_unknown_word_is_told_as_typed(models: dict[str, bytes]) -> None:
    ours = TextTokenizer.of(from_sentencepiece(models["nfkc"]))
    assert ours.encode("a  red 🦓 circle").unknown_words == ("🦓",)
    assert ours.encode("a red circle").unknown_words == ()
    assert ours.encode("the mаn, red").unknown_words == ("mаn",)  # noqa: RUF001  a Cyrillic a


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_as_a_tokenizer_json_reads_the_same(
    kind: str, models: dict[str, bytes], tmp_path: Path
) -> None:
    ours = TextTokenizer.of(from_sentencepiece(models[kind]))
    path = tmp_path / "tokenizer.json"
    path.write_text(ours.json(), encoding="utf-8")
    again = TextTokenizer(path)
    assert again.vocab_size == ours.vocab_size
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text)


def test_as_many_pieces_as_umt5_has_take_seconds() -> None:
    """256,300 pieces, 256 bytes among them: 2 to 4 s of two shared cores; the limit has room."""
    words = [f"▁{i:x}" if i % 3 else f"画{i:x}" for i in range(256_040)]
    pieces = [
        ("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<s>", 0.0, 3), ("<unk>", 0.0, 2),
        *((f"<0x{i:02X}>", 0.0, 6) for i in range(256)),
        *((word, -1.0 - i / 2**16, 1) for i, word in enumerate(words)),
    ]  # fmt: skip
    proto = proto_of(pieces)
    begin_s = time.process_time()
    tokenizer = TextTokenizer.of(from_sentencepiece(proto))
    assert time.process_time() - begin_s < 20
    assert tokenizer.vocab_size == 256_300
    assert tokenizer.encode("3e81 🐈").ids[-1] == 1


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "match"),
    [
        ([], "no </s>"),
        (GOOD[1:2], r"has \[\] as unknown pieces"),
        (GOOD[2:], "and no </s>"),
        ([*GOOD, ("<unk2>", 0.0, 2)], "<unk2>.* as unknown pieces"),
        ([*GOOD, ("a", -1.0, 1)], "has the piece 'a' 2 times"),
        ([*GOOD, ("", -1.0, 1)], "has 0 characters as its piece 5"),
        ([*GOOD, ("b", float("nan"), 1)], "score nan"),
        ([*GOOD, ("b", float("-inf"), 1)], "score -inf"),
        ([*GOOD, ("b", -1.0, 9)], "type 9"),
        ([*GOOD, ("<0x00>", -1.0, 6)], "has 1 pieces of bytes"),
        ([*GOOD, *((f"<{i}>", -1.0, 6) for i in range(256))], "has 256 pieces of bytes"),
        ([*GOOD, ("b" * 5000, -1.0, 1)], "has 5000 characters"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(
    pieces: list[tuple[str, float, int]], match: str
) -> None:
    """From both containers alike."""
    with pytest.raises(WeightsBroken, match=match):
        from_sentencepiece(proto_of(pieces))
    with pytest.raises(WeightsBroken, match=match):
        from_gguf(metadata_of(pieces))


def test_the_smallest_vocabulary_is_read() -> None:
    """So that the refusals here are for what they say."""
    assert from_sentencepiece(proto_of(GOOD)).encode("aa").ids == [3, 4, 1]
    assert from_gguf(metadata_of(GOOD)).encode("aa").ids == [3, 4, 1]


def test_other_kinds_of_sentencepiece_models_are_refused() -> None:
    with pytest.raises(WeightsBroken, match="model type 2, and UMT5's is 1"):
        from_sentencepiece(trained(model_type="bpe", vocab_size=200))
    with pytest.raises(WeightsBroken, match="puts spaces behind words"):
        from_sentencepiece(trained(treat_whitespace_as_suffix=True))


def test_any_change_to_a_sentencepiece_model_is_read_or_refused(models: dict[str, bytes]) -> None:
    """Cut anywhere, or with some bytes changed: WeightsBroken or a tokenizer, nothing else."""
    whole = models["nfkc"]
    table = whole.index(charsmap_of(whole))
    places = st.one_of(
        st.integers(0, len(whole) - 1),
        st.integers(0, 9000),
        st.integers(table - 8, table + 40_000),
    )

    @settings(deadline=None, max_examples=300)
    @given(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6), places, st.booleans())
    def check(changes: list[tuple[int, int]], cut: int, is_cut: bool) -> None:
        content = bytearray(whole)
        for at, byte in changes:
            content[at] = byte
        assert_read_or_refused(bytes(content[:cut] if is_cut else content))

    check()


@settings(deadline=None)
@given(st.binary(max_size=200))
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
@example(b"\xff" * 20)
def test_any_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(WeightsBroken):
        from_sentencepiece(content)


def assert_read_or_refused(content: bytes) -> None:
    try:
        tokenizer = from_sentencepiece(content)
    except WeightsBroken:
        return
    for text in TEXTS:  # the library's Rust would panic on a table that leads out of itself
        tokenizer.encode(text)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        (b"\x01", "of 1 bytes"),
        (struct.pack("<I", 2048) + bytes(1024), "of 1028 bytes, 2048 its trie"),
        (struct.pack("<I", 1024) + b"\xff" * 1024, "points out of itself"),
        (struct.pack("<I", 1024) + bytes(1024) + b"\xff\0", "not UTF-8"),
    ],
)
def test_a_table_of_characters_that_would_panic_is_refused(table: bytes, match: str) -> None:
    with pytest.raises(WeightsBroken, match=match):
        from_gguf(metadata_of(GOOD, precompiled_charsmap=array.array("B", table)))


@pytest.mark.parametrize(
    ("start", "fits"), [(0, True), (1, False), (2, True), (3, True), (4, False)]
)
def test_where_the_texts_of_a_table_begin_is_checked(start: int, fits: bool) -> None:
    """A trie of one rule, "a" becomes the text at `start` of "é", NUL: byte 1 is within the é."""
    units = [0] * 256
    units[ord("a")] = 1 << 10 | 1 << 8 | ord("a")  # its leaf lies at 0x61 ^ 1
    units[ord("a") ^ 1] = 1 << 31 | start
    content = struct.pack("<257I", 1024, *units) + "é\0".encode()
    metadata = metadata_of([*GOOD, ("é", -1.0, 1)], precompiled_charsmap=array.array("B", content))
    if not fits:
        with pytest.raises(WeightsBroken, match="points out of itself"):
            from_gguf(metadata)
    elif start == 0:
        assert from_gguf(metadata).encode("a").ids == [2, 5, 1]  # no piece is "▁" alone
    else:
        assert from_gguf(metadata).encode("a").ids == [1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": "llama"}, "vocabulary of kind 'llama'"),
        ({"model": None}, "vocabulary of kind None"),
        ({"tokens": None}, "no list of str as tokenizer.ggml.tokens"),
        ({"tokens": array.array("f", [1.0])}, "no list of str"),
        ({"tokens": ["a"]}, "1 tokens, 5 scores and 5 types"),
        ({"scores": array.array("i", [1] * 5)}, "no list of float"),
        ({"token_type": "abc"}, "no list of int"),
        ({"add_space_prefix": None}, "None as tokenizer.ggml.add_space_prefix"),
        ({"remove_extra_whitespaces": 1}, "1 as tokenizer.ggml.remove_extra_whitespaces"),
        ({"eos_token_id": 5}, "5 as tokenizer.ggml.eos_token_id, of 5"),
        ({"eos_token_id": 0}, "ends a text with '<pad>'"),
        ({"unknown_token_id": -1}, "-1 as tokenizer.ggml.unknown_token_id"),
        ({"unknown_token_id": 4}, "unknown pieces"),
        ({"precompiled_charsmap": ["a"]}, "no bytes"),
        ({"precompiled_charsmap": array.array("i", [1])}, "no bytes"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(WeightsBroken, match=match):
        from_gguf(metadata_of(GOOD, **change))


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MAX_PIECES", 4)
    with pytest.raises(WeightsBroken, match="more than 4 pieces"):
        from_sentencepiece(proto_of(GOOD))
    with pytest.raises(WeightsBroken, match="over 4"):
        from_gguf(metadata_of(GOOD))
    monkeypatch.setattr(vocabulary, "MAX_PROTO_BYTES", 10)
    with pytest.raises(WeightsBroken, match="at most 10 are read"):
        from_sentencepiece(proto_of(GOOD))


# --- the files ------------------------------------------------------------------------------------


def proto_of(pieces: list[tuple[str, float, int]]) -> bytes:
    """A ModelProto of these pieces, everything else left to its default."""
    out = bytearray()
    for text, score, kind in pieces:
        raw = text.encode()
        message = b"\x0a" + varint(len(raw)) + raw + b"\x15" + struct.pack("<f", score)
        message += b"\x18" + varint(kind)
        out += b"\x0a" + varint(len(message)) + message
    return bytes(out)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def charsmap_of(proto: bytes) -> bytes:
    """The precompiled_charsmap of a trained model, through the reader under test."""
    normalizer = dict(vocabulary._fields(proto, ""))[3]
    assert isinstance(normalizer, bytes)
    value = dict(vocabulary._fields(normalizer, "")).get(2, b"")
    assert isinstance(value, bytes)
    return value


def metadata_of(pieces: list[tuple[str, float, int]], **change: Any) -> dict[str, Any]:
    found = {
        "model": "t5", "tokens": [text for text, _, _ in pieces],
        "scores": array.array("f", [score for _, score, _ in pieces]),
        "token_type": array.array("i", [kind for _, _, kind in pieces]),
        "add_space_prefix": True, "remove_extra_whitespaces": True,
    } | change  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def write_gguf(path: Path, proto: bytes, pads: int) -> None:
    """llama.cpp, conversion of T5: its vocabulary, padded to as many rows as the table has."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    normalizer = dict(vocabulary._fields(proto, ""))[3]
    assert isinstance(normalizer, bytes)
    flags = dict(vocabulary._fields(normalizer, ""))
    tokens, scores, kinds = [], [], []
    for i in range(processor.get_piece_size()):
        tokens.append(processor.id_to_piece(i).encode())
        scores.append(processor.get_score(i))
        if processor.is_unknown(i):
            kinds.append(2)
        elif processor.is_control(i):
            kinds.append(3)
        else:
            kinds.append(6 if processor.is_byte(i) else 1)
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + [b"[PAD%d]" % i for i in range(1, pads + 1)])
    writer.add_token_scores(scores + [-1000.0] * pads)
    writer.add_token_types(kinds + [5] * pads)
    writer.add_add_space_prefix(bool(flags.get(3, 1)))
    writer.add_remove_extra_whitespaces(bool(flags.get(4, 1)))
    if charsmap := charsmap_of(proto):
        writer.add_precompiled_charsmap(charsmap)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    writer.add_tensor("enc.output_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
