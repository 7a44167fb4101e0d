"""Text to token ids: the cleaning that Wan's authors use, then a vocabulary.

That is a `tokenizer.json`, a `spiece.model`, or what a weight file carries (weights/vocabulary.py).
Any model of the `tokenizers` library will do, as long as it ends a text with `</s>` and has an
`<unk>`: the Unigram vocabulary of google/umt5-xxl, or the few hundred words of a demo model. Left
out: padding, since the encoder runs on the true length.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import ftfy
from tokenizers import Tokenizer

from wanfit.engine.weights.vocabulary import (
    END_OF_TEXT,
    MAX_PROTO_BYTES,
    UNKNOWN_TOKEN,
    from_sentencepiece,
)
from wanfit.errors import WeightsBroken, WeightsMissing
from wanfit.specs import TEXT_TOKENS

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "spiece.model"

_PIECE = b"\x0a"  # what a sentencepiece model begins with: field 1 of its ModelProto
_WHITESPACE = re.compile(r"\s+")
# A word with its inner hyphens and apostrophes, or a sign that carries meaning (an emoji, say):
# nobody misses a semicolon.
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s!-/:-@\[-`{-~]")  # noqa: RUF001


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """One text as the encoder reads it."""

    ids: tuple[int, ...]  # 1 to TEXT_TOKENS of them, the end-of-text token last
    unknown_words: tuple[str, ...] = ()  # as typed, each once, in order
    num_dropped: int = 0  # tokens beyond TEXT_TOKENS, which the model does not see


class TextTokenizer:
    """A vocabulary, read once and used for every prompt."""

    def __init__(self, path: Path) -> None:
        """`path`: a tokenizer.json, a spiece.model, or a directory with one; the first goes first.

        Which of the two a file is, its content says. Raises WeightsMissing when none is there,
        WeightsBroken when it is not a tokenizer that ends a text with `</s>`.
        """
        file = _file(path)
        self._take(_read(file), str(file))

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, name: str = "This vocabulary") -> Self:
        """From what `weights.vocabulary` makes; its padding and its truncation are switched off.

        name: how a message calls it. Raises WeightsBroken when it does not end a text with `</s>`.
        """
        made = cls.__new__(cls)
        made._take(tokenizer, name)
        return made

    def _take(self, tokenizer: Tokenizer, name: str) -> None:
        self._tokenizer = tokenizer
        # Both are often stored in the file; the length is ours to choose.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        end = self._tokenizer.token_to_id(END_OF_TEXT)
        if end is None or self._tokenizer.encode("").ids != [end]:
            raise WeightsBroken(
                f"{name} does not end a text with {END_OF_TEXT}",
                hint="It is not the tokenizer of a UMT5 encoder",
            )
        self._end_id: int = end
        self._unknown_id: int | None = self._tokenizer.token_to_id(UNKNOWN_TOKEN)

    @property
    def vocab_size(self) -> int:
        """How many ids there are; the encoder's table must have at least as many rows."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def json(self) -> str:
        """What a tokenizer.json of it holds; `TextTokenizer` of that file gives the same ids."""
        return str(self._tokenizer.to_str())

    def encode(self, text: str) -> TokenizedText:
        """Cleans and tokenizes one prompt; a long one is cut to TEXT_TOKENS, `</s>` kept last."""
        cleaned = clean_text(text)
        encoding = self._tokenizer.encode(cleaned)
        kept = min(len(encoding.ids), TEXT_TOKENS)
        unknown_spans = [
            span
            for token, span in zip(encoding.ids[:kept], encoding.offsets[:kept], strict=True)
            if token == self._unknown_id
        ]
        return TokenizedText(
            ids=(*encoding.ids[: kept - 1], self._end_id),
            unknown_words=_words_over(cleaned, unknown_spans),
            num_dropped=len(encoding.ids) - kept,
        )


def clean_text(text: str) -> str:
    """Mends mis-decoded text, unescapes HTML twice, and makes every run of white space one space.

    official: wan/modules/tokenizers.py, basic_clean and whitespace_clean.
    """
    mended: str = ftfy.fix_text(text)
    plain = html.unescape(html.unescape(mended)).strip()
    return _WHITESPACE.sub(" ", plain).strip()


def _file(path: Path) -> Path:
    files = [path / TOKENIZER_FILE, path / SENTENCEPIECE_FILE] if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            return file
    raise WeightsMissing(
        f"There is no tokenizer at {files[0]}",
        hint=f"Put a {TOKENIZER_FILE} or a {SENTENCEPIECE_FILE} there",
    )


def _read(path: Path) -> Tokenizer:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_PROTO_BYTES + 1)
    except OSError as error:
        raise WeightsBroken(f"{path} cannot be read: {error.strerror}") from None
    if content.startswith(_PIECE) and not content.lstrip().startswith(b"{"):
        return from_sentencepiece(content, name=str(path))
    if len(content) > MAX_PROTO_BYTES:
        raise WeightsBroken(f"{path} has more than {MAX_PROTO_BYTES} bytes: not a tokenizer")
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # noqa: BLE001  the library raises plain Exception for a bad file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsBroken(f"{path} is not a tokenizer: {reason}") from None


def _words_over(text: str, spans: list[tuple[int, int]]) -> tuple[str, ...]:
    """The words of `text` that a (start, end) span touches, each once, in order.

    A span may be a part of a word (a vocabulary of pieces) or reach into the space before it.
    """
    words = (
        match.group()
        for match in _WORD.finditer(text)
        if any(start < match.end() and match.start() < end for start, end in spans)
    )
    return tuple(dict.fromkeys(words))
