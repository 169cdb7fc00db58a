"""Checkpoints for resuming a stopped run: a safetensors file of the state that training changes, replaced atomically.

The file holds the trained parameters and the optimizer states as "part/name"; a part is a model or an optimizer. The
metadata holds the step and a few numbers as JSON, the digests of the files that the run has read (inputs.py), and those
of the tensors and of the metadata itself (digests.py). Nothing else needs saving: data order and sampling noise are
functions of the seed and the step, and frozen weights come from the model folder that the run started from.

With several processes each writes a file with its rows of every tensor. Rank 0 writes its file last and lists the other
files in it. Any number of processes can read the checkpoint; each reads only the rows that it needs.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...model.errors import InputError, shown
from ...model.files.replacing import replacing
from ...model.files.text_files import check_regular, parse_json
from .digests import check_metadata, check_tensors, with_digests
from .optimizer import states_of
from .processes import gathered, rank, shared_as, world
from .processes import is_shared as _is_shared
from .processes import own as _own
from .processes import rows_of as _rows

Part = nn.Module | torch.optim.Optimizer
COUNT = "tensors"  # the value that holds the number of tensors, so that a missing tensor is noticed
COUNTS = ("step", "draws", "varied", "best_step", "unimproved", COUNT)  # values that are whole numbers
SIGNED = ("lowest", "highest", "best")  # values that may be negative: rewards, and the best evaluation
OPTIMIZERS = {
    "exp_avg": "adamw",
    "momentum_buffer": "muon",
    "exp_avg_codes": "adamw8bit",
}  # by a state of theirs
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES[torch.uint8] = "U8"


def write_checkpoint(
    file: Path, parts: Mapping[str, Part], values: Mapping[str, Any], inputs: Mapping[str, Any] | None = None
) -> None:
    """Write the state of `parts` and the JSON of `values` to `file`. If this fails, the earlier file is unchanged.

    inputs: the digests of the files that the run has read (inputs.py); only rank 0 needs them.
    """
    # 1. collect this process's rows of the sharded tensors; rank 0 also writes the other tensors
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}  # the first row of this process in each sharded tensor
    for part, module in parts.items():
        for name, tensor in _tensors(module).items():
            if _is_shared(tensor):
                starts[f"{part}/{name}"] = _rows(tensor).start
            if _is_shared(tensor) or rank() == 0:
                tensors[f"{part}/{name}"] = _own(tensor).detach().cpu().contiguous()

    # 2. list the other files and the first rows in the metadata
    others = _names(file, values.get("step"), world())
    metadata = {"values": json.dumps({**values, COUNT: sum(len(_tensors(part)) for part in parts.values())})}
    metadata["inputs"] = json.dumps(inputs or {})
    if others:
        metadata |= {"others": json.dumps(others), "starts": json.dumps(starts)}
    metadata = with_digests(tensors, metadata)

    # 3. write the other processes' files first: rank 0 replaces the earlier checkpoint when all are written
    final = file.with_name(others[rank() - 1]) if rank() else file
    with replacing(final, sync=True, note=", the earlier checkpoint is kept") as beside:
        save_file(tensors, beside, metadata=metadata)
        if rank() == 0:
            _wait_for_all()
    if rank():
        _wait_for_all()
    else:
        _remove_stale(file, others)


def _wait_for_all() -> None:
    """Wait until every process has reached this call."""
    gathered({"here": torch.ones(1)})


def _remove_stale(file: Path, others: Sequence[str]) -> None:
    """Remove the files of other processes of earlier checkpoints, and of one that was never completed."""
    for stale in file.parent.glob(f"{file.stem}-*-of-*{file.suffix}"):
        if stale.name not in others:
            stale.unlink()


def sweep_checkpoint(file: Path) -> None:
    """Remove the files beside a checkpoint that are not part of it. They are of a checkpoint that was cut off."""
    with ExitStack() as stack:
        metadata = _open(file, stack).metadata() or {}
        others = _others(file, metadata, _values(file, metadata)["step"])
    _remove_stale(file, others)


def read_inputs(file: Path) -> dict[str, list[list[str]]]:
    """Return the digests that a checkpoint holds of the files that its run has read: by flag, names and SHA-256.

    An older checkpoint has none. Raises InputError if the checkpoint is broken.
    """
    with ExitStack() as stack:
        metadata = _open(file, stack).metadata() or {}
    where = f"{file}: metadata: inputs"
    inputs = parse_json(metadata.get("inputs", "{}"), where)
    pairs = [pair for found in inputs.values() for pair in found] if _is_table(inputs) else [None]
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair) for pair in pairs
    ):
        raise InputError(f"{where}: expected lists of a name and a digest, by flag, got {shown(inputs)}")
    return inputs


def _is_table(inputs: Any) -> bool:
    return isinstance(inputs, dict) and all(isinstance(found, list) for found in inputs.values())


def read_checkpoint(file: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Load the state in `file` into `parts`, in place. Returns the saved numbers by name, `step` among them.

    Raises InputError naming the file and a tensor that does not fit, or that holds numbers that are not finite. All
    names, dtypes and shapes are compared before any state is changed.
    """
    with ExitStack() as stack:
        first = _open(file, stack)
        metadata = first.metadata() or {}
        values = _values(file, metadata)
        files = {file: first}
        for name in _others(file, metadata, values["step"]):
            files[file.with_name(name)] = _open(file.with_name(name), stack)
        stored = _stored(files)
        if len(stored) != values.pop(COUNT, len(stored)):
            raise InputError(f"{file}: not a whole checkpoint: tensors are missing")

        # check that all tensors fit, and are those that were written, before any state is changed
        wanted = {part: _wanted(module) for part, module in parts.items()}
        _check_fit(file, wanted, stored)
        for i, (path, opened) in enumerate(files.items()):
            if i % world() == rank():  # each file is read whole by one process
                check_tensors(path, opened)
        _wait_for_all()
        for part, module in parts.items():
            state = {name: stored[f"{part}/{name}"] for name in wanted[part] if f"{part}/{name}" in stored}
            if isinstance(module, nn.Module):
                with torch.no_grad():
                    for name, parameter in _tensors(module).items():
                        _own(parameter).copy_(state[name].read(_rows(parameter)))
            else:
                _restore(module, state)
    return values


def _open(file: Path, stack: ExitStack) -> Any:
    check_regular(file)
    try:
        opened = stack.enter_context(safe_open(file, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a whole checkpoint: {error}") from error
    check_metadata(file, opened.metadata() or {})
    return opened


def _values(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the step and the other saved numbers, by name. Raises InputError if a number is invalid.

    Only the values named in SIGNED may be negative.
    """
    where = f"{file}: metadata: values"
    values = parse_json(metadata.get("values", ""), where)
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, got {shown(values)}")
    for name, value in {"step": None, **values}.items():
        least = -sys.float_info.max if name in SIGNED else 0
        largest = 2**63 - 1 if isinstance(value, int) else sys.float_info.max
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= largest:
            raise InputError(f"{where}: {shown(name)}: expected a finite number, got {shown(value)}")
        if name in COUNTS and not isinstance(value, int):
            raise InputError(f"{where}: {name}: expected a whole number, got {shown(value)}")
    return values


def _others(file: Path, metadata: Mapping[str, str], step: int) -> list[str]:
    """Return the names of the other processes' files. Raises InputError if the names do not have the expected form."""
    where = f"{file}: metadata: others"
    others = parse_json(metadata.get("others", "[]"), where)
    count = len(others) + 1 if isinstance(others, list) else 1
    expected = _names(file, step, count)
    if others != expected:
        raise InputError(f"{where}: expected names like {_names(file, step, 2)[0]}, got {shown(others)}")
    return expected


def _names(file: Path, step: Any, processes: int) -> list[str]:
    return [f"{file.stem}-{step}-{i}-of-{processes}{file.suffix}" for i in range(1, processes)]


class Wanted(NamedTuple):
    """The expected shape and dtype of a stored tensor: a parameter, or an optimizer state of a parameter."""

    shape: list[int]
    dtype: str  # as a file's header spells it
    at_least: float = -math.inf


def _wanted(part: Part) -> dict[str, Wanted]:
    """Return the expected tensors of a model or an optimizer, by name."""
    if isinstance(part, nn.Module):
        return {name: Wanted([*p.shape], DTYPES[p.dtype]) for name, p in _tensors(part).items()}
    rules = [(group["rule"], parameter) for group in part.param_groups for parameter in group["params"]]
    return {
        f"{i}/{name}": Wanted(state.shape, DTYPES[state.dtype], state.at_least)
        for i, (rule, parameter) in enumerate(rules)
        for name, state in states_of(rule, parameter).items()
    }


def _check_fit(
    file: Path, wanted: Mapping[str, Mapping[str, Wanted]], stored: Mapping[str, "Stored"]
) -> None:
    """Raise InputError naming a tensor that is missing, unexpected, or of another shape or dtype.

    The optimizer's states of a parameter may be missing together, for a parameter that had no gradient yet.
    """
    places = {f"{part}/{name}": place for part, names in wanted.items() for name, place in names.items()}
    begun = {name.rpartition("/")[0] for name in stored}
    reason = _reason(places, stored)
    for name in places:
        is_state = name.partition("/")[2].partition("/")[0].isdecimal()
        if name not in stored and (not is_state or name.rpartition("/")[0] in begun):
            raise InputError(f"{file}: {shown(name)}: missing; {reason}")

    for name, found in stored.items():
        if name not in places:
            raise InputError(f"{file}: {shown(name)}: unexpected; {reason}")
        place = places[name]
        if [found.dtype, found.shape] != [place.dtype, place.shape]:
            raise InputError(
                f"{file}: {shown(name)}: expected {place.dtype} of shape {place.shape}, got {found.dtype} of shape "
                f"{found.shape}; {reason}"
            )
        found.at_least = place.at_least


def _reason(wanted: Iterable[str], stored: Iterable[str]) -> str:
    """Return why the names of a checkpoint's tensors differ from the wanted ones: perhaps by another optimizer."""
    order = [*OPTIMIZERS.values()]  # the later ones have adamw's states, too
    kinds = [[OPTIMIZERS.get(name.rpartition("/")[2], "") for name in names] for names in (wanted, stored)]
    found = [max(map(order.index, filter(None, names)), default=None) for names in kinds]
    if None in found or found[0] == found[1]:
        return "the checkpoint does not fit the tensors that this run trains"
    expected, got = (order[place] for place in found if place is not None)
    return f"the checkpoint was written with --optimizer {got}, not {expected}: give --optimizer {got}"


def _tensors(part: Part) -> dict[str, Tensor]:
    if isinstance(part, nn.Module):
        return {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}
    return {
        f"{index}/{name}": tensor
        for index, state in part.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def _restore(optimizer: torch.optim.Optimizer, stored: Mapping[str, "Stored"]) -> None:
    """Set the states of an optimizer. `load_state_dict` would cast the codes of 8-bit moments to fp32."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.state.clear()
    for key, found in stored.items():
        index, _, name = key.partition("/")
        parameter = parameters[int(index)]
        tensor = found.read(_rows(parameter)).to(_own(parameter).device)
        optimizer.state[parameter][name] = shared_as(parameter, tensor) if found.shape else tensor


@dataclass
class Stored:
    """A tensor in one or several files, each of which holds some of the tensor's rows."""

    where: str  # its file and name
    dtype: str  # as the file's header spells it
    shape: list[int]
    pieces: list[tuple[int, Any]] = field(default_factory=list)  # (first row, the file's slice) of each file
    at_least: float = -math.inf

    def read(self, rows: range) -> Tensor:
        """Read a range of rows of the tensor. A tensor without dimensions is read whole.

        Raises InputError if the file is broken, or if numbers are not finite or below `at_least`.
        """
        try:
            found = self._read(rows)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.where}: not a whole checkpoint: {error}") from error
        if not found.isfinite().all():
            raise InputError(
                f"{self.where}: expected finite numbers, got NaN or infinity: resume from another run"
            )
        if (found < self.at_least).any():
            raise InputError(
                f"{self.where}: expected numbers of at least {self.at_least:g}, got {found.min():g}"
            )
        return found

    def _read(self, rows: range) -> Tensor:
        if not self.shape:
            return self.pieces[0][1][...]
        found = []
        for start, piece in self.pieces:
            first, end = max(rows.start, start), min(rows.stop, start + piece.get_shape()[0])
            if first < end:
                found.append(piece[first - start : end - start])
        return torch.cat(found) if found else self.pieces[0][1][:0]


def _stored(files: Mapping[Path, Any]) -> dict[str, Stored]:
    """Return the tensors in all files, by name. Raises InputError unless each row is stored exactly once."""
    stored: dict[str, Stored] = {}
    for path, file in files.items():
        starts = _starts(path, file)
        for name in file.keys():  # noqa: SIM118 (not a dict)
            piece = file.get_slice(name)
            dtype, shape, where = str(piece.get_dtype()), piece.get_shape(), f"{path}: {shown(name)}"

            # its rows must continue where those of the file before end
            found = stored.setdefault(name, Stored(where, dtype, [0, *shape[1:]] if shape else []))
            rows = found.shape[0] if shape and found.shape else 0
            if found.dtype != dtype or found.shape[1:] != shape[1:] or (found.pieces and not found.shape):
                raise InputError(
                    f"{where}: expected the shape and dtype of its rows in the other files, got others"
                )
            if starts.get(name, 0) != rows:
                raise InputError(
                    f"{where}: expected its first row to be row {rows}, got {shown(starts.get(name, 0))}"
                )
            if shape:
                found.shape[0] += shape[0]
            found.pieces.append((rows, piece))
    return stored


def _starts(path: Path, file: Any) -> dict[str, Any]:
    where = f"{path}: metadata: starts"
    starts = parse_json((file.metadata() or {}).get("starts", "{}"), where)
    if not isinstance(starts, dict):
        raise InputError(f"{where}: expected an object, got {shown(starts)}")
    return starts
