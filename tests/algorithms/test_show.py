"""The display of a run: lines without a terminal, the page of a run, events for TensorBoard, the text at the end."""

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from burnish.algorithms import dpo, grpo, kto, ppo, report, reward, sft
from burnish.algorithms.__main__ import main
from burnish.algorithms.recipes.sums import make_tokenizer
from burnish.algorithms.run.learner import Learner
from burnish.algorithms.run.loop import Run
from burnish.algorithms.show import display, trackers
from burnish.algorithms.show.metrics import METHODS, main_metrics, method_of
from burnish.algorithms.show.records import MOST_LINES, read_records
from burnish.algorithms.show.report import write_report
from burnish.model.checkpoint import load_model
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer

ACCURACY = "burnish.algorithms.recipes.sums:accuracy"


@pytest.fixture
def cfg(model_folder, demonstrations, tmp_path):
    torch.set_num_threads(1)
    flags = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "save_every": 3, "device": "cpu"}
    return sft.Config(model=model_folder, data=demonstrations, output=tmp_path / "run", **flags)


class Page(HTMLParser):
    """The tags that a page opens and never closes, and its text outside of styles."""

    VOID = ("meta", "br", "path", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.text, self.tags = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def page_of(folder: Path) -> Page:
    """The page of a run, which must be whole, without a script and without a link to the network."""
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not page.wrong and not page.open
    assert "script" not in page.tags and not re.search(r"(src|href)=|@import|url\(", text)
    assert not re.search(r' d="[^"]*(nan|inf)', text)
    return page


def folder_of(tmp_path: Path, lines: list[dict] | bytes, **flags) -> Path:
    """A run folder with these lines of metrics.jsonl."""
    folder = tmp_path / "folder"
    folder.mkdir()
    config = {"model": "m", "data": "d.jsonl", "steps": 10, "train_on": "completion", **flags}
    (folder / "config.json").write_text(json.dumps(config))
    data = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / "metrics.jsonl").write_bytes(data)
    return folder


# ---- progress


def test_without_a_terminal_a_line_comes_every_few_steps(cfg, capsys):
    sft.train(dataclasses.replace(cfg, log_every=4))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1 of 6", "step 4 of 6", "step 6 of 6"]
    assert re.fullmatch(
        r"step 6 of 6  loss \S+  grad_norm \S+  learning_rate \S+  [\d,]+ tokens/s  \d:\d\d elapsed, 0:00 left",
        lines[-1],
    )
    assert all(line.isprintable() for line in lines)


def test_by_default_a_fiftieth_of_the_steps_is_shown(cfg, capsys):
    lines = [{"step": i, "tokens": 10, "seconds": 0.1, "loss": 1.0} for i in range(120)]
    shown = display.Display(dataclasses.replace(cfg, steps=120), cfg.output, 0)
    cfg.output.mkdir()
    for line in lines:
        shown.log(line)
    printed = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert printed == [f"step {done} of 120" for done in (1, *range(2, 121, 2))]


def test_on_a_terminal_there_is_a_bar_and_no_lines(cfg, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sft.train(cfg)
    printed = capsys.readouterr().err
    assert "6/6" in printed and "loss=" in printed and "step 6 of 6" not in printed


# ---- the page of a run


def test_a_run_writes_its_page_and_is_not_disturbed_by_it(cfg):
    sft.train(cfg)
    page = page_of(cfg.output)
    for text in ("Supervised fine-tuning: random-model on demonstrations.jsonl", "finished", "6 steps"):
        assert text in page.text
    assert "svg" in page.tags and 'http-equiv="refresh"' not in (cfg.output / "report.html").read_text()
    # off their defaults first
    assert page.text.index("--learning-rate") < page.text.index("at their defaults")
    assert page.text.index("at their defaults") < page.text.index("--warmup-steps")
    assert torch.__version__ in page.text and f"The trained model: {cfg.output / 'model'}" in page.text


def test_a_run_of_epochs_is_finished_after_fewer_steps_than_the_default(cfg):
    sft.train(dataclasses.replace(cfg, epochs=0.1, steps=1000))
    write_report(cfg.output)  # as `burnish report`, which does not know the number of rows
    assert "stopped early" not in page_of(cfg.output).text and "finished" in page_of(cfg.output).text


def test_the_page_of_a_running_run_reloads_itself(cfg, monkeypatch):
    written, write = [], display.write_report

    def keep(folder, *rest):
        path = write(folder, *rest)
        written.append(path.read_text())
        return path

    monkeypatch.setattr(display, "write_report", keep)
    sft.train(dataclasses.replace(cfg, log_every=2))
    assert len(written) == 3, "after 2 and 4 steps, and at the end"
    assert 'http-equiv="refresh"' in written[0] and "step 2 of 6" in written[0] and "left" in written[0]
    assert "running" in written[1] and "refresh" not in written[2] and ">finished<" in written[2]


def test_by_default_the_report_takes_little_of_the_runs_time(cfg, monkeypatch):
    """A step takes 0.1 s and a page 0.2 s, which are 5 % of 4 s."""
    clock, written = [0.0], []

    def write(*_):
        written.append(round(clock[0], 1))
        clock[0] += 0.2

    monkeypatch.setattr(display.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(display, "write_report", write)
    cfg.output.mkdir()
    shown = display.Display(dataclasses.replace(cfg, steps=50), cfg.output, 0)
    for i in range(50):
        clock[0] += 0.1
        shown.log({"step": i, "tokens": 10, "seconds": 0.1, "loss": 1.0})
    shown.close(None)
    assert written == [1.1, 5.2], "not in the first second; the last one is the end"


@pytest.mark.parametrize(
    "error, says",
    [
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "terminated"),
        (InputError("the loss is\x1b[2J NaN <b>"), r"InputError: the loss is\x1b[2J NaN"),
        (ValueError("a bug"), "ValueError: a bug"),
    ],
    ids=["interrupted", "terminated", "input", "bug"],
)
def test_a_run_that_is_stopped_says_so(cfg, error, says, capsys):
    tokenizer = Tokenizer(make_tokenizer(), eos="<eos>")
    with (
        pytest.raises(type(error)),
        Run(cfg, tokenizer, rows=64, model=Learner(cfg, load_model(cfg.model))) as run,
    ):
        for step in run.steps():
            run.log({"loss": 1.0}, 10)
            if step == 2:
                raise error
    text = page_of(cfg.output).text
    assert "stopped at step 3" in text and says in text
    assert "written:" not in capsys.readouterr().out


def test_a_run_that_patience_stopped_says_so(cfg):
    tokenizer = Tokenizer(make_tokenizer(), eos="<eos>")
    with Run(
        dataclasses.replace(cfg, patience=1, save_every=0),
        tokenizer,
        rows=64,
        model=Learner(cfg, load_model(cfg.model)),
    ) as run:
        for step in run.steps():
            run.log({"loss": 1.0}, 10)
            if step == 2:
                break
        run.save()
    assert "stopped early by patience" in page_of(cfg.output).text
    assert "after step 3 of 6" in page_of(report.report(report.Config(folder=cfg.output)).parent).text


@pytest.mark.parametrize("fails", ["report", "events"])
def test_what_cannot_be_shown_gives_one_warning_and_the_run_goes_on(cfg, fails, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if fails == "report":
        monkeypatch.setattr(display, "write_report", fail)
    else:
        monkeypatch.setattr(trackers.TensorBoard, "log", fail)
    trained = sft.train(dataclasses.replace(cfg, log_every=1, log_to="tensorboard"))
    printed = capsys.readouterr()
    assert (trained / "model.safetensors").is_file()
    assert printed.err.count("warning:") == 1 and "No space left on device" in printed.err
    assert ("report:" in printed.out) == (fails != "report")


def test_every_method_is_known_by_its_flags_and_logs_its_first_metric():
    for name, module in (
        ("sft", sft),
        ("reward", reward),
        ("dpo", dpo),
        ("kto", kto),
        ("ppo", ppo),
        ("grpo", grpo),
    ):
        flags = {field.name for field in dataclasses.fields(module.Config)}
        assert method_of(dict.fromkeys(flags)) == name
        assert [other for other, method in METHODS.items() if method.flag in flags] == [name]
    assert method_of({"answer": None}) == ""
    assert main_metrics("grpo", ["length", "reward", "loss", "kl"]) == ["reward", "length", "kl"]


def test_a_page_is_made_from_broken_and_foreign_files(tmp_path):
    folder = folder_of(
        tmp_path,
        b'{"step": 0, "loss": 1.5, "text": "x", "flag": true, "nothing": null}\n'
        b'{"step": 1, "loss": NaN}\n\xff\xfe broken\n[1, 2]\n{"step": -4, "loss": 1}\n{"step": 2, "loss": 1e999}\n'
        b'{"step": 1e3, "loss": 1}\n{"loss": 2.5}\n{"step": 9, "<b>&\\u001b": 3}\n{"step": 10, "lo',
    )

    (folder / "samples.jsonl").write_bytes(b'{"prompt": 3, "completion": null, "rewards": 7}\nbroken\n[]\n')
    (folder / "held_out.json").write_text('{"before": {"accuracy": 0.5, "pairs": "many"}, "after": 3}')
    (folder / "versions.json").write_text("[1]")
    records = read_records(folder)
    assert records.columns["loss"] == [(0, 1.5), (1, None), (2, None), (7, 2.5)]
    write_report(folder)
    page = page_of(folder)
    assert "5 of 10 lines cannot be read" in page.text and "not finished: step 10 of 10" in page.text
    assert (
        "versions.json: expected a JSON object" in page.text
        and "accuracy" in page.text
        and "0.5" in page.text
    )
    assert "b" not in page.tags and "\x1b" not in page.text


def test_an_empty_folder_of_a_run_has_a_page_and_another_folder_has_none(tmp_path):
    folder = folder_of(tmp_path, b"")
    assert main(["report", str(folder)]) == 0
    write_report(folder)
    assert "No step has been logged yet" in page_of(folder).text
    with pytest.raises(InputError, match=r"expected the folder of a run, with config.json and metrics.jsonl"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 1


def test_samples_are_escaped_folded_and_harmless(tmp_path):
    folder = folder_of(tmp_path, [{"step": 0, "loss": 1.0}])
    samples = [{"step": i, "prompt": f"prompt {i}", "completion": f"answer {i}"} for i in range(20)]
    talk = [{"role": "user", "content": "שלום <script>alert(1)</script>"}, {"role": "x"}, 7]
    samples[-1] = {"step": 19, "prompt": talk, "completion": "\x1b[2J\x00" + "long " * 400}
    samples[-1] |= {"reward": 0.25, "rewards": {"accuracy": None, "<i>": 1.0}, "length": 12}

    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(text.replace("answer 18", "half \\ud800"))
    write_report(folder)
    page = page_of(folder)
    assert "user: שלום <script>alert(1)</script>" in page.text and r"\x1b[2J\x00long" in page.text
    assert (
        "1411 more characters" in page.text
        and "step 19 · reward 0.25 · length 12 · accuracy None · <i> 1" in page.text
    )
    shown = re.findall(r"prompt (\d+)", page.text)
    assert shown == ["17", "16", "15", "0", "1", "2"], "the newest that can be read, then the first"


def test_of_long_files_the_ends_are_read(tmp_path):
    lines = b"".join(b'{"step": %d, "loss": %d}\n' % (i, i) for i in range(3 * MOST_LINES))
    evaluation = b'{"step": 3333, "loss": 3333, "eval_loss": 1.0}\n'
    folder = folder_of(tmp_path, lines.replace(b'{"step": 3333, "loss": 3333}\n', evaluation))
    sample = json.dumps({"prompt": "p" * 1000}).encode()
    many = b"".join(b'{"step": %d, "x": %s}\n' % (i, sample) for i in range(2000))
    (folder / "samples.jsonl").write_bytes(many)
    records = read_records(folder)
    assert len(records.columns["loss"]) < 1.5 * MOST_LINES and records.last_step == 3 * MOST_LINES - 1
    assert records.columns["eval_loss"] == [(3333, 1.0)] and "one of" in records.notes[0]
    first, newest = records.samples
    assert first[0]["step"] == 0 and newest[0]["step"] == 1999 and len(first) < 600


def test_a_page_of_many_steps_is_small(tmp_path):
    names = ["loss", "grad_norm", *(f"metric/{i}" for i in range(80))]
    lines = [{"step": i} | {name: (i * 37 % 101) / 7 for name in names} for i in range(2000)]
    write_report(folder_of(tmp_path, lines))
    page = page_of(tmp_path / "folder")
    assert (tmp_path / "folder" / "report.html").stat().st_size < 500_000
    assert "All other metrics (60)" in page.text and "20 more metrics" in page.text


def test_a_figure_with_a_long_name_is_a_row_whose_numbers_stay_whole(tmp_path):
    """On a phone a table of one column for each metric would hide most of them."""
    name = "reward/format_of_the_answer_is_as_it_was_asked_for"
    (tmp_path / "config.json").write_text("{}")
    entries = {
        "before": {name: 0.5, "reward": 1.0, "reward_error": 0.0083},
        "after": {name: 0.75, "reward": 2.0},
    }
    (tmp_path / "held_out.json").write_text(json.dumps(entries))
    text = write_report(tmp_path).read_text()
    rows = re.findall(r"<tr>(?:<t[dh]>[^<]*</t[dh]>)+</tr>", text.split("Held-out rows")[1])
    cells = [re.findall(r"<t[dh]>([^<]*)<", row) for row in rows]
    expected = [["metric", "before", "after"], [name, "0.5", "0.75"], ["reward", "1 ± 0.0083", "2"]]
    assert cells == expected
    assert ".metrics td { white-space: nowrap }" in text and text.count('class="metrics"') == 1


def test_held_out_points_lie_in_the_picture_of_their_metric(tmp_path):
    lines = [{"step": i, "loss": 2.0 - i / 10, "seconds": 1.0} for i in range(10)]
    for i in (0, 5):
        lines[i] |= {
            "eval_loss": 1.9 - i / 10,
            "eval_loss_error": 0.05,
            "eval_accuracy": 0.5,
            "eval_seconds": 3.0,
        }
    folder = folder_of(tmp_path, lines, keep_best="loss")
    figures = {"loss": 2.25, "loss_error": 0.125, "rows": 8}
    earlier = {"accuracy": 0.75, "standard_error": 0.05}  # of dpo and reward
    (folder / "held_out.json").write_text(json.dumps({"before": figures, "score": earlier}))
    write_report(folder)

    text = (tmp_path / "folder" / "report.html").read_text()
    (loss,) = re.findall(r"<figure>\s*<h3>loss.*?</figure>", text, re.DOTALL)
    assert loss.count('class="bar c1"') == 2 and 'class="marks c1"' in loss and "held out, ±" in loss
    assert "<h3>eval_accuracy" in text and "<h3>eval_loss" not in text and "eval_loss_error" not in text
    assert re.search(r"eval_loss .*?</td><td>1.9</td><td>1.4</td><td>1.4</td>", text)
    assert re.search(r"eval_accuracy .*?</td><td>0.5</td><td>0.5</td><td></td>", text), (
        "the best of --keep-best"
    )
    assert "<th>metric</th><th>before</th><th>score</th>" in text
    assert "<tr><td>loss</td><td>2.25 ± 0.12</td><td></td></tr>" in text
    assert "<tr><td>rows</td><td>8</td><td></td></tr>" in text
    assert "<tr><td>accuracy</td><td></td><td>0.75 ± 0.05</td></tr>" in text
    others = text.split("All other metrics")[1]
    assert "<h3>eval_seconds" in others and others.count("held out") == 0
