"""Write the golden files of tests/model that transformers computes: `python tests/data/make_model_golden.py FOLDER`.

FOLDER is the real model stories260k in Hugging Face's layout. Made with transformers 5.22.2, torch 2.13.0, on a CPU.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPES = [
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 2.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 3.0,
    },
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    {
        "rope_type": "yarn",
        "rope_theta": 1.5e5,
        "factor": 32.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 0.75},
]
STORIES = ["Once upon a time", "Lily and Ben", "The big dog", "One day, a bird saw"]


def rope() -> list[dict]:
    golden = []
    for parameters in ROPES:
        config = transformers.LlamaConfig(
            hidden_size=256,
            num_attention_heads=2,
            max_position_embeddings=4096,
            rope_parameters=dict(parameters),
        )
        inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
        golden.append(
            {"rope_parameters": parameters, "inv_freq": inv_freq.tolist(), "attention_factor": factor}
        )
    return golden


def stories(folder: str) -> list[dict]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    golden = []
    for text in STORIES:
        prompt = tokenizer(text, return_tensors="pt").input_ids
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=100
        )
        tokens = out[0, prompt.shape[1] :].tolist()
        golden.append({"prompt": prompt[0].tolist(), "tokens": tokens, "text": tokenizer.decode(tokens)})
    return golden


if __name__ == "__main__":
    here = Path(__file__).parent
    made_by = f"python tests/data/make_model_golden.py FOLDER, transformers {transformers.__version__}"
    for name, golden in (("rope", rope()), ("stories260k-greedy", stories(sys.argv[1]))):
        (here / f"{name}.json").write_text(json.dumps({"made_by": made_by, "golden": golden}) + "\n")
