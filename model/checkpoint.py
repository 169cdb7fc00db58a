"""Hugging Face folders, read and written: config.json, generation_config.json and safetensors; nothing is unpickled.

On disk a tensor has its parameter's name behind "model.", but for score.weight, and lm_head.weight, which is left out
where it is tied.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ModelConfig
from .errors import InputError
from .scalar import ScalarModel
from .transformer import Transformer

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALAR, SCORE_BIAS = "ForSequenceClassification", "score_bias"
MODEL_FILES = (  # what a save may replace
    *("config.json", "generation_config.json", "*.safetensors", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)


def load_model(
    folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """The model in a Hugging Face folder, its weights in `dtype` whatever the files hold.

    Raises InputError naming the file, and the key or tensor, where one is missing, broken, unexpected or of the wrong
    shape, and where config.json asks for an architecture or option that this transformer would compute differently.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    if _is_scalar(raw):
        raise InputError(
            f"{folder}: expected a language model, found a {raw['architectures'][0]}: it scores text"
        )
    config = _model_config(raw, folder)
    model = Transformer(config, device="meta")
    also = ("lm_head.weight",) if config.tie_word_embeddings else ()
    state = _read_tensors(folder, model, dtype, device, also)
    head = state.pop("lm_head.weight") if also and "lm_head.weight" in state else None
    _assign(model, state)
    if head is not None and not torch.equal(head, state["model.embed_tokens.weight"]):
        raise InputError(
            f"{folder}: lm_head.weight: differs from model.embed_tokens.weight although tie_word_embeddings is true"
        )
    return model


def load_scalar_model(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ScalarModel:
    """The reward model or critic in a *ForSequenceClassification folder with one label; or the body of the language
    model in `folder` under a fresh head, drawn from `seed`. Raises InputError as `load_model` does.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    bias = raw.pop(SCORE_BIAS, 0.0)
    if not isinstance(bias, int | float):
        raise InputError(f"{folder / 'config.json'}: {SCORE_BIAS}: expected a number, got {bias!r}")
    model = ScalarModel(_model_config(raw, folder), device="meta")
    if _is_scalar(raw):
        _assign(model, _read_tensors(folder, model, dtype, device))
        model.bias = float(bias)
        return model
    state = _read_tensors(folder, model.body, dtype, device, also=("lm_head.weight",))
    state.pop("lm_head.weight", None)
    _assign(model.body, state)
    model.draw_head(seed, dtype, device)
    return model


def save_model(
    model: Transformer | ScalarModel,
    folder: str | os.PathLike[str],
    tokenizer: "Tokenizer | None" = None,
) -> None:
    """Write a folder that load_model (load_scalar_model) and transformers read. It appears whole or not at all.

    An earlier model in `folder` is replaced, with all its files. Raises InputError where `folder` holds something else,
    or cannot be written.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not _holds_a_model(folder):
        raise InputError(
            f"{folder}: expected a new folder or an earlier model, found something else: not replaced"
        )
    config = model.config
    state = {
        _on_disk(name): weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()
    }
    dtype = state["model.embed_tokens.weight"].dtype
    raw = {**config.to_hf(), "dtype": str(dtype).removeprefix("torch.")}
    if isinstance(model, ScalarModel):
        raw["architectures"] = [name.replace("ForCausalLM", SCALAR) for name in raw["architectures"]]
        raw |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, SCORE_BIAS: model.bias}
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw[key] is not None}
    with _replacing(folder) as beside:
        _write_json(beside / "config.json", raw)
        _write_json(beside / "generation_config.json", config.generation or ids)
        if tokenizer is not None:
            tokenizer.save(beside)
        save_file(state, beside / WEIGHTS, metadata={"format": "pt"})


# ---- reading


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: expected a model folder, found {'a file' if folder.exists() else 'nothing'}"
        )
    return _read_json(folder / "config.json")


def _is_scalar(raw: dict[str, Any]) -> bool:
    """Says config.json that a head of labels stands on the transformer, not one of the vocabulary?"""
    architectures = raw.get("architectures")
    return isinstance(architectures, list) and any(str(name).endswith(SCALAR) for name in architectures)


def _model_config(raw: dict[str, Any], folder: Path) -> ModelConfig:
    generation_file = folder / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.exists() else {}
    return ModelConfig.from_hf(raw, str(folder / "config.json"), generation)


def _read_tensors(
    folder: Path,
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device | str,
    also: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Name on disk -> tensor: those of `model`, and the names in `also` where the files hold them."""
    wanted = {_on_disk(name): weight.shape for name, weight in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for file, names in _files(folder).items():
        with _opened(file) as tensors:
            held = dict.fromkeys(tensors.keys())
            for name in held if names is None else names:
                if name not in held:
                    raise InputError(f"{file}: {name}: missing, although {INDEX} says that it is there")
                if name.endswith("rotary_emb.inv_freq"):  # a constant that old checkpoints carry
                    continue
                if name not in wanted and name not in also:
                    raise InputError(
                        f"{file}: {name}: unexpected for this config.json, which has no such tensor"
                    )
                tensor = tensors.get_tensor(name)
                if name in wanted and tensor.shape != wanted[name]:
                    raise InputError(
                        f"{file}: {name}: expected shape {tuple(wanted[name])}, got {tuple(tensor.shape)}"
                    )
                if not tensor.is_floating_point():
                    raise InputError(f"{file}: {name}: expected floating point, got {tensor.dtype}")
                state[name] = tensor.to(device, dtype, copy=True)  # a copy: the file may change while mapped
    missing = [name for name in wanted if name not in state]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: {missing[0]}{more}: missing from the safetensors files")
    return state


def _assign(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict({name: state[_on_disk(name)] for name in model.state_dict()}, assign=True)


# ---- names and files


def _on_disk(name: str) -> str:
    return name if name.startswith(("lm_head.", "score.")) else f"model.{name.removeprefix('body.')}"


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Safetensors file -> the tensors to take from it, None for all."""
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: None}
    index = folder / INDEX
    if not index.exists():
        pickled = (
            " (pickled .bin and .pt files are not read)"
            if [*folder.glob("*.bin"), *folder.glob("*.pt*")]
            else ""
        )
        raise InputError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither{pickled}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map: expected an object from tensor to file, got {weight_map!r}")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise InputError(
                f"{index}: {name}: expected a .safetensors file of the same folder, got {file!r}"
            )
        names = files.setdefault(folder / file, [])
        assert names is not None
        names.append(name)
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise InputError(f"{file}: missing")
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: missing") from None
    except (OSError, ValueError) as error:  # ValueError: broken UTF-8 or JSON
        raise InputError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _holds_a_model(folder: Path) -> bool:
    """Empty, or a config.json and nothing but files that a model folder has: anything else would be lost."""
    if not folder.is_dir():
        return False
    names = [entry.name for entry in folder.iterdir()]
    ours = all(any(fnmatch(name, pattern) for pattern in MODEL_FILES) for name in names)
    return not names or ("config.json" in names and ours)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place once the block has ended without an exception."""
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o777 & ~umask)  # mkdtemp's folders are private, as are safetensors' files
        yield beside
        for file in beside.iterdir():
            file.chmod(0o666 & ~umask)
        if folder.exists():
            earlier = beside.with_suffix(".earlier")
            folder.rename(earlier)
            try:
                beside.rename(folder)
            except BaseException:
                earlier.rename(folder)
                raise
            shutil.rmtree(earlier)
        else:
            beside.rename(folder)
    except BaseException as error:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise InputError(f"{folder}: cannot be written: {error}") from error
        raise
