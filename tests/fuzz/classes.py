"""Why a changed file may be read, and give another result: a class for each reason, with its argument.

An acceptance is explained where every difference between the two files is in a class. The predicates look at values,
never at how they came about. What Burnish ought to refuse (a wrong type, a number out of range, a key twice, what it
cannot compute) is in none, so that its acceptance is a failure.
"""

import json
import struct
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from differences import ABSENT, FLOATS, Difference, Numbers, differences, value_of
from inputs import DATA, SMALL, STEPS
from values import MOST, READ, is_cell, is_id, is_json, is_number, is_text, is_whole


class Class(NamedTuple):
    """reader: the first words of its name, or of several. holds: of a difference."""

    name: str
    reader: str | tuple[str, ...]
    holds: Callable[[Difference], bool]
    why: str

    def reads(self, reader: str) -> bool:
        names = (self.reader,) if isinstance(self.reader, str) else self.reader
        return any(f"{reader}/".startswith(f"{name}/") for name in names)


def class_of(reader: str, difference: Difference) -> str | None:
    return next((c.name for c in CLASSES if c.reads(reader) and c.holds(difference)), None)


def explained(reader: str, holds: str, whole: bytes, changed: bytes) -> list[tuple[Difference, str | None]]:
    """Each difference with its class. Empty where it is not known what the file says, or it contradicts itself."""
    found = differences(holds, whole, changed) or []
    checks = (
        [check for name, check in CONSISTENT.items() if f"{reader}/".startswith(f"{name}/")] if found else []
    )
    if not all(check(value_of(holds, changed)) for check in checks):
        return []
    return [(d, class_of(reader, d)) for d in found]


def keys(names: tuple[str, ...], check: Callable[[Any], bool], *also: Any) -> Callable[[Difference], bool]:
    """Differences at one of the keys `names` where both values pass the check or are one of `also`."""

    def holds(d: Difference) -> bool:
        return bool(d.path) and d.path[-1] in names and values_pass(check, d, *also)

    return holds


def values_pass(check: Callable[[Any], bool], d: Difference, *also: Any) -> bool:
    return all(any(value is other for other in also) or check(value) for value in (d.before, d.after))


def is_in_rope(value: Any) -> bool:
    """A number that frequencies stay finite with."""
    return is_number(value, 1e-9, 1e15)


def is_base(value: Any) -> bool:
    """The longest wave is that many times the shortest."""
    return is_in_rope(value) and value > 1


def is_size(value: Any) -> bool:
    return is_whole(value) and value > 0


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


TOKENS = SMALL.vocab_size  # of the tokenizer


@cache
def vocabulary() -> set[str]:
    found = json.loads((DATA / "tokenizer" / "tokenizer.json").read_text())
    return {*found["model"]["vocab"], *(token["content"] for token in found["added_tokens"])}


# ---- configs

CONFIGS = ("config", "reward/config", "4bit/config")
ROPE_BASES, ROPE_FACTORS = (
    ("rope_theta", "rope_local_base_freq"),
    ("factor", "low_freq_factor", "high_freq_factor"),
)
ROPE_FREE = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)  # null is the rule's own
SCALES = (
    *("rms_norm_eps", "initializer_range", "router_aux_loss_coef", "routed_scaling_factor", "swiglu_limit"),
    "swiglu_alpha",
)
COUNTS = ("max_window_layers", "first_k_dense_replace")
NUMBERS_OF = (
    *("num_experts_per_tok", "n_group", "topk_group", "decoder_sparse_step", "query_pre_attn_scalar"),
    *("max_position_embeddings", "original_max_position_embeddings"),
    *("sliding_window_pattern", "no_rope_layer_interval"),
)
SWITCHES = ("norm_topk_prob", "use_sliding_window", "rope_interleave", "truncate")
LAYERS = {
    "layer_types": lambda kind: kind in ("full_attention", "sliding_attention"),
    "no_rope_layers": lambda kind: is_whole(kind) and kind < 2,
    "mlp_only_layers": is_whole,
}
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def of_layers(d: Difference) -> bool:
    """The list of layers, or one of its entries."""
    check = LAYERS.get(str(d.path[0]))
    if check is None or len(d.path) > 2:
        return False
    if len(d.path) == 2:
        return values_pass(check, d)
    one, other = d.before, d.after
    has_entry_each = d.path[0] != "mlp_only_layers" and isinstance(one, list) and isinstance(other, list)
    if has_entry_each and len(one) != len(other):
        return False
    return values_pass(lambda v: isinstance(v, list) and all(map(check, v)), d, None, ABSENT)


def of_ids(d: Difference) -> bool:
    """One id, or several that end a text; none is a model without."""
    if d.path[0] not in SPECIAL_IDS:
        return False
    several = lambda v: v if isinstance(v, list) and d.path == ("eos_token_id",) else [v]
    is_any = lambda v: (
        is_id(v) or (v == -1 and not isinstance(v, bool))
    )  # -1 is none: the first Llama's padding
    return values_pass(lambda v: all(map(is_any, several(v))), d, None, ABSENT)


def of_known_ids(d: Difference) -> bool:
    """Ids at which the tokenizer ends a text: of several, one at least is a token's."""
    ids = d.after if isinstance(d.after, list) else [d.after]
    return of_ids(d) and (d.after in (None, ABSENT, -1, []) or any(token < TOKENS for token in ids))


def of_carried(d: Difference) -> bool:
    """A key of generation_config.json that is not ours."""
    return d.path[0] not in SPECIAL_IDS and (d.after is ABSENT or is_json(d.after))


def of_rope_kind(d: Difference) -> bool:
    kinds = ("default", "linear", "llama3", "yarn")
    return d.path[-1] in ("rope_type", "type") and values_pass(lambda v: v in kinds, d, ABSENT)


def of_rope_whole(d: Difference) -> bool:
    """No object of frequencies: the rule is the architecture's own."""
    return d.path[-1] in ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention") and (
        d.after is None or d.after is ABSENT or d.after == {}
    )


def of_patterns(d: Difference) -> bool:
    """A module's own alpha, or none of any module. A rank of its own is that of its tensors."""
    if d.path == ("alpha_pattern",):
        return d.after is None or d.after is ABSENT or d.after == {}
    return d.path[0] == "alpha_pattern" and values_pass(is_number, d, ABSENT)


# ---- tensors


def of_numbers(d: Difference) -> bool:
    """Finite ones, the same shape, in the same dtype or another one of floats."""
    one, other = d.before, d.after
    if not isinstance(one, Numbers) or not isinstance(other, Numbers) or one.shape != other.shape:
        return False
    if not other.finite:
        return False
    return one.dtype == other.dtype or (one.dtype in FLOATS and other.dtype in FLOATS)


def of_same_dtype(d: Difference) -> bool:
    return of_numbers(d) and d.before.dtype == d.after.dtype


def of_logprobs(d: Difference) -> bool:
    rounded = 1e-3  # that of a sure token may come out above 0
    return d.path == ("logprobs",) and of_same_dtype(d) and d.after.within(-sys.float_info.max, rounded)


def of_state(d: Difference) -> bool:
    """bitsandbytes' state of a packed weight is JSON in a tensor of bytes: an offset is a number in it."""
    if "quant_state" not in str(d.path[0]) or not of_same_dtype(d):
        return False
    try:
        one, other = json.loads(d.before.raw), json.loads(d.after.raw)
    except ValueError:
        return False
    changed = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    return changed <= {"nested_offset"} and is_number(other.get("nested_offset"), -sys.float_info.max)


def of_weights(d: Difference) -> bool:
    return "quant_state" not in str(d.path[0]) and (of_same_dtype(d) if _is_packed(d) else of_numbers(d))


def _is_packed(d: Difference) -> bool:
    return isinstance(d.before, Numbers) and d.before.dtype not in FLOATS


def of_step(d: Difference) -> bool:
    return d.path == ("metadata", "values", "step") and values_pass(
        lambda step: is_whole(step) and step <= STEPS, d
    )


def of_training(d: Difference) -> bool:
    """AdamW's state of a parameter: the number of its steps, a mean, and a mean of squares."""
    least = {"step": 1, "exp_avg_sq": 0}.get(str(d.path[0]).rpartition("/")[2], -sys.float_info.max)
    return of_same_dtype(d) and d.after.within(least, sys.float_info.max)


# ---- GGUF

GGUF = {  # no size of a tensor; how a number is packed, and what it may be
    "llama.rope.freq_base": ("<f", is_base),
    "llama.attention.layer_norm_rms_epsilon": ("<f", is_number),
    "llama.context_length": ("<I", is_size),
    **dict.fromkeys(
        (f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos")), ("<I", lambda i: i < TOKENS)
    ),
    **dict.fromkeys(
        ("tokenizer.chat_template", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"), ("", is_text)
    ),
    "tokenizer.ggml.token_type": ("", lambda types: True),
}


def of_field(d: Difference) -> bool:
    """A value of the type that it had, which stands first; a tokenizer may have no token that begins or ends a text."""
    if d.path[0] == "fields" and len(d.path) == 2:
        key = str(d.path[1])
        if key.endswith("_token_id"):
            return d.after is ABSENT
        return (
            d.before is ABSENT and key not in GGUF and not key.startswith(("llama.", "general."))
        )  # nobody's
    if len(d.path) != 3 or d.path[0] != "fields" or d.path[1] not in GGUF or d.path[2] == 0:
        return False
    packed, check = GGUF[d.path[1]]
    value = struct.unpack(packed, d.after)[0] if packed and len(d.after) == 4 else d.after
    return check(value)


# ---- tokenizers

STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
TOKEN_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


def of_vocabulary(d: Difference) -> bool:
    return d.path[:2] == ("model", "vocab") and len(d.path) == 3 and values_pass(is_id, d, ABSENT)


def of_merges(d: Difference) -> bool:
    return d.path[:2] == ("model", "merges") and (d.path == ("model", "merges") or values_pass(is_text, d))


def of_added_tokens(d: Difference) -> bool:
    if d.path == ("added_tokens",):
        return isinstance(d.after, list)
    checks = {"content": is_text, "id": is_id, **dict.fromkeys(TOKEN_FLAGS, is_flag)}
    return (
        d.path[0] == "added_tokens"
        and len(d.path) == 3
        and d.path[2] in checks
        and values_pass(checks[d.path[2]], d)
    )


def of_stages(d: Difference) -> bool:
    """A stage, or a part of one, which keeps its type."""
    if d.path[0] not in STAGES or not is_json(d.after if d.after is not ABSENT else None):
        return False
    return len(d.path) == 1 or any(v in (None, ABSENT) for v in d[1:]) or type(d.before) is type(d.after)


def of_special_tokens(d: Difference) -> bool:
    """Written as a text, or as an object with the text as `content`; a token where it is one that Burnish uses."""
    name, used = str(d.path[0]), ("bos_token", "eos_token", "pad_token")
    of = lambda v: v.get("content") if isinstance(v, dict) else v
    none = () if name == "eos_token" else ("",)
    check = lambda v: is_text(of(v)) and (name not in used or of(v) in none or of(v) in vocabulary())
    return name.endswith("_token") and values_pass(check, d, None, ABSENT)


# ---- rows


def of_rows(d: Difference) -> bool:
    return d.path == ("number of rows",)


def of_cells(kind: str) -> Callable[[Difference], bool]:
    return lambda d: len(d.path) == 2 and d.path[0] == "cell" and is_cell(kind, d.path[1], d.after, ABSENT)


def of_any_json(d: Difference) -> bool:
    return d.after is ABSENT or is_json(d.after)


LESSONS = {"tokens": TOKENS - 1, "ids": TOKENS - 1, "trained": 1, "lengths": MOST}  # the largest


def of_ids_of_lessons(d: Difference) -> bool:
    return d.path[0] in LESSONS and of_same_dtype(d) and d.after.within(0, LESSONS[d.path[0]])


AFFIXES = ("end_of_word_suffix", "continuing_subword_prefix")
TOKENIZER, SETTINGS, MOE = (
    "tokenizer/tokenizer",
    "tokenizer/tokenizer_config",
    ("config/qwen2_moe", "config/qwen3_moe"),
)


# ---- what a whole file says


def has_experts_enough(config: Any) -> bool:
    """No token has more experts than there are."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    most = next((config[name] for name in names if name in config), MOST)
    return config.get("num_experts_per_tok", 1) <= most


def has_distinct_ids(tokenizer: Any) -> bool:
    """No two tokens have one id, and no token has two."""
    named = [*tokenizer["model"]["vocab"].items()]
    named += [(token["content"], token["id"]) for token in tokenizer.get("added_tokens") or []]
    found = set(named)
    return len(found) == len({name for name, _ in found}) == len({token for _, token in found})


CONSISTENT = {"config": has_experts_enough, "tokenizer/tokenizer": has_distinct_ids}

OF_SCORE_BIAS = keys(("score_bias",), lambda value: is_number(value, -sys.float_info.max), ABSENT)
CLASSES = (
    Class("number", CONFIGS, keys(SCALES, is_number, ABSENT), "another finite scale is another model"),
    Class("rope", CONFIGS, keys(ROPE_BASES, is_base, ABSENT), "other frequencies; absent is the rule's"),
    Class("rope", CONFIGS, keys(ROPE_FACTORS, is_in_rope), "other frequencies"),
    Class("rope", CONFIGS, keys(ROPE_FREE, lambda v: v == 0 or is_in_rope(v), None, ABSENT), "another scale"),
    Class("rope type", CONFIGS, of_rope_kind, "another rule for the frequencies, with its numbers"),
    Class("no rope", CONFIGS, of_rope_whole, "without an object the architecture's own rule holds"),
    Class("count", CONFIGS, keys(COUNTS, is_whole, ABSENT), "where the kind of layer changes"),
    Class("count", CONFIGS, keys(NUMBERS_OF, is_size, ABSENT), "no tensor's size: how many experts, how far"),
    Class("window", CONFIGS, keys(("sliding_window",), is_size, None, ABSENT), "how far a token sees"),
    Class("no dense layer", MOE, keys(("intermediate_size",), is_size, ABSENT), "no tensor has it"),
    Class("switch", CONFIGS, keys(SWITCHES, is_flag, ABSENT), "true and false are two models, both built"),
    Class("layers", CONFIGS, of_layers, "which layers slide, rotate or have experts"),
    Class("ids", CONFIGS, of_ids, "another end or padding, perhaps one that the model has no row for"),
    Class("tied", CONFIGS, keys(("tie_word_embeddings",), is_flag, ABSENT), "the file has a head, or none"),
    Class("ids", "generation", of_ids, "another end or padding"),
    Class("carried", "generation", of_carried, "not ours to read: written again as it stands"),
    Class("bias", ("reward/config", "adapter/on-adapter"), OF_SCORE_BIAS, "a constant"),
    Class("weights", "weights", of_weights, "other finite numbers are another model"),
    Class("weights", "reward/weights", of_weights, "other numbers are another model"),
    Class("weights", "4bit/weights", of_weights, "other codes, scales and tables are other weights"),
    Class("packing", "4bit/weights", of_state, "the mean of the scales is a number in the state"),
    Class("weights", "adapter", of_weights, "other numbers are another adapter"),
    Class("alpha", "adapter", keys(("lora_alpha",), is_number, ABSENT), "another scale"),
    Class("alpha", "adapter", of_patterns, "a module's own scale"),
    Class("rsLoRA", "adapter", keys(("use_rslora",), is_flag, None, ABSENT), "another rule for the scale"),
    Class("field", "gguf", of_field, "a value that no tensor's size depends on, or a text"),
    Class("weights", "gguf", of_same_dtype, "other numbers are another model"),
    Class("vocabulary", TOKENIZER, of_vocabulary, "a token more, less, or on another id"),
    Class("merges", TOKENIZER, of_merges, "other merges of tokens that exist"),
    Class("added tokens", TOKENIZER, of_added_tokens, "an added token spelled or marked otherwise"),
    Class("affixes", TOKENIZER, keys(AFFIXES, is_text, None, ABSENT), "words are made of other pieces"),
    Class("stages", TOKENIZER, of_stages, "another pipeline, of stages that `tokenizers` reads"),
    Class("special tokens", "tokenizer", of_special_tokens, "another token begins, ends or pads"),
    Class("begins", SETTINGS, keys(("add_bos_token",), is_flag, None, ABSENT), "texts begin with bos or not"),
    Class("template", SETTINGS, keys(("chat_template",), is_text), "another program"),
    Class("ids", "tokenizer/generation_config", of_known_ids, "other ids end a generation"),
    Class("program", "template", lambda d: values_pass(is_text, d), "another program writes another text"),
    Class("variables", "flags/kwargs", of_any_json, "a variable is whatever JSON can say"),
    Class("tools", "flags/tools", of_any_json, "tools are rendered as they stand"),
    Class("rows", "rows", of_rows, "a row less or more is an example less or more, and counted"),
    *(Class("cells", f"rows/{kind}", of_cells(kind), "another text is another example") for kind in READ),
    Class("state", "run/checkpoint", of_training, "another state: the file has no checksum"),
    Class("step", "run/checkpoint", of_step, "the run goes on from the step that the file names"),
    Class("ids", "lessons", of_ids_of_lessons, "other ids, of the tokenizer's"),
    Class("log-probabilities", "lessons", of_logprobs, "another teacher, as far as it can be one"),
)
