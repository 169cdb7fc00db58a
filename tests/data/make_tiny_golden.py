"""Write a golden folder of tests/data/tiny-hf: `python tests/data/make_tiny_golden.py MODEL_TYPE [KEY=JSON ...]`.

The model is random and tiny, of transformers' class for MODEL_TYPE; the keys are those of its config.json beside SIZES.
expected.safetensors holds what transformers computes on a batch whose second row is padded on the left by 7 tokens:
logits (0 on padding), the loss, the gradient of the embedding, and a greedy continuation. Made with transformers
5.22.2, torch 2.13.0, on a CPU.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

SIZES = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-6},
}
ROWS, LENGTH, PADDING = 2, 24, 7
PROMPT, NEW_TOKENS = 6, 12


def make(model_type: str, keys: dict[str, object], folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SIZES | keys)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()

    # nothing stays at a value that hides a mistake, as a norm's weight of 1 or a bias of 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0, 0.2)
    model.save_pretrained(folder)

    # 1. a batch with padding on the left
    ids = torch.randint(3, SIZES["vocab_size"], (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    ids[mask == 0] = SIZES["pad_token_id"]

    # 2. what transformers computes on it
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    row = {"attention_mask": mask[:1, :PROMPT], "do_sample": False, "max_new_tokens": NEW_TOKENS}
    greedy = model.generate(ids[:1, :PROMPT], **row)

    expected = {
        "input_ids": ids,
        "attention_mask": mask,
        "logits": out.logits.detach() * mask[:, :, None],
        "loss": out.loss.detach()[None],
        "grad_embed": model.get_input_embeddings().weight.grad,
        "greedy": greedy,
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors"
    )


if __name__ == "__main__":
    changed = dict(word.split("=", 1) for word in sys.argv[2:])
    place = Path(__file__).parent / "tiny-hf" / sys.argv[1]
    make(sys.argv[1], {key: json.loads(value) for key, value in changed.items()}, place)
