"""Text cleaning, ids and unknown words, against diffusers and transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.checkpoints import tiny_spiece
from tests.engine.tiny_models import (
    WORDS,
    reference_class,
    tiny_tokenizer,
    tiny_unigram_tokenizer,
)
from wanfit.engine.tokenizer import TextTokenizer, TokenizedText, clean_text
from wanfit.engine.weights.vocabulary import MAX_PROTO_BYTES
from wanfit.errors import WeightsBroken, WeightsMissing

MESSY = [
    "",
    "  a  red\tcircle\n\non   blue ",
    "tom &amp;amp; jerry &lt;3",
    "schÃ¶n â€œquotedâ€\x9d",  # UTF-8 read as Latin-1
    "ｆｕｌｌ ｗｉｄｔｈ",  # noqa: RUF001
    "色调艳丽，过曝",  # noqa: RUF001
    "a\u00a0b\u3000c \ud800 \x07",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(_written(tmp_path_factory.mktemp("tokenizer"), tiny_tokenizer()))


@pytest.mark.parametrize("text", MESSY)
def test_cleaning_equals_that_of_diffusers(text: str) -> None:
    assert clean_text(text) == _reference_clean(text)


@settings(deadline=None)  # the first example imports diffusers
@given(st.text())
def test_cleaning_equals_that_of_diffusers_for_any_text(text: str) -> None:
    assert clean_text(text) == _reference_clean(text)


def test_ids_end_with_the_end_of_text_and_carry_no_padding(tokenizer: TextTokenizer) -> None:
    """Although the file asks for 8 padded ids: length is ours to choose."""
    assert tokenizer.encode("A RED circle.") == TokenizedText(ids=(4, 5, 7, 14, 1))
    assert tokenizer.encode("") == TokenizedText(ids=(1,))


@pytest.mark.parametrize("make", [tiny_tokenizer, tiny_unigram_tokenizer])
@pytest.mark.parametrize("text", ["a red circle", "red zebra, circles!", "", "a " * 600, "a</s>b"])
def test_ids_equal_those_of_transformers(make: Any, text: str, tmp_path: Path) -> None:
    """Called as diffusers' pipelines call it, padding cut: 512 ids at most, `</s>` last."""
    path = _written(tmp_path, make())
    ours = TextTokenizer(path).encode(text).ids
    theirs = reference_class("transformers", "PreTrainedTokenizerFast")(
        tokenizer_file=str(path), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )(
        clean_text(text), padding="max_length", max_length=512, truncation=True,
        add_special_tokens=True, return_attention_mask=True,
    )  # fmt: skip
    assert list(ours) == theirs.input_ids[: sum(theirs.attention_mask)]
    assert ours[-1] == 1
    assert len(ours) <= 512


def test_a_long_text_is_cut_and_says_by_how_much(tokenizer: TextTokenizer) -> None:
    text = tokenizer.encode("red " * 600)
    assert text.ids == (5,) * 511 + (1,)
    assert text.num_dropped == 601 - 512
    assert tokenizer.encode("red " * 511).num_dropped == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red circle", ()),
        ("a Zebra moves, ZEBRA zebra", ("Zebra", "ZEBRA", "zebra")),
        ("striped zebra, zebra!", ("striped", "zebra")),
        ("a #red zebra-crossing? 🦓;", ("zebra-crossing", "🦓")),
        ("schÃ¶n red", ("schön",)),
    ],
)
def test_unknown_words_are_told_as_typed_each_once(
    text: str, words: tuple[str, ...], tokenizer: TextTokenizer
) -> None:
    assert tokenizer.encode(text).unknown_words == words


def test_an_unknown_piece_tells_the_whole_word(tmp_path: Path) -> None:
    """A vocabulary of pieces knows `cir` and `cle` but not the `x` between them."""
    tokenizer = TextTokenizer(_written(tmp_path, tiny_unigram_tokenizer()))
    assert tokenizer.encode("red circle").unknown_words == ()
    assert tokenizer.encode("red cirxcle, a").unknown_words == ("cirxcle",)


@given(words=st.lists(st.sampled_from(WORDS[:9]), max_size=30))
def test_known_words_have_one_id_each(words: list[str], tokenizer: TextTokenizer) -> None:
    text = tokenizer.encode(" ".join(words))
    assert text.ids == (*(4 + WORDS.index(word) for word in words), 1)
    assert text.unknown_words == ()


def test_a_directory_stands_for_the_file_in_it(tmp_path: Path) -> None:
    _written(tmp_path, tiny_tokenizer())
    assert TextTokenizer(tmp_path).encode("red").ids == (5, 1)


def test_a_sentencepiece_file_will_do(tmp_path: Path) -> None:
    """By any name, since its content says what it is; a tokenizer.json beside it goes first."""
    (tmp_path / "spiece.model").write_bytes(tiny_spiece())
    (tmp_path / "umt5").write_bytes(tiny_spiece())
    expected = TokenizedText(ids=(9, 5, 6, 7, 1))  # ▁a ▁red ▁cir cle </s>
    assert TextTokenizer(tmp_path).encode("a red circle") == expected
    assert TextTokenizer(tmp_path / "umt5").encode("a red circle") == expected
    _written(tmp_path, tiny_tokenizer())
    assert TextTokenizer(tmp_path).encode("a red circle").ids == (4, 5, 7, 1)


def test_a_broken_sentencepiece_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(tiny_spiece()[:-3])
    with pytest.raises(WeightsBroken, match=r"spiece\.model is no whole protobuf"):
        TextTokenizer(path)


def test_a_json_text_may_begin_with_an_empty_line(tmp_path: Path) -> None:
    """A line feed is also the first byte of every sentencepiece model."""
    path = tmp_path / "tokenizer.json"
    path.write_text("\n" + json.dumps(tiny_tokenizer()), encoding="utf-8")
    assert TextTokenizer(path).encode("red").ids == (5, 1)


def test_a_tokenizer_at_hand_is_taken_without_its_padding(tokenizer: TextTokenizer) -> None:
    """And written out again, it reads the same."""
    made = TextTokenizer.of(Tokenizer.from_str(json.dumps(tiny_tokenizer())))
    again = TextTokenizer.of(Tokenizer.from_str(made.json()))
    for text in MESSY:
        assert made.encode(text) == again.encode(text) == tokenizer.encode(text)
    assert json.loads(made.json())["padding"] is None


def test_a_tokenizer_at_hand_must_end_its_texts() -> None:
    with pytest.raises(WeightsBroken, match=r"umt5\.gguf does not end a text with </s>"):
        TextTokenizer.of(Tokenizer(WordLevel({"<unk>": 0}, "<unk>")), name="umt5.gguf")


def test_an_absent_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"no tokenizer at .*tokenizer\.json") as raised:
        TextTokenizer(tmp_path)
    assert "spiece.model" in raised.value.hint
    with pytest.raises(WeightsMissing, match=r"no tokenizer at .*absent"):
        TextTokenizer(tmp_path / "absent")


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.touch()
    os.truncate(path, MAX_PROTO_BYTES + 1)
    with pytest.raises(WeightsBroken, match=f"more than {MAX_PROTO_BYTES} bytes"):
        TextTokenizer(path)


def test_a_file_that_is_no_tokenizer_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(WeightsBroken, match="is not a tokenizer"):
        TextTokenizer(path)


def test_a_tokenizer_that_does_not_end_its_texts_is_refused(tmp_path: Path) -> None:
    """Such as CLIP's or BERT's: the embeddings of UMT5 would be wrong without a word."""
    content = tiny_tokenizer() | {"post_processor": None}
    with pytest.raises(WeightsBroken, match="does not end a text with </s>"):
        TextTokenizer(_written(tmp_path, content))


def _written(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def _reference_clean(text: str) -> str:
    cleaned: str = reference_class("diffusers.pipelines.wan.pipeline_wan", "prompt_clean")(text)
    return cleaned
