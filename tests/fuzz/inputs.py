"""Inputs to mutate: a folder for each kind, made from tests/data and from small models of our own."""

import gzip
import json
import shutil
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from burnish.algorithms import sft
from burnish.algorithms.data.lessons import Lesson, write_lessons
from burnish.algorithms.run.digests import DIGESTS
from burnish.model.adapter import add_lora
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.config import ModelConfig
from burnish.model.scalar import ScalarModel
from burnish.model.text.template import TOOL_TEMPLATE_FILE
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parents[1] / "data"
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
TEMPLATE = """\
{%- if tools %}
    {{- 'Tools: ' + tools | tojson + '\\n' }}
{%- endif %}
{%- if enable_thinking %}
    {{- 'Think.\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name + ' ' + call.function.arguments | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
ROW_TEMPLATE = "{% if prompt %}{{ prompt | trim }} is? ||| {{ completion }}{% endif %}\n"
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]
STEPS = 3  # of a run
FLAGS = (
    *("--steps", f"{STEPS}", "--save-every", "2", "--batch-size", "2", "--learning-rate", "1e-3"),
    *("--device", "cpu"),
)


def make_inputs(folder: Path) -> None:
    """All of them, in folders below `folder`."""
    torch.set_num_threads(1)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        _models(folder)
        _adapters(folder)
        _small(folder / "small")
        _rows(folder)
        _run(folder)
        _lessons(folder)
    _gguf(folder / "gguf")


def _models(folder: Path) -> None:
    for kind in ("tiny-hf", "tiny-bnb"):
        for source in (DATA / kind).iterdir():
            ignored = shutil.ignore_patterns("expected.*")
            shutil.copytree(source, folder / source.name, ignore=ignored)
    fused, source = folder / "fused", folder / "qwen3_moe"
    shutil.copytree(source, fused)
    tensors = {n: t for n, t in load_file(source / "model.safetensors").items() if ".experts." not in n}
    for name, tensor in load_model(source).state_dict().items():
        if ".experts." in name:
            tensors[f"model.{name}".removesuffix(".weight")] = tensor
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    save_model(ScalarModel(SMALL, seed=3), folder / "reward")


def _drawn(model: Any, seed: int = 0) -> None:
    """Numbers for what an adapter trains, which begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def _adapters(folder: Path) -> None:
    """Each beside its base, which its config names from its own folder."""
    for source in (DATA / "tiny-peft").iterdir():
        own = folder / source.name
        shutil.copytree(folder / "qwen3", own / "base")
        shutil.copytree(source, own / "adapter", ignore=shutil.ignore_patterns("expected.*"))
        _name_base(own / "adapter", "../base")

    own = folder / "experts-lora"
    shutil.copytree(folder / "qwen3_moe", own / "base")
    model = load_model(own / "base")
    add_lora(model, 2, targets=("q_proj",), parameters=EXPERTS, base="../base", modules_to_save=("lm_head",))
    _drawn(model)
    save_model(model, own / "adapter")

    own = folder / "adapter-on-adapter"
    shutil.copytree(folder / "qwen3-lora", own)
    (own / "adapter").rename(own / "first")
    reward = load_scalar_model(own / "first", seed=1)
    add_lora(reward, 2, targets=("q_proj",), base="../first", modules_to_save=("score",))
    _drawn(reward)
    save_model(reward, own / "adapter")


def _name_base(adapter: Path, base: str) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}, indent=1))


def _small(folder: Path) -> None:
    """A model with a tokenizer and a template that reads tools and one more variable."""
    tokenizer = Tokenizer.load(DATA / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    save_model(Transformer(SMALL, seed=1), folder, tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]  # what stands in both is read in this file
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    special = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    (folder / "kwargs.json").write_text('{"enable_thinking": true}')
    (folder / "tools.json").write_text(json.dumps(TOOLS))

    own = folder.with_name("tool-template")
    shutil.copytree(folder, own)
    (own / TOOL_TEMPLATE_FILE).parent.mkdir()
    (own / TOOL_TEMPLATE_FILE).write_text(TEMPLATE.replace("Tools: ", "Call one of: "))


# ---- rows


def rows_of(kind: str) -> Iterator[dict[str, Any]]:
    for i in range(6):
        question, answer = f"{i} + {i}", f"{2 * i}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

        match kind:
            case "completions":
                yield {"prompt": f"{question} =", "completion": f" {answer}"}
            case "messages":
                yield {"messages": turns}
            case "prompts":
                yield {"prompt": f"{question} =", "answer": answer}
            case "preferences":
                yield {"prompt": question, "chosen": answer, "rejected": "none", "margin": 0.5}
            case "judged":
                yield {"prompt": question, "completion": answer, "label": i % 2 == 0}

            # of other columns than a prompt and what continues it
            case "text":
                yield {"text": f"{question} = {answer}"}
            case "tools":
                call = {"type": "function", "function": {"name": "add", "arguments": {"a": i}}}
                called = {"role": "assistant", "content": "", "tool_calls": [call]}
                talk = [turns[0], called, {"role": "tool", "content": answer}, turns[1]]
                yield {"messages": talk, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": True}}


def _rows(folder: Path) -> None:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    for kind in ("completions", "messages", "prompts", "preferences", "judged", "text", "tools"):
        own, rows = folder / f"rows-{kind}", list(rows_of(kind))
        own.mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (own / "rows.jsonl").write_text(lines)
        (own / "rows.json").write_text(json.dumps(rows, indent=1))
        (own / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
        if kind == "tools":  # Arrow has no empty object
            continue
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, own / "rows.parquet")
        with pyarrow.ipc.new_stream(str(own / "rows.arrow"), table.schema) as stream:
            stream.write_table(table)
    _saved(folder / "rows-text")
    (folder / "rows-completions" / "template.jinja").write_text(ROW_TEMPLATE)


def _saved(folder: Path) -> None:
    """The folder's rows as `datasets.save_to_disk` writes them, twice."""
    saved = folder / "saved"
    saved.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name in names:
        shutil.copy(folder / "rows.arrow", saved / name)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (saved / "state.json").write_text(json.dumps(state, indent=2))


# ---- what a run leaves


def _run(folder: Path) -> None:
    import tyro

    own = folder / "run"
    own.mkdir()
    shutil.copytree(folder / "small", own / "base")
    shutil.copy(folder / "rows-completions" / "rows.jsonl", own)
    with chdir(own):
        flags = ("--model", "base", "--data", "rows.jsonl", "--output", "out", *FLAGS)
        sft.train(tyro.cli(sft.Config, args=flags))
    records = [{"step": i // 2, "prompt": "1", "completion": "2", "reward": 0.5} for i in range(6)]
    (own / "out" / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for done in ("model", "step-2"):
        shutil.rmtree(own / "out" / done)
    shutil.copytree(own, folder / "run-of-two")
    _share_out(folder / "run-of-two" / "out" / "checkpoint.safetensors")


def _share_out(file: Path) -> None:
    """A checkpoint as two processes write it: each has half of the rows of what has rows.

    It has no digests, so that mutations reach the checks behind them.
    """
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = {name: text for name, text in opened.metadata().items() if name != DIGESTS}
    other = file.with_name("checkpoint-2-1-of-2.safetensors")
    half = {name: -(-len(tensor) // 2) for name, tensor in tensors.items() if tensor.dim()}
    shared = metadata | {"others": json.dumps([other.name])}
    first, second = (json.dumps(starts) for starts in (dict.fromkeys(half, 0), half))
    save_file(
        {n: t[: half.get(n)] if t.dim() else t for n, t in tensors.items()}, file, shared | {"starts": first}
    )
    save_file({n: tensors[n][start:] for n, start in half.items()}, other, shared | {"starts": second})


def _lessons(folder: Path) -> None:
    tokenizer, generator = Tokenizer.load(folder / "small"), torch.Generator().manual_seed(0)
    lessons = []
    for i in range(4):
        tokens = torch.randint(3, 512, (6 + i,), generator=generator).tolist()
        logprobs = torch.randn(4, 3, generator=generator).log_softmax(-1).sort(descending=True).values
        ids = torch.stack([torch.randperm(500, generator=generator)[:3] + 3 for _ in range(4)]).int()
        lessons.append(Lesson(tokens, [False] * (2 + i) + [True] * 4, ids=ids, logprobs=logprobs - 0.1))
    own = folder / "lessons"
    own.mkdir()
    write_lessons(own / "lessons.safetensors", lessons, tokenizer, 1.0)


def _gguf(folder: Path) -> None:
    """A llama of one layer, with the tokenizer's tokens and merges."""
    import gguf

    hidden, ffn, heads, groups, head_dim = 32, 48, 2, 1, 16
    model = json.loads((DATA / "tokenizer" / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    sizes = {
        "vocab_size": len(tokens),
        "embedding_length": hidden,
        "feed_forward_length": ffn,
        "block_count": 1,
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "context_length": 128,
        "rope.dimension_count": head_dim,
    }

    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10_000.0)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")

    shapes = {
        "token_embd": (len(tokens), hidden),
        "output_norm": (hidden,),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (groups * head_dim, hidden),
        "blk.0.attn_v": (groups * head_dim, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (ffn, hidden),
        "blk.0.ffn_up": (ffn, hidden),
        "blk.0.ffn_down": (hidden, ffn),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
    }

    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
