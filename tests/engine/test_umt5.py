"""The text encoder against transformers' UMT5EncoderModel, with the same random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.engine.tiny_models import TINY_UMT5, random_umt5, reference_umt5, relative_error
from wanfit.specs import Umt5Spec

SPECS = {
    "tiny": TINY_UMT5,
    "32 buckets to 128, as umt5-xxl": replace(TINY_UMT5, relative_buckets=32),
    "heads wider than the stream": replace(TINY_UMT5, width=20, num_heads=5, head_dim=16),
}
# Longer than relative_max_distance, so that the last bucket is reached.
LENGTHS = [1, 7, 160]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_embeddings_equal_those_of_transformers(spec: Umt5Spec, length: int) -> None:
    """A batch of two, the second one padded; rows of padding mean nothing and are left out."""
    umt5 = random_umt5(spec, seed=1)
    ids, mask = _inputs(spec, length)
    with torch.inference_mode():
        expected = reference_umt5(umt5)(ids, mask.long()).last_hidden_state
        assert relative_error(umt5(ids, mask)[mask], expected[mask]) < 1e-5


def test_padding_does_not_change_a_text() -> None:
    """So a text may be encoded at its own length, which `encode_text` does."""
    umt5 = random_umt5(TINY_UMT5, seed=2)
    ids, mask = _inputs(TINY_UMT5, 12)
    length = int(mask[1].sum())
    with torch.inference_mode():
        alone = umt5(ids[1:, :length], mask[1:, :length])
        padded = umt5(ids, mask)[1:, :length]
    assert relative_error(alone, padded) < 1e-6


def test_every_layer_has_its_own_distances() -> None:
    """T5 shares the first layer's table and UMT5 does not: exchanging two changes the result."""
    umt5 = random_umt5(TINY_UMT5, seed=3)
    ids, mask = _inputs(TINY_UMT5, 12)
    with torch.inference_mode():
        before = umt5(ids, mask)
        state = umt5.state_dict()
        tables = [f"blocks.{i}.attn.position_bias.weight" for i in (0, 1)]
        exchanged = dict(
            zip(tables, (state[name].clone() for name in reversed(tables)), strict=True)
        )
        umt5.load_state_dict(state | exchanged)
        assert relative_error(umt5(ids, mask), before) > 1e-3


def test_bf16_is_as_near_to_the_truth_as_transformers_in_bf16() -> None:
    umt5 = random_umt5(TINY_UMT5, seed=4)
    for parameter in umt5.parameters():
        parameter.copy_(parameter.bfloat16().float())
    ids, mask = _inputs(TINY_UMT5, 60)
    with torch.inference_mode():
        truth, theirs = (
            reference_umt5(umt5, dtype=dtype)(ids, mask.long()).last_hidden_state[mask]
            for dtype in (torch.float64, torch.bfloat16)
        )
        ours = umt5.bfloat16()(ids, mask)[mask]
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth)


def _inputs(spec: Umt5Spec, length: int) -> tuple[Tensor, Tensor]:
    """ids and mask, [2, length]; the second text is about two thirds as long."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, spec.vocab_size, (2, length), generator=generator)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, (2 * length + 2) // 3 :] = False
    return ids.masked_fill(~mask, 0), mask
