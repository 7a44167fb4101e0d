from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanfit.errors import BadOption
from wanfit.plan.amounts import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("12GiB", 12 * 2**30),
        ("12GB", 12 * 10**9),
        ("12G", 12 * 2**30),
        ("12 gib", 12 * 2**30),
        ("31.37GiB", int(31.37 * 2**30)),
        ("512M", 512 * 2**20),
        ("1.5TB", 1_500_000_000_000),
        ("8589934592", 2**33),
        ("100B", 100),
    ],
)
def test_amounts_are_read_as_gnu_reads_them(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "12XB", "-1GB", "0", "1e9", "nan", "12 G B", "9" * 16, "99999TB", "x" * 999]
)
def test_what_is_no_amount_is_refused_naming_the_option(text: str) -> None:
    with pytest.raises(BadOption, match="--vram") as raised:
        parse_bytes(text, option="--vram")
    assert len(str(raised.value)) < 200


@given(st.integers(1, 2**45))
def test_what_is_shown_can_be_read_again_within_its_rounding(num_bytes: int) -> None:
    again = parse_bytes(show_bytes(num_bytes).replace(" ", ""))
    assert abs(again - num_bytes) <= max(1 << 19, 0.06 * num_bytes)
