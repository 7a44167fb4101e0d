"""Text to the embeddings that the transformer reads.

Dims: S text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.tokenizer import TokenizedText
from wanfit.specs import TEXT_TOKENS


def encode_texts(umt5: Umt5, texts: Sequence[TokenizedText], device: torch.device) -> list[Tensor]:
    """Each [1, S, D] with S = TEXT_TOKENS, in the encoder's dtype; rows after the text are zeros.

    The official code pads the ids, masks the padding in the encoder, and cuts its rows away again:
    the true length alone gives the same rows. The transformer does attend to the zero rows, so
    they are part of the model (official: t5.py and model.py).
    """
    ids = [torch.tensor([text.ids], dtype=torch.int64, device=device) for text in texts]
    return [
        F.pad(embeddings, (0, 0, 0, TEXT_TOKENS - embeddings.shape[1]))
        for embeddings in umt5.encode(ids)
    ]
