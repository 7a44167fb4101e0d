"""A tokenizer out of a weight file: from a sentencepiece model, or from GGUF's metadata.

ComfyUI's text encoders carry the bytes of a `spiece.model` in a uint8 tensor, `spiece_model`;
llama.cpp's carry its pieces under `tokenizer.ggml`. Both become the tokenizer that sentencepiece
itself is, put together from what the tokenizers library has, so that it can be written as a
tokenizer.json. From sentencepiece: the order of cleaning (src/normalizer.cc), no splitting into
words, unused pieces never come out (src/unigram_model.cc), bytes for a character that no piece
covers. From transformers' converter for T5: a special piece typed in a text is that piece, and
each stretch of text between two of them begins a word anew.

Left out: BPE vocabularies, and pieces with spaces at the end of words. Known to differ from
sentencepiece: the text "<0x41>" is the piece of that byte, and the library applies the table of
characters to one grapheme after the other, where sentencepiece looks for the longest match (";"
with a combining mark, say, loses the mark). A tokenizer.json of theirs has both differences too.
"""

from __future__ import annotations

import array
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import Unigram

from wanfit.errors import WeightsBroken

END_OF_TEXT = "</s>"  # T5's names of the two special tokens that we need
UNKNOWN_TOKEN = "<unk>"
WORD_START = "\u2581"  # sentencepiece writes a space so

# Ours; google/umt5-xxl has 4,548,313 bytes, 256,000 pieces.
MAX_PROTO_BYTES = 64 * 2**20
MAX_PIECES = 2**20
MAX_PIECE_CHARACTERS = 4096


class Kind(IntEnum):
    """What a piece is: sentencepiece_model.proto, SentencePiece.Type; GGUF's token_type too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_KINDS = frozenset(int(kind) for kind in Kind)
_UNIGRAM = 1  # TrainerSpec.ModelType


class Piece(NamedTuple):
    """One entry of a vocabulary; its id is its place."""

    text: str
    score: float  # logarithm of its probability
    kind: int  # a Kind


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    name: str  # for messages
    pieces: Sequence[Piece]
    charsmap: bytes  # the trie and the texts of NormalizerSpec.precompiled_charsmap; b"": none
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def from_sentencepiece(proto: bytes, *, name: str = "The sentencepiece model") -> Tokenizer:
    """The tokenizer of a serialized sentencepiece ModelProto; it ends a text with `</s>`.

    name: how a message calls it, such as the path. Raises WeightsBroken when it is malformed, has
    more than MAX_PIECES pieces or is no Unigram vocabulary with `</s>` and `<unk>`.

    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    if len(proto) > MAX_PROTO_BYTES:
        _broken(name, f"has {len(proto)} bytes, and at most {MAX_PROTO_BYTES} are read")
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(proto, name):
        if number > 3:
            continue
        if not isinstance(value, bytes):
            _broken(name, f"is not a ModelProto: its field {number} is no message")
        if number == 1:
            pieces.append(_piece(value, name))
            if len(pieces) > MAX_PIECES:
                _broken(name, f"has more than {MAX_PIECES} pieces")
        elif number == 2:
            trainer |= dict(_fields(value, name))
        else:
            normalizer |= dict(_fields(value, name))
    if trainer.get(3, _UNIGRAM) != _UNIGRAM:
        _broken(name, f"is of model type {trainer[3]!r:.40}, and UMT5's is {_UNIGRAM} (Unigram)")
    if trainer.get(24, 0) or not normalizer.get(5, 1):
        _broken(name, "puts spaces behind words, or keeps them, and UMT5's begin words")
    charsmap = normalizer.get(2, b"")
    if not isinstance(charsmap, bytes):
        _broken(name, "has a table of characters that is no bytes")
    return _built(
        _Vocabulary(name, pieces, charsmap, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))
    )


def from_gguf(metadata: Mapping[str, Any], *, name: str = "The GGUF file") -> Tokenizer:
    """The tokenizer in the key-value pairs of a GGUF file, as `Container.metadata` holds them.

    Reads, below "tokenizer.ggml.", as llama.cpp's convert_hf_to_gguf.py writes them for T5: model
    ("t5"), tokens (strings), scores (floats), token_type (Kind), add_space_prefix and
    remove_extra_whitespaces (bools); where they are there, precompiled_charsmap (bytes),
    eos_token_id and unknown_token_id. The padding's id is not needed: nothing is padded here.

    name: how a message calls it, such as the path. Raises WeightsBroken when one is missing or
    malformed, or it is no vocabulary with `</s>` and `<unk>`.
    """
    found = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    if found.get("model") != "t5":
        _broken(name, f"has a vocabulary of kind {found.get('model')!r:.40}, and UMT5's is 't5'")
    tokens = _listed(found, "tokens", str, name)
    scores = _listed(found, "scores", float, name)
    kinds = _listed(found, "token_type", int, name)
    if not len(tokens) == len(scores) == len(kinds) <= MAX_PIECES:
        _broken(
            name,
            f"has {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} types: not the"
            f" same number, or over {MAX_PIECES}",
        )
    unknown = found.get("unknown_token_id")
    if unknown is not None:
        kinds[_id(unknown, tokens, "unknown_token_id", name)] = int(Kind.UNKNOWN)
    end = found.get("eos_token_id")
    if end is not None:
        text = tokens[_id(end, tokens, "eos_token_id", name)]
        if text != END_OF_TEXT:
            _broken(name, f"ends a text with {text[:40]!r}, and UMT5 with {END_OF_TEXT!r}")
    return _built(
        _Vocabulary(
            name,
            [Piece(*piece) for piece in zip(tokens, scores, kinds, strict=True)],
            _charsmap_of(found, name),
            _flag(found, "add_space_prefix", name),
            _flag(found, "remove_extra_whitespaces", name),
        )
    )


# --- the tokenizer --------------------------------------------------------------------------------


def _built(vocabulary: _Vocabulary) -> Tokenizer:
    pieces = vocabulary.pieces
    unknown_id, end_id = _check(vocabulary)
    tokenizer = Tokenizer(
        Unigram(
            [(_spelled(piece), _score(piece)) for piece in pieces],
            unk_id=unknown_id,
            byte_fallback=any(piece.kind == Kind.BYTE for piece in pieces),
        )
    )
    tokenizer.normalizer = _normalizer(vocabulary)
    tokenizer.decoder = decoders.Sequence([
        decoders.ByteFallback(), decoders.Metaspace(WORD_START, prepend_scheme="always"),
    ])  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", END_OF_TEXT],
        pair=["$A", END_OF_TEXT, "$B", END_OF_TEXT],
        special_tokens=[(END_OF_TEXT, end_id)],
    )
    # transformers, SpmConverter.tokenizer; T5's <unk> is special there too.
    tokenizer.add_tokens([
        AddedToken(piece.text, normalized=False, special=piece.kind != Kind.USER_DEFINED)
        for piece in pieces
        if piece.kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    ])  # fmt: skip
    return tokenizer


def _check(vocabulary: _Vocabulary) -> tuple[int, int]:
    """(id of `<unk>`, id of `</s>`)."""
    name, pieces = vocabulary.name, vocabulary.pieces
    for at, piece in enumerate(pieces):
        if not 0 < len(piece.text) <= MAX_PIECE_CHARACTERS:
            _broken(name, f"has {len(piece.text)} characters as its piece {at}")
        if not math.isfinite(piece.score) or piece.kind not in _KINDS:
            _broken(name, f"has the score {piece.score}, type {piece.kind}, for its piece {at}")
    places = {piece.text: at for at, piece in enumerate(pieces)}
    if len(places) < len(pieces):
        ((text, count),) = Counter(piece.text for piece in pieces).most_common(1)
        _broken(name, f"has the piece {text[:40]!r} {count} times")
    num_bytes = sum(piece.kind == Kind.BYTE for piece in pieces)
    if num_bytes and (
        num_bytes != 256
        or any(pieces[places.get(f"<0x{i:02X}>", 0)].kind != Kind.BYTE for i in range(256))
    ):
        _broken(name, f"has {num_bytes} pieces of bytes, and <0x00> to <0xFF> or none belong there")
    unknown = [piece.text for piece in pieces if piece.kind == Kind.UNKNOWN]
    if unknown != [UNKNOWN_TOKEN] or END_OF_TEXT not in places:
        has_end = "" if END_OF_TEXT in places else f", and no {END_OF_TEXT}"
        _broken(name, f"has {unknown[:3]} as unknown pieces, not one {UNKNOWN_TOKEN}{has_end}")
    return places[UNKNOWN_TOKEN], places[END_OF_TEXT]


def _spelled(piece: Piece) -> str:
    """As the library's Unigram knows it, which has no unused pieces: no text ever has a space."""
    return f" {piece.text}" if piece.kind == Kind.UNUSED else piece.text


def _score(piece: Piece) -> float:
    """A score of -1000 on a piece that is not normal must not make unknown characters dearer."""
    return 0.0 if piece.kind in (Kind.UNUSED, Kind.USER_DEFINED) else piece.score


def _normalizer(vocabulary: _Vocabulary) -> normalizers.Normalizer:
    """sentencepiece, Normalizer::Normalize: it knows one white space, the blank."""
    steps: list[normalizers.Normalizer] = []
    if vocabulary.charsmap:
        _check_charsmap(vocabulary.charsmap, vocabulary.name)
        steps.append(normalizers.Precompiled(vocabulary.charsmap))
    if vocabulary.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if vocabulary.add_dummy_prefix:
        steps.append(normalizers.Prepend(WORD_START))
    steps.append(normalizers.Replace(" ", WORD_START))
    return normalizers.Sequence(steps)


def _check_charsmap(charsmap: bytes, name: str) -> None:
    """Raises WeightsBroken for a table that would lead the library out of its own arrays.

    u32 bytes of the trie, the trie (u32 units of darts-clone), texts that each end with a NUL; a
    value in the trie is where its text begins. sentencepiece, Normalizer::DecodePrecompiledCharsMap
    """
    trie_bytes = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or trie_bytes % 1024 or not 0 < trie_bytes <= len(charsmap) - 4:
        _broken(name, f"has a table of characters of {len(charsmap)} bytes, {trie_bytes} its trie")
    texts = charsmap[4 + trie_bytes :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        _broken(name, "has a table of characters that is not UTF-8")
    units = np.frombuffer(charsmap, "<u4", trie_bytes // 4, 4).astype(np.int64)
    inner = units >> 31 == 0  # the others are values
    inner[0] = True  # the root, whatever it says
    children = np.arange(units.size) ^ ((units >> 10) << ((units & (1 << 9)) >> 6))
    leaves = inner & ((units >> 8) & 1 == 1)
    fits = bool(((children | 0xFF) < units.size)[inner].all())
    if fits:
        starts = units[children[leaves]] & 0x7FFFFFFF
        # A text may begin at the end, but not inside of a character.
        begins = np.frombuffer(texts + b"\0", np.uint8) & 0xC0 != 0x80
        fits = bool((starts <= len(texts)).all()) and bool(begins[starts].all())
    if not fits:
        _broken(name, "has a table of characters that points out of itself")


# --- sentencepiece's protobuf ---------------------------------------------------------------------


def _fields(message: bytes, name: str) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field: an int for a varint, else its bytes.

    https://protobuf.dev/programming-guides/encoding
    """
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at, name)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(message, at, name)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at, name)
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
        if size < 0 or at + size > end or tag < 8:
            _broken(name, f"is no whole protobuf: tag {tag}, {size} bytes at {at} of {end}")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int, name: str) -> tuple[int, int]:
    """(value, where it ends)."""
    if at < len(message) and message[at] < 0x80:  # nearly all of a vocabulary's
        return message[at], at + 1
    value = 0
    for place, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    _broken(name, f"is no whole protobuf: a number at byte {at} of {len(message)} does not end")


def _piece(message: bytes, name: str) -> Piece:
    text, score, kind = b"", 0.0, int(Kind.NORMAL)
    for number, value in _fields(message, name):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
        elif number <= 3:
            _broken(name, f"is not a ModelProto: a piece has {value!r:.40} as field {number}")
    try:
        return Piece(text.decode("utf-8"), score, kind)
    except UnicodeDecodeError:
        _broken(name, f"has a piece that is not UTF-8: {text[:40]!r}")


# --- GGUF's key-value pairs -----------------------------------------------------------------------


def _listed(found: Mapping[str, Any], key: str, kind: type, name: str) -> list[Any]:
    """A list, whose items are all of the kind."""
    value = found.get(key)
    items = list(value) if isinstance(value, list | array.array) else None
    if items is None or any(type(item) is not kind for item in items):
        _broken(name, f"has no list of {kind.__name__} as tokenizer.ggml.{key}")
    return items


def _id(value: object, tokens: Sequence[str], key: str, name: str) -> int:
    if type(value) is not int or not 0 <= value < len(tokens):
        _broken(name, f"has {value!r:.40} as tokenizer.ggml.{key}, of {len(tokens)} tokens")
    return value


def _flag(found: Mapping[str, Any], key: str, name: str) -> bool:
    value = found.get(key)
    if not isinstance(value, bool):
        _broken(name, f"has {value!r:.40} as tokenizer.ggml.{key}, and true or false belongs there")
    return value


def _charsmap_of(found: Mapping[str, Any], name: str) -> bytes:
    value = found.get("precompiled_charsmap", array.array("B"))
    if not isinstance(value, array.array) or value.itemsize != 1:
        _broken(name, "has a tokenizer.ggml.precompiled_charsmap that is no bytes")
    return value.tobytes()


def _broken(name: str, what: str) -> NoReturn:
    raise WeightsBroken(
        f"{name} {what}", hint="Name another tokenizer, a tokenizer.json or spiece.model"
    )
