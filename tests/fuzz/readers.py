"""Every kind of file that Burnish reads: where a whole one lies, how it is changed, and what reads it.

A reader returns a digest of all that it made of the files, so that two results are the same or they are not.
"""

import dataclasses
import hashlib
import io
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import tyro
from burnish.algorithms import chat, sft
from burnish.algorithms.data.examples import rl_prompts, sft_examples
from burnish.algorithms.data.lessons import read_lessons
from burnish.algorithms.data.pairs import judged_completions, preferences
from burnish.algorithms.data.rows import read_rows
from burnish.algorithms.data.tokenizer import load_tokenizer
from burnish.model.checkpoint import load_model, load_scalar_model
from burnish.model.convert import convert_gguf
from burnish.model.errors import InputError
from burnish.model.packed import pack
from burnish.model.text.template import TOOL_TEMPLATE_FILE
from burnish.model.text.tokenizer import Tokenizer
from inputs import FLAGS, rows_of
from mutations import Mutation, of_adapter_config, of_bytes, of_json, of_safetensors
from programs import of_arrow, of_gguf, of_gzip, of_lines, of_list, of_parquet, of_template

TALK = [
    *({"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "3"}),
    *({"role": "user", "content": "Wörter?"}, {"role": "assistant", "content": "<|im_end|> is one."}),
]
MUTATIONS: dict[str, Callable[[bytes, Random], Mutation]] = {  # what a file holds -> how it is changed
    **{
        "json": of_json,
        "adapter config": of_adapter_config,
        "safetensors": of_safetensors,
        "bytes": of_bytes,
    },
    **{"template": of_template, "lines": of_lines, "list": of_list, "gzip": of_gzip, "parquet": of_parquet},
    **{"arrow": of_arrow, "gguf": of_gguf},
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """name: what is read, then which of its kind. folder: below that of the inputs. files: path -> what it holds."""

    name: str
    folder: str
    files: dict[str, str]
    read: Callable[[Path], str]
    writes: bool = False  # into its folder
    is_flag: bool = False  # what the file holds is given as a flag: nothing else can stand in its place


def digest(*values: Any) -> str:
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            found.update(
                f"{value.dtype} {tuple(value.shape)}".encode() + value.detach().float().numpy().tobytes()
            )
        else:
            found.update(
                value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace")
            )
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
    return found.hexdigest()[:16] + ("" if finite else " not finite")


# ---- models

PACKED = pack([[1, 2, 3, 4], [5, 6]], device="cpu")


def of_model(folder: Path) -> str:
    model = load_model(folder)
    with torch.no_grad():
        return digest(model.logits(model(PACKED)), model.config)


def of_score(folder: Path) -> str:
    model = load_scalar_model(folder)
    with torch.no_grad():
        return digest(model.values(PACKED, torch.tensor([3, 5])), model.config, model.bias)


def of_adapter(folder: Path) -> str:
    return of_model(folder / "adapter")


def of_reward_adapter(folder: Path) -> str:
    return of_score(folder / "adapter")


# ---- texts


def of_tokenizer(folder: Path) -> str:
    """Also what is saved and read again."""
    tokenizer = Tokenizer.load(folder)
    made = _of_texts(tokenizer)
    tokenizer.save(folder / "saved")
    again = saved(_of_texts, Tokenizer.load, folder / "saved")
    assert again == made, "saved and read again, it is another tokenizer"
    return digest(made)


def saved(look: Callable[[Any], Any], load: Callable[[Path], Any], folder: Path) -> Any:
    """Look at what is loaded from a folder that we have saved: to refuse it is a fault of ours."""
    try:
        return look(load(folder))
    except InputError as error:
        raise AssertionError(f"saved, it cannot be read again: {error}") from error


def _of_texts(tokenizer: Tokenizer) -> list[Any]:
    ids = tokenizer.encode_text("Hello, wörld!  12+3=15 <|im_end|>\n")
    special = [sorted(tokenizer.stop_ids), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    made = [ids, tokenizer.decode(ids), special, sorted(tokenizer.backend.get_vocab().items())]
    if tokenizer.chat_template is not None:
        made += [
            tokenizer.encode_chat(TALK[:3], add_generation_prompt=True),
            tokenizer.encode_chat_with_mask(TALK),
        ]
    return made


def of_template_file(folder: Path) -> str:
    tokenizer = Tokenizer.load(folder)
    rows = [{"messages": TALK}, {"messages": TALK[:2]}]
    return digest(_of_texts(tokenizer), _without_places(*sft_examples(rows, tokenizer, max_length=200)))


def of_tool_template(folder: Path) -> str:
    return digest(_without_places(*sft_examples([*rows_of("tools")], Tokenizer.load(folder), max_length=200)))


@cache
def tokenizer_of_small(inputs: Path) -> Tokenizer:
    return Tokenizer.load(inputs / "small")


def _without_places(items: Any, counts: Any) -> list[Any]:
    """Without the lines that they are from: a blank line changes no row."""
    return [dict(counts), *({k: v for k, v in vars(item).items() if k != "where"} for item in items)]


def of_rows(name: str, made: Callable[..., Any], inputs: Path, template: str | None, folder: Path) -> str:
    rows = read_rows(folder / name, folder / template if template else None)
    return digest(_without_places(*made(rows, tokenizer_of_small(inputs), max_length=200)))


# ---- runs


def of_lessons(inputs: Path, folder: Path) -> str:
    found = read_lessons(folder / "lessons.safetensors", tokenizer_of_small(inputs), 1.0)
    tensors = [tensor for one in found for tensor in (one.ids, one.logprobs) if tensor is not None]
    return digest([(one.tokens, one.mask) for one in found], *tensors)


def of_run(folder: Path) -> str:
    """The model that it ends with."""
    flags = ("--model", "base", "--data", "rows.jsonl", "--output", "out", "--resume", *FLAGS)
    with chdir(folder):
        sft.train(tyro.cli(sft.Config, args=flags))
    weights = (folder / "out" / "model" / "model.safetensors").read_bytes()
    return digest(weights)


def of_gguf_file(folder: Path) -> str:
    convert_gguf(folder / "model.gguf", folder / "out")
    names = (
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"),
        "tokenizer_config.json",
    )
    saved(lambda tokenizer: tokenizer.stop_ids, Tokenizer.load, folder / "out")
    saved(lambda model: model.config, load_model, folder / "out")
    return digest(*((folder / "out" / name).read_bytes() for name in names))


# ---- flags


def of_kwargs(folder: Path) -> str:
    """The file's text, given as a flag: no flag can hold a zero byte."""
    text = (folder / "kwargs.json").read_bytes().replace(b"\0", b"").decode("utf-8", "surrogateescape")
    config = sft.Config(model=folder, data=Path("none"), chat_template_kwargs=text)
    tokenizer = load_tokenizer(config)
    return digest(tokenizer.variables, tokenizer.encode_chat(TALK))


def of_tools(folder: Path) -> str:
    config = chat.Config(
        model=folder,
        tools=folder / "tools.json",
        prompt="Hello",
        max_new_tokens=2,
        device="cpu",
        temperature=0,
    )
    with redirect_stdout(io.StringIO()) as printed:
        chat.main(config)
    return digest(printed.getvalue())


# ---- the table

TINY_HF = Path(__file__).parents[1] / "data" / "tiny-hf"
ARCHITECTURES = [file.parent.name for file in sorted(TINY_HF.glob("*/expected.safetensors"))]
ROWS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("completions", "messages", "tools", "text"), sft_examples),
    **{"prompts": rl_prompts, "preferences": preferences, "judged": judged_completions},
}
FORMATS = {
    **{"rows.jsonl": "lines", "rows.json": "list", "rows.jsonl.gz": "gzip", "rows.parquet": "parquet"},
    "rows.arrow": "arrow",
}
TABLES = ("parquet", "arrow")


def readers(inputs: Path) -> list[Reader]:
    """All of them, for the folder that `make_inputs` has filled."""
    weights, config = {"model.safetensors": "safetensors"}, {"config.json": "json"}
    shards = {f"model-0000{i}-of-00003.safetensors": "safetensors" for i in (1, 2, 3)}
    found = [Reader(f"config/{name}", name, config, of_model) for name in ARCHITECTURES]
    found += [
        Reader(f"weights/{name}", name, weights, of_model)
        for name in ("llama", "mixtral", "gpt_oss", "fused")
    ]
    found += [
        Reader("weights/sharded", "qwen3-sharded", shards, of_model),
        Reader("index", "qwen3-sharded", {"model.safetensors.index.json": "json"}, of_model),
        Reader("generation", "llama", {"generation_config.json": "json"}, of_model),
        Reader("reward/config", "reward", config, of_score),
        Reader("reward/weights", "reward", weights, of_score),
    ]

    for name in ("qwen3-nf4", "qwen3-nf4-dq", "qwen3-fp4"):
        found += [Reader(f"4bit/config/{name}", name, config, of_model)]
        found += [Reader(f"4bit/weights/{name}", name, weights, of_model)]
    found += _adapters() + _texts(inputs) + _rows(inputs)

    # runs that are resumed
    run = {"checkpoint.safetensors": "safetensors", "config.json": "json", "metrics.jsonl": "lines"}
    for name, kind in (run | {"samples.jsonl": "lines"}).items():
        found.append(Reader(f"run/{name.partition('.')[0]}", "run", {f"out/{name}": kind}, of_run, True))
    shared = {f"out/{name}.safetensors": "safetensors" for name in ("checkpoint", "checkpoint-2-1-of-2")}
    found.append(Reader("run/checkpoint/shared", "run-of-two", shared, of_run, True))

    lessons = {"lessons.safetensors": "safetensors"}
    found += [
        Reader("lessons", "lessons", lessons, partial(of_lessons, inputs)),
        Reader("gguf", "gguf", {"model.gguf": "gguf"}, of_gguf_file, True),
        Reader("flags/kwargs", "small", {"kwargs.json": "json"}, of_kwargs, is_flag=True),
        Reader("flags/tools", "small", {"tools.json": "json"}, of_tools),
    ]
    return found


def _adapters() -> list[Reader]:
    files = {
        "adapter/adapter_config.json": "adapter config",
        "adapter/adapter_model.safetensors": "safetensors",
    }
    found = []
    for name in ("qwen3-lora", "qwen3-dora", "qwen3-rslora", "qwen3-rank_pattern", "experts-lora"):
        for file, kind in files.items():
            part = "config" if kind == "adapter config" else "weights"
            found.append(Reader(f"adapter/{part}/{name}", name, {file: kind}, of_adapter))
    on_adapter = files | {"first/adapter_config.json": "adapter config"}
    return [*found, Reader("adapter/on-adapter", "adapter-on-adapter", on_adapter, of_reward_adapter)]


def _texts(inputs: Path) -> list[Reader]:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    found = [
        Reader(f"tokenizer/{name.partition('.')[0]}", "small", {name: "json"}, of_tokenizer, True)
        for name in names
    ]
    completions = partial(of_rows, "rows.jsonl", sft_examples, inputs, "template.jinja")
    template = {"template.jinja": "template"}
    return [
        *found,
        Reader("template/chat", "small", {"chat_template.jinja": "template"}, of_template_file),
        Reader("template/tools", "tool-template", {TOOL_TEMPLATE_FILE: "template"}, of_tool_template),
        Reader("template/rows", "rows-completions", template, completions),
    ]


def _rows(inputs: Path) -> list[Reader]:
    found = []
    for kind, made in ROWS.items():
        for file, holds in FORMATS.items():
            if kind != "tools" or holds not in TABLES:
                read = partial(of_rows, file, made, inputs, None)
                found.append(Reader(f"rows/{kind}/{holds}", f"rows-{kind}", {file: holds}, read))

    # a folder that datasets.save_to_disk wrote
    saved_rows = partial(of_rows, "saved", sft_examples, inputs, None)
    return [*found, Reader("rows/saved", "rows-text", {"saved/state.json": "json"}, saved_rows)]
