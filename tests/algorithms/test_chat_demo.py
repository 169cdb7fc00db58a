"""`burnish chat-demo` on a random model with a chat template: the task, the reward, the report, the saved adapter."""

import re
from dataclasses import replace

import pytest
from burnish.algorithms.recipes import chat_demo
from burnish.algorithms.recipes.chat_demo import MODES, problems, right
from burnish.model.checkpoint import load_model, save_model
from burnish.model.config import ModelConfig
from burnish.model.errors import InputError
from burnish.model.files.folder import is_adapter
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer


def test_the_reward_reads_the_last_number_of_text_or_of_a_message():
    texts = ["8 + 6 equals 14.", "14", "The sum of 14 is 8", "no number", "140"]
    assert right(texts, ["14"] * 5) == [1, 1, 0, 0, 0]
    assert right([[{"role": "assistant", "content": text}] for text in texts], ["14"] * 5) == [1, 1, 0, 0, 0]


def test_no_problem_is_both_held_out_and_trained_on_and_every_answer_is_right():
    held_out, training = problems(seed=0)
    assert len(held_out) == 100 and len({row["question"] for row in held_out + training}) == 400
    for row in held_out + training:
        a, b = map(int, re.findall(r"\d+", row["question"]))
        assert row["answer"] == str(a + b)
    assert problems(seed=1) != (held_out, training) == problems(seed=0)


@pytest.fixture
def cfg(data, tmp_path):
    tokenizer = Tokenizer.load(data / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocabulary.end,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    save_model(Transformer(config), tmp_path / "base", tokenizer)

    return chat_demo.Config(
        model=tmp_path / "base",
        output=tmp_path / "out",
        steps=1,
        prompts_per_step=2,
        group_size=2,
        held_out=3,
        device="cpu",
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_run_saves_what_it_trained_and_a_report(cfg, mode, capsys):
    report = chat_demo.train(replace(cfg, mode=mode)).read_text()
    trained = cfg.output / "grpo" / "model"
    assert is_adapter(trained) == (mode != "full")
    assert (load_model(trained).layers[0].mlp.up_proj.four_bit is not None) == (mode == "qlora")
    for text in (
        "before",
        "after",
        "standard error",
        "peak memory",
        "CPU time",
        *(f"{m}: tensors" for m in MODES),
    ):
        assert text in report, text
    printed = capsys.readouterr().out
    assert f"The first four again, from {trained}:" in printed and problems(0)[0][0]["question"] in printed


def test_a_folder_in_use_and_a_missing_model_are_refused_before_anything_runs(cfg, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        chat_demo.train(replace(cfg, model=tmp_path / "nowhere"))
    assert not cfg.output.exists()
    cfg.output.mkdir()
    (cfg.output / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="--output"):
        chat_demo.train(cfg)
