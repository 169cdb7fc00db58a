"""Ids that a model has no row for: a tokenizer may have them, a row that reaches the model may not, none is drawn.

As gemma-3-1b has 262,145 ids and 262,144 rows, and Llama-2's folders a <pad> behind their 32,000.
"""

import dataclasses
import json
import re

import pytest
import torch
from burnish.algorithms import chat, distill, dpo, evaluate, grpo, kto, ppo, reward, sft, teach
from burnish.algorithms.recipes.sums import VOCABULARY, make_tokenizer
from burnish.algorithms.run.ids import check_ids
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.config import ModelConfig
from burnish.model.errors import InputError
from burnish.model.generate import SamplingParams, generate, stream
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from burnish.model.vocabulary import Vocabulary
from faults import check_of, control, faults_of
from planted import copy_of

ROWS = len(VOCABULARY)  # 17
IMAGE = "<image_soft_token>"  # its id is ROWS
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"


def tokenizer_of(*more: str) -> Tokenizer:
    backend = make_tokenizer()
    backend.add_special_tokens([IMAGE, *more])
    return Tokenizer(backend, eos="<eos>", pad=IMAGE)


def save(folder, rows=ROWS, scalar=False, tokenizer=None):
    """A model of which every row beyond VOCABULARY's is far more likely than all others."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig(vocab_size=rows, eos_token_id=0, **shape)
    model = Transformer(config, seed=0)
    with torch.no_grad():
        model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[ROWS:] = 0.0
        model.lm_head.weight[ROWS:, 0] = 60.0
    save_model(model, folder, tokenizer or tokenizer_of())
    if scalar:
        save_model(load_scalar_model(folder), folder, tokenizer or tokenizer_of())
    return folder


@pytest.fixture
def place(tmp_path):
    save(tmp_path / "model")
    save(tmp_path / "scores", scalar=True)
    (tmp_path / "rewards.py").write_text(
        "def zero(completions, **_):\n    return [0.0 for _ in completions]\n"
    )
    return tmp_path


SHAPES = {  # a row, and where the token may stand in it
    "sft": ({"prompt": "1+2+3=", "completion": "<think>36</think>"}, ("prompt", "completion")),
    "pairs": ({"prompt": "1+2=", "chosen": "3", "rejected": "4"}, ("prompt", "chosen", "rejected")),
    "judged": ({"prompt": "1+2=", "completion": "3", "label": True}, ("prompt", "completion")),
    "prompts": ({"prompt": "1+2+3="}, ("prompt",)),
}
TRAIN = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "device": "cpu"}
ROLL = {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 3, "device": "cpu"}


def run_evaluate(place, data, output, **more):
    evaluate.evaluate(
        evaluate.Config(data=data, output=output, device="cpu", **{"model": place / "model"} | more)
    )


def rewarded(place):
    return {"reward": (f"{place}/rewards.py:zero",)}


RUNS = {  # name: (shape of the rows, what runs on them)
    "sft": ("sft", lambda p, d, o: sft.train(sft.Config(model=p / "model", data=d, output=o, **TRAIN))),
    "dpo": ("pairs", lambda p, d, o: dpo.train(dpo.Config(model=p / "model", data=d, output=o, **TRAIN))),
    "held out": (
        "pairs",
        lambda p, d, o: dpo.train(
            dpo.Config(model=p / "model", data=rows_in(p, "clean", "pairs"), eval_data=d, output=o, **TRAIN)
        ),
    ),
    "reward": (
        "pairs",
        lambda p, d, o: reward.train(reward.Config(model=p / "model", data=d, output=o, **TRAIN)),
    ),
    "kto": ("judged", lambda p, d, o: kto.train(kto.Config(model=p / "model", data=d, output=o, **TRAIN))),
    "grpo": (
        "prompts",
        lambda p, d, o: grpo.train(
            grpo.Config(model=p / "model", data=d, output=o, group_size=2, **rewarded(p), **ROLL)
        ),
    ),
    "ppo": (
        "prompts",
        lambda p, d, o: ppo.train(
            ppo.Config(model=p / "model", data=d, output=o, reward_model=p / "scores", minibatches=1, **ROLL)
        ),
    ),
    "distill": (
        "sft",
        lambda p, d, o: distill.train(
            distill.Config(model=p / "model", teacher=p / "model", data=d, output=o, **TRAIN)
        ),
    ),
    "teach": (
        "sft",
        lambda p, d, o: teach.teach(
            teach.Config(model=p / "model", data=d, output=o, top_k=ROWS, device="cpu")
        ),
    ),
    "evaluate text": ("sft", run_evaluate),
    "evaluate answers": (
        "prompts",
        lambda p, d, o: run_evaluate(p, d, o, samples=2, k=(1,), max_new_tokens=3, **rewarded(p)),
    ),
    "evaluate pairs": ("pairs", lambda p, d, o: run_evaluate(p, d, o, model=p / "scores")),
}


def rows_in(place, name, shape, column=None, text=IMAGE):
    """Four rows, of which the third has the token in `column`."""
    row, _ = SHAPES[shape]
    rows = [dict(row) for _ in range(4)]
    if column is not None:
        rows[2][column] = row[column][:2] + text + row[column][2:]
    file = place / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", RUNS)
def test_a_row_with_such_an_id_is_refused_by_line_and_token_and_others_run(place, name):
    shape, run = RUNS[name]
    run(place, rows_in(place, "clean", shape), place / "trained")
    for column in SHAPES[shape][1]:
        file = rows_in(place, "bad", shape, column)
        message = (
            rf"{re.escape(str(file))} line 3: token '{IMAGE}': .* has no row for its id {ROWS}, "
            rf"expected ids below {ROWS}; take the token out of the text, or use a model that has a row for it"
        )
        with pytest.raises(InputError, match=message):
            run(place, file, place / "refused")
    assert not (place / "refused").exists()


def test_a_chat_with_such_an_id_is_refused(place):
    flags = {"model": place / "model", "max_new_tokens": 2, "device": "cpu"}
    chat.main(chat.Config(prompt="1+2=", **flags))
    with pytest.raises(
        InputError, match=f"what was said: token '{IMAGE}': .*model has no row for its id {ROWS}"
    ):
        chat.main(chat.Config(prompt=f"1+{IMAGE}2=", **flags))


def test_a_templates_own_token_is_refused_too(place):
    (place / "model" / "chat_template.jinja").write_text(IMAGE + TEMPLATE)
    file = place / "talks.jsonl"
    file.write_text(
        json.dumps({"messages": [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]})
    )
    with pytest.raises(InputError, match=rf"talks\.jsonl line 1: token '{IMAGE}'"):
        sft.train(sft.Config(model=place / "model", data=file, output=place / "out", **TRAIN))


def test_a_row_that_is_cut_before_the_token_is_trained(place):
    file = rows_in(place, "cut", "sft", "completion")
    file.write_text(file.read_text().replace("</think>", f"</think>1111{IMAGE}"))
    sft.train(sft.Config(model=place / "model", data=rows_in(place, "c", "sft"), output=place / "o", **TRAIN))
    rows = [json.loads(line) | {"completion": f"<think>36{IMAGE}"} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft.train(sft.Config(model=place / "model", data=file, output=place / "cut", max_length=8, **TRAIN))


def test_tokenizers_of_other_models_are_told_so(place):
    names = [f"<extra_{i}>" for i in range(20)]
    save(place / "foreign", tokenizer=tokenizer_of(*names))
    file = rows_in(place, "foreign-rows", "sft", "prompt", names[3])
    with pytest.raises(
        InputError,
        match=r"line 3: token '<extra_3>': .* id 21, expected ids below 17; 21 of the tokenizer's 38 ids are "
        r"too large: model and tokenizer do not belong together",
    ):
        sft.train(sft.Config(model=place / "foreign", data=file, output=place / "out", **TRAIN))


def test_a_stop_token_without_a_row_is_said(place, capsys):
    backend = make_tokenizer()
    backend.add_special_tokens([IMAGE])
    save(place / "stops", tokenizer=Tokenizer(backend, eos="<eos>", stop_ids=[ROWS]))
    data, flags = rows_in(place, "p", "prompts"), {"group_size": 2, **rewarded(place), **ROLL}
    grpo.train(grpo.Config(model=place / "stops", data=data, output=place / "o", **flags))
    assert (
        "warning: the model has rows only for ids below 17, so the stop ids [17] never end a generation"
        in capsys.readouterr().err
    )
    save(place / "ends", tokenizer=Tokenizer(backend, eos=IMAGE))
    with pytest.raises(InputError, match=f"line 1: token '{IMAGE}'"):  # the end that each completion gets
        sft.train(
            sft.Config(model=place / "ends", data=rows_in(place, "s", "sft"), output=place / "e", **TRAIN)
        )


# ---- several models


def test_nothing_is_drawn_that_the_reward_model_or_critic_has_no_row_for(place):
    save(place / "wide", ROWS + 3)  # its rows beyond are all that it would ever draw
    for changes in ({"reward_model": place / "scores"}, {**rewarded(place), "critic": place / "model"}):
        data, output = rows_in(place, "p", "prompts"), place / f"out-{len(changes)}"
        ppo.train(
            ppo.Config(model=place / "wide", data=data, output=output, minibatches=1, **changes, **ROLL)
        )
    bad = {"model": place / "wide", "data": rows_in(place, "bad", "prompts", "prompt"), "output": place / "o"}
    with pytest.raises(InputError, match=rf"line 3: token '{IMAGE}': --reward-model .*scores has no row"):
        ppo.train(ppo.Config(**bad, **ROLL, reward_model=place / "scores"))
    with pytest.raises(InputError, match=rf"line 3: token '{IMAGE}': the critic has no row"):
        ppo.train(ppo.Config(**bad, **ROLL, **rewarded(place), critic=place / "model"))


def test_without_the_bound_the_others_would_read_such_ids(place, monkeypatch):
    monkeypatch.setattr(Tokenizer, "keep_below", lambda self, rows: None)
    with pytest.raises(IndexError):
        test_nothing_is_drawn_that_the_reward_model_or_critic_has_no_row_for(place)
    with pytest.raises(IndexError):
        test_nothing_is_drawn_that_the_teacher_has_no_row_for(place, "policy_gradient")


@pytest.mark.parametrize("loss", ["divergence", "policy_gradient"])
def test_nothing_is_drawn_that_the_teacher_has_no_row_for(place, loss):
    save(place / "wide", ROWS + 3)
    flags = {"model": place / "wide", "teacher": place / "model", "loss": loss, "student_samples": 1.0}
    own = {"max_new_tokens": 3, **flags, **TRAIN}
    distill.train(distill.Config(data=rows_in(place, "p", "prompts"), output=place / "out", **own))
    bad = rows_in(place, "bad", "prompts", "prompt")
    with pytest.raises(InputError, match=rf"line 3: token '{IMAGE}': --teacher .*model has no row"):
        distill.train(distill.Config(data=bad, output=place / "o", **own))


def test_lessons_of_a_wider_teacher_are_refused_where_they_hold_its_ids(place):
    save(place / "wide", ROWS + 3)
    data = rows_in(place, "clean", "sft")
    for top_k, refused in ((1, True), (0, False)):
        output = place / f"taught-{top_k}"
        answers = {"samples": 0 if top_k else 1, "max_new_tokens": 2}
        model = place / ("wide" if top_k else "model")
        lessons = teach.teach(
            teach.Config(model=model, data=data, output=output, top_k=top_k, device="cpu", **answers)
        )

        how = {"loss": "divergence" if top_k else "sequence"}
        run = distill.Config(
            model=place / "model", data=lessons, output=place / f"out-{top_k}", **how, **TRAIN
        )
        if not refused:
            distill.train(run)
            continue
        with pytest.raises(
            InputError, match=rf"lessons\.safetensors lesson 1: token '{IMAGE}': the model has no row"
        ):
            distill.train(run)

    with pytest.raises(
        InputError, match=rf"--top-k: expected at most the vocabulary, {ROWS}, got {ROWS + 1}"
    ):
        teach.teach(
            teach.Config(model=place / "model", data=data, output=place / "t", top_k=ROWS + 1, device="cpu")
        )


def test_generate_says_it_in_one_sentence(place):
    model = load_model(place / "model")
    for wrong in ([1, ROWS], [-1, 2]):
        with pytest.raises(ValueError, match=rf"prompt 1: expected token ids below {ROWS}, got"):
            generate(model, [[1], wrong], SamplingParams(max_new_tokens=2))
        with pytest.raises(ValueError, match=rf"prompt 0: expected token ids below {ROWS}, got"):
            next(stream(model, wrong, SamplingParams(max_new_tokens=2)))
    (sample,) = generate(model, [[1]], SamplingParams(max_new_tokens=3, stop_ids={ROWS, 10**30, -1}))
    assert len(sample.tokens) == 3 and not sample.ended
    wide = load_model(save(place / "wide", ROWS + 3))
    kept = Vocabulary.of([*range(ROWS), ROWS + 1]).below(ROWS)
    drawn = generate(wide, [[1]], SamplingParams(samples_per_prompt=20, max_new_tokens=3, vocabulary=kept))
    assert max(max(sample.tokens) for sample in drawn) < ROWS


def test_below():
    holes = Vocabulary.of([0, 2, 5])
    assert holes.below(6) is holes and holes.below(5).ids.tolist() == [0, 2]
    assert Vocabulary.of([0, 1, 9]).below(5).size == 2
    whole = Vocabulary(7)
    assert whole.below(7) is whole and whole.below(3).end == 3


# ---- the check


@dataclasses.dataclass(frozen=True)
class Held:
    sequences: list
    where: str = "here"


@control
def finds_each(check) -> None:
    """The first id without a row, in any of the sequences, and nothing else."""
    tokenizer = tokenizer_of("<a>", "<b>")  # ids up to 19
    for sequences, wrong in (
        ([[1, 2], [3, 17]], 17),
        ([[], [18, 1]], 18),
        ([[1], [2, 19, 3, 18]], 19),
        ([[0, 16], []], None),
    ):
        found = None
        try:
            check([Held([[0]]), Held(sequences)], tokenizer, ROWS)
        except InputError as error:
            found = int(re.search(r"its id (\d+)", str(error))[1])
        assert found == wrong, sequences
    check([Held([[25]])], tokenizer, 30)  # a padded head has more rows than there are tokens


def test_the_check_finds_each():
    finds_each(check_ids)


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_the_check_can_fail(fault, tmp_path, monkeypatch):
    module = copy_of("algorithms/run/ids", tmp_path, monkeypatch, fault)
    with pytest.raises(AssertionError):
        check_of(fault)(module.check_ids)
