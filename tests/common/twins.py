"""A model with ids that no token has, and its twin whose tokens are the rows.

The rows of ids that are missing have logits above all others, which a fault cannot overlook.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from burnish.algorithms.recipes.sums import VOCABULARY, make_tokenizer
from burnish.model.checkpoint import save_model
from burnish.model.config import ModelConfig
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from tokenizers import Tokenizer as Backend

ROWS = 24  # of the heads with missing ids
TOKENS = len(VOCABULARY)  # 17
IDS = {
    "padded": list(range(TOKENS)),
    "holes": [i + 2 * (i > 2) + (i > 9) for i in range(TOKENS)],  # 3, 4 and 12 are missing, and 20 to 23
}
CONFIG = ModelConfig(
    *(TOKENS, 16, 24, 2, 2),  # V, C, F, layers, H
    eos_token_id=0,
    initializer_range=0.3,
)


class Twins(NamedTuple):
    """Two folders of one model."""

    dense: Path  # a row for each token
    other: Path  # ROWS rows, some of ids that are missing
    ids: list[int]  # the tokens', of the other


def tokenizer_of(ids: list[int]) -> Tokenizer:
    settings = json.loads(make_tokenizer().to_str())
    settings["model"]["vocab"] = dict(zip(VOCABULARY, ids, strict=True))
    return Tokenizer(Backend.from_str(json.dumps(settings)), eos="<eos>")


@torch.no_grad()
def twins_of(kind: str, folder: Path, seed: int, rows: int = ROWS) -> Twins:
    ids, tied = IDS[kind], kind == "holes"
    dense = Transformer(dataclasses.replace(CONFIG, tie_word_embeddings=tied), seed)
    dense.embed_tokens.weight[:, 0] = 2.0  # so the hidden states of all tokens have the first axis in common
    for layer in dense.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0

    other = Transformer(dataclasses.replace(dense.config, vocab_size=rows), seed)
    for (name, source), (_, target) in zip(dense.named_parameters(), other.named_parameters(), strict=True):
        if name in ("embed_tokens.weight", "lm_head.weight"):
            target.zero_()
            target[:, 0] = 60.0
            target[ids] = source
        else:
            target.copy_(source)

    save_model(dense, folder / "dense", tokenizer_of(list(range(TOKENS))))
    save_model(other, folder / "other", tokenizer_of(ids))
    return Twins(folder / "dense", folder / "other", ids)
