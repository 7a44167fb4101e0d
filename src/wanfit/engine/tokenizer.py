"""Text to token ids: the cleaning that Wan's authors use, then a `tokenizer.json`.

Any model of the `tokenizers` library will do, as long as it ends a text with `</s>` and has an
`<unk>`: the Unigram vocabulary of google/umt5-xxl, or the few hundred words of a demo model. Left
out: padding, since the encoder runs on the true length.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

import ftfy
from tokenizers import Tokenizer

from wanfit.errors import WeightsBroken, WeightsMissing
from wanfit.specs import TEXT_TOKENS

END_OF_TEXT = "</s>"  # T5's names of the two special tokens that we need
UNKNOWN = "<unk>"
TOKENIZER_FILE = "tokenizer.json"

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

    def __init__(self, tokenizer_json: Path) -> None:
        """`tokenizer_json`: the file, or a directory that holds it.

        Raises WeightsMissing when it is not there, WeightsBroken when it is not a tokenizer that
        ends a text with `</s>`.
        """
        path = tokenizer_json / TOKENIZER_FILE if tokenizer_json.is_dir() else tokenizer_json
        if not path.is_file():
            raise WeightsMissing(
                f"There is no tokenizer at {path}",
                hint="A sentencepiece file alone (spiece.model) is not read; add tokenizer.json",
            )
        self._tokenizer = _read(path)
        # Both are often stored in the file; the length is ours to choose.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        end = self._tokenizer.token_to_id(END_OF_TEXT)
        if end is None or self._tokenizer.encode("").ids != [end]:
            raise WeightsBroken(
                f"{path} does not end a text with {END_OF_TEXT}",
                hint="It is not the tokenizer of a UMT5 encoder",
            )
        self._end_id: int = end
        self._unknown_id: int | None = self._tokenizer.token_to_id(UNKNOWN)

    @property
    def vocab_size(self) -> int:
        """How many ids there are; the encoder's table must have at least as many rows."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

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


def _read(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
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
