"""Write balance.json: transformers' balance loss of router logits: `python tests/data/make_balance_golden.py`.

Made with transformers 5.22.2, torch 2.13.0: load_balancing_loss_func of mixtral, which every architecture with
experts shares, and its gradient, with and without padding.
"""

import json
from pathlib import Path

import torch

ROWS, LENGTH, EXPERTS, TOP_K = 2, 5, 4, 2
LENGTHS = {"whole": [5, 5], "padded": [5, 2]}  # of the rows


def main() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    generator = torch.Generator().manual_seed(0)
    cases = []
    for layers in (2, 6):
        drawn = 2 * torch.randn(layers, ROWS * LENGTH, EXPERTS, generator=generator)
        drawn = (1000 * drawn).round() / 1000
        for name, lengths in LENGTHS.items():
            logits = drawn.clone().requires_grad_()
            mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
            value = load_balancing_loss_func(tuple(logits), EXPERTS, TOP_K, mask)
            value.backward()
            assert logits.grad is not None

            cases.append(
                {
                    "name": f"{layers} layers, {name}",
                    "logits": [[[round(x, 3) for x in row] for row in layer] for layer in drawn.tolist()],
                    "real": mask.flatten().tolist(),
                    "value": value.item(),
                    "gradient": [
                        [[round(x, 8) for x in row] for row in layer] for layer in logits.grad.tolist()
                    ],
                }
            )

    stored = {"top_k": TOP_K, "cases": cases}
    Path(__file__).with_name("balance.json").write_text(json.dumps(stored) + "\n")


if __name__ == "__main__":
    main()
