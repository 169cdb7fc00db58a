"""Training on folders in the layout of the hub: full, or with an adapter where the weights are in 4 bits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from burnish.algorithms import dpo, grpo, sft
from burnish.model.checkpoint import load_model
from burnish.model.errors import InputError
from burnish.model.files.folder import is_adapter
from make_published import LOADED, make
from safetensors import safe_open

ROWS = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(4, 20)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w90 w91"} for row in ROWS]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(folder: Path, output: Path) -> dict:
    rank = 4 if "bnb" in folder.name else 0
    common = {"steps": 2, "batch_size": len(ROWS), "warmup_steps": 0, "learning_rate": 1e-2, "device": "cpu"}
    return {"model": folder, "output": output, "lora_rank": rank, **common}


def dtypes_of(folder: Path) -> dict[str, str]:
    found = {}
    for file in folder.glob("*model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", LOADED)
def test_sft_trains_it_and_writes_it_in_its_dtype(name, tmp_path):
    folder, data = make(name, tmp_path / name), write_rows(tmp_path / "rows.jsonl", ROWS)
    trained = sft.train(sft.Config(data=data, **options(folder, tmp_path / "out")))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[1]["loss"] < lines[0]["loss"]
    before, after = load_model(folder), load_model(trained)
    assert replace(before.config, generation={}) == replace(after.config, generation={})
    if is_adapter(trained):
        assert any(lora.b.any() for lora in after.modules() if hasattr(lora, "b"))
        return
    was, now = dtypes_of(folder), dtypes_of(trained)
    assert now and all(was[name] == dtype for name, dtype in now.items())
    assert not torch.equal(before.layers[0].self_attn.o_proj.weight, after.layers[0].self_attn.o_proj.weight)


def test_4_bit_weights_are_not_trained_whole(tmp_path):
    folder = make("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", tmp_path / "folder")
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(
        InputError, match="expected --lora-rank for this model, because its 4-bit weights are frozen"
    ):
        sft.train(sft.Config(data=data, model=folder, output=tmp_path / "out", device="cpu"))


@pytest.mark.parametrize("name", ["google/gemma-3-1b-it", "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit"])
def test_dpo_and_grpo_train_it(name, tmp_path):
    folder = make(name, tmp_path / name)
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    dpo.train(dpo.Config(data=pairs, **options(folder, tmp_path / "dpo")))
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def reward(completions, **_):\n    return [float(len(text) % 3) for text in completions]\n"
    )
    more = options(folder, tmp_path / "grpo") | {"group_size": 2, "max_new_tokens": 4}
    more["prompts_per_step"] = more.pop("batch_size")
    trained = grpo.train(grpo.Config(data=prompts, reward=(f"{reward}:reward",), **more))
    assert is_adapter(trained) == ("bnb" in name)
