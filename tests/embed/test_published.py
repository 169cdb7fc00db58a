"""Folders in the layout of the hub beside transformers: what it computes of them, and of what we write."""

from pathlib import Path

import pytest
import torch
from burnish.model import pack
from burnish.model.checkpoint import load_model, save_model
from make_published import IDS, LOADED, PUBLISHED, logits, make

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def ours(folder: Path) -> torch.Tensor:
    model = load_model(folder)
    with torch.no_grad():
        return model.logits(model(pack([IDS])))


@pytest.mark.parametrize("name", LOADED)
def test_a_published_folder_is_what_transformers_reads(name, tmp_path):
    theirs = logits(name, tmp_path / name)
    torch.testing.assert_close(ours(tmp_path / name), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", LOADED)
def test_transformers_reads_what_we_write_of_it(name, tmp_path):
    folder, saved = make(name, tmp_path / name), tmp_path / "saved"
    save_model(load_model(folder), saved)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report

    if "quantization_config" in PUBLISHED[name][0]:
        kinds = {name: type(module).__name__ for name, module in theirs.named_modules()}
        dense = {name for name, kind in kinds.items() if kind == "Linear"}
        skipped = PUBLISHED[name][0]["quantization_config"]["llm_int8_skip_modules"] or ["lm_head"]
        assert all(any(part in name for part in skipped) for name in dense), dense
        theirs.dequantize(dtype=torch.float32)
        theirs.float()

    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0]
    bound = 2e-2 if "quantization_config" in PUBLISHED[name][0] else 2e-5  # bitsandbytes rounds to bfloat16
    torch.testing.assert_close(ours(folder), expected, atol=bound, rtol=0)


def test_a_model_that_was_saved_without_its_head(tmp_path):
    folder = make("google/gemma-3-1b-it", tmp_path / "whole")
    transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "body")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "body", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(ours(tmp_path / "body"), expected, atol=2e-5, rtol=0)
