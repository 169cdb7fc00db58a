"""Files that a run has left in its folder."""

import json

from safetensors.torch import load_file


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder):
    return [line["loss"] for line in metrics_of(folder)]


def dtypes_in(folder):
    (file,) = folder.glob("*model.safetensors")
    return {tensor.dtype for tensor in load_file(file).values()}
