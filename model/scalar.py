"""The transformer with one number per token instead of logits: a reward model's score, or a critic's value.

    value = w . hidden + bias          w (C,) drawn with std 1 / sqrt(C + 1)

`checkpoint.load_scalar_model` reads it from a Hugging Face *ForSequenceClassification folder, or adds a fresh head to a
causal model; `checkpoint.save_model` writes it. bias is a constant and not trained. The heads of transformers have no
bias, so it is stored as a key of config.json. transformers therefore computes scores that are lower by the bias.

Source: the head's scale from Huang et al. 2024, https://arxiv.org/abs/2403.17031, section 4
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .packed import Packed
from .transformer import Transformer


class ScalarModel(nn.Module):
    """A Transformer with a scalar head `score` (1, C) in place of its language head.

    Weights are drawn from `seed`. On the meta device nothing is drawn.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, device: torch.device | str = "cpu"):
        super().__init__()
        self.body = Transformer(config, seed, device)
        self.body.lm_head = None
        with torch.device("meta"):
            self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.bias = 0.0
        if torch.device(device).type != "meta":
            self.draw_head(seed, torch.float32, device)

    def draw_head(self, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
        """Draw a fresh head from `seed`. It is the same on every device."""
        width = self.config.hidden_size
        drawn = torch.empty(1, width).normal_(generator=torch.Generator().manual_seed(seed))
        self.score.weight = nn.Parameter((drawn / (width + 1) ** 0.5).to(device, dtype))

    @property
    def config(self) -> ModelConfig:
        return self.body.config

    @property
    def device(self) -> torch.device:
        return self.body.device

    def values(self, packed: Packed, rows: Tensor) -> Tensor:
        """Return the values of the tokens at `rows`, (n,) in fp32, or in fp64 for a model in fp64.

        rows: (n,) int64, indices into packed.tokens. A value depends on the token itself and on the tokens before it,
            including those of its parent segment.
        """
        hidden = self.body(packed)[rows]  # (n, C)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 would keep only 8 bits of a score
            return F.linear(hidden.to(wide), self.score.weight.to(wide)).squeeze(1) + self.bias
