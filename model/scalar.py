"""The transformer with one number a token in place of logits: a reward model's score, a critic's value.

    value = w . hidden + bias          w (C,) drawn with std 1 / sqrt(C + 1)

`checkpoint.load_scalar_model` reads it from a Hugging Face *ForSequenceClassification folder, or puts a fresh head on a
causal one; `checkpoint.save_model` writes it. bias is a constant, not trained: transformers' head has none, so in such
a folder it is a key of config.json, and transformers' scores are ours less the bias.

Source: the head's scale from Huang et al. 2024, https://arxiv.org/abs/2403.17031, section 4
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .packed import Packed
from .transformer import Transformer


class ScalarModel(nn.Module):
    """A Transformer without its language head, and score (1, C). Drawn from `seed`; nothing is on the meta device."""

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
        """A fresh head from `seed`, the same on every device."""
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
        """The value at each of `rows` (n,) int64 of packed.tokens, (n,) fp32 (fp64 from fp64).

        A row's value has seen its own token and what stands before it, its parent's tokens included.
        """
        hidden = self.body(packed)[rows]  # (n, C)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 keeps only 8 bits of a score
            return F.linear(hidden.to(wide), self.score.weight.to(wide)).squeeze(1) + self.bias
