"""Every key of config.json changed, one at a time: our logits are transformers', or the folder is refused."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from burnish.model import InputError, ModelConfig, Transformer, pack
from burnish.model.checkpoint import load_model
from burnish.model.files.architectures import ARCHITECTURES, INERT
from burnish.model.files.config_json import read_config, write_config

pytest.importorskip("transformers", reason="transformers is not installed")
_spec = importlib.util.spec_from_file_location(
    "make_config_mutations", Path(__file__).parents[1] / "data" / "make_config_mutations.py"
)
assert _spec is not None and _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def quiet():
    """Most of these files deserve transformers' warnings."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class Pair:
    """Both sides on the same weights, which are drawn and written once for each set of shapes."""

    def __init__(self, at: Path):
        self.at = at
        # by shapes: transformers' weights, the file that they stand in, and ours from it
        self.states: dict[Any, tuple[dict[str, torch.Tensor], Path]] = {}
        self.loaded: dict[Path, dict[str, torch.Tensor]] = {}
        self.written = 0

    def outcome(self, raw: dict[str, Any], again: bool = False) -> str:
        """equal; refused; "fails there" where transformers does, and ours are finite; or how it is wrong.

        again: what write_config writes is held to the same logits, in transformers.
        """
        try:
            config = read_config(raw)
        except InputError as error:
            return "WRONG: several lines" if "\n" in str(error) else "refused"
        try:
            expected, weights = self.theirs(raw)
        except Exception as error:  # whatever its reason is
            model = Transformer(config)
            finite = bool(logits_of(model).isfinite().all())
            return f"fails there: {error!r}" if finite else "WRONG: not finite, where transformers fails"
        found = logits_of(self.ours(raw, config, weights))
        difference = off_by(found, expected)
        if again and difference <= TOLERANCE:
            difference = off_by(self.theirs(write_config(config))[0], expected)
        return "equal" if difference <= TOLERANCE else f"WRONG: off by {difference:.2g}"

    def ours(self, raw: dict[str, Any], config: ModelConfig, weights: Path) -> Transformer:
        if weights not in self.loaded:
            (weights.parent / "config.json").write_text(json.dumps(raw))
            self.loaded[weights] = load_model(weights.parent).state_dict()
        model = Transformer(config, device="meta")
        model.load_state_dict(self.loaded[weights], assign=True)
        return model

    def theirs(self, raw: dict[str, Any]) -> tuple[torch.Tensor, Path]:
        """transformers' logits (LENGTH, V), and the file of its weights."""
        folder = self.at / str(self.written)
        self.written += 1
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
        model = make.model_of(folder)
        shapes = (model.config.tie_word_embeddings, model.config.model_type)
        shapes += tuple((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())

        if shapes not in self.states:
            make.draw(model)
            saved = self.at / f"weights-{len(self.states)}"
            model.save_pretrained(saved)
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            self.states[shapes] = state, saved / "model.safetensors"
        state, file = self.states[shapes]
        model.load_state_dict(state)
        with torch.inference_mode():
            return model(make.tokens(), return_dict=True).logits[0].clone(), file


def off_by(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of logits above 10 over a tenth of the largest."""
    return ((found - expected).abs().max() / (expected.abs().max() / 10).clamp(min=1)).item()


@torch.no_grad()
def logits_of(model: Transformer) -> torch.Tensor:
    return model.logits(model(pack([make.tokens()[0].tolist()])))


def raw_of(data: Path, folder: str) -> dict[str, Any]:
    return json.loads((data / "tiny-hf" / folder / "config.json").read_text())


@pytest.mark.parametrize("folder", make.FOLDERS)
def test_a_changed_key_changes_what_it_changes_in_transformers_or_is_refused(data, tmp_path, folder):
    """A config that we write back is held to the same logits where the change is one of ADDED that we see."""
    raw, pair = raw_of(data, folder), Pair(tmp_path)
    assert pair.outcome(raw, again=True) == "equal"
    changes = make.mutations(raw)
    if folder.startswith("llama-"):  # the other keys are llama's
        changes = [change for change in changes if "rope_parameters" in change]
    outcomes = []
    for change in changes:
        new = make.changed(raw, change)
        outcomes.append((change, pair.outcome(new, again=change in make.ADDED and seen(new, raw))))
    wrong = [f"{change}: {outcome}" for change, outcome in outcomes if outcome.startswith("WRONG")]
    assert not wrong, "\n".join(wrong)
    # what is refused proves nothing
    equal = sum(outcome == "equal" for _, outcome in outcomes)
    assert equal >= (10 if folder.startswith("llama-") else 60), equal


def seen(new: dict[str, Any], raw: dict[str, Any]) -> bool:
    try:
        return read_config(new) != read_config(raw)
    except InputError:
        return False


# values of which transformers takes one, whatever the key
VALUES = (3, True, False, "eager", "bfloat16", "regression", "hybrid", {"0": "x"}, {"x": 0}, ["x"], [[5]])


def says_nothing(pair: Pair, raw: dict[str, Any], key: str) -> bool:
    """Tell whether transformers takes the key with one of VALUES, and its logits are ours, those without it."""
    for value in VALUES:
        if raw.get(key, ...) == value:
            continue
        try:
            found, _ = pair.theirs(raw | {key: value})
        except Exception:  # a value of the wrong type
            continue
        config = read_config(raw | {key: value})
        assert config == read_config(raw)
        expected = logits_of(pair.ours(raw, config, pair.theirs(raw)[1]))
        return off_by(found, expected) <= TOLERANCE
    raise AssertionError(f"{key}: transformers takes none of VALUES")


def test_keys_that_are_inert_everywhere_change_nothing_in_transformers(data, tmp_path):
    raw, pair = raw_of(data, "llama"), Pair(tmp_path)
    assert [key for key in INERT if not says_nothing(pair, raw, key)] == []


@pytest.mark.parametrize("folder", [f for f in make.FOLDERS if not f.startswith("llama-")])
def test_keys_that_are_inert_for_one_architecture_change_nothing_in_transformers(data, tmp_path, folder):
    raw, pair = raw_of(data, folder), Pair(tmp_path)
    inert = ARCHITECTURES[raw["model_type"]].inert
    loud = [key for key in inert if key != "head_dim" and not says_nothing(pair, raw, key)]
    assert loud == []
    assert all(len(reason.split()) > 3 for reason in (inert | INERT).values())


def shrunk(raw: dict[str, Any]) -> dict[str, Any]:
    """A published config with the sizes of a toy, all else as it is."""
    heads, layers = 4, 6

    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if raw.get("num_key_value_heads") == raw["num_attention_heads"] else 2,
        "head_dim": 16,
        "sliding_window": 5,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "pad_token_id": 0,
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 16),
        **dict.fromkeys(("num_experts_per_tok", "experts_per_token"), 3),
    }

    new = raw | {key: value for key, value in small.items() if raw.get(key)}
    return new | {key: raw[key][:layers] for key in ("layer_types", "no_rope_layers") if key in raw}


@pytest.mark.parametrize("name", json.loads((make.HERE / "published_configs.json").read_text()))
def test_a_published_config_with_the_sizes_of_a_toy_computes_what_transformers_does(data, tmp_path, name):
    raw = json.loads((data / "published_configs.json").read_text())[name]
    assert Pair(tmp_path).outcome(shrunk(raw), again=True) == "equal"
