"""Checkpoints of any program: the weights that a file holds, and the step they are of.

Nothing is unpickled that could run code: ``.pt`` files are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grokcurv.storage import read_file, unpack

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Of files that are taken for checkpoints."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of which a checkpoint of Hugging Face's, a folder, has one."""

NAMED = 5
"""So many keys are named where more are amiss."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is not one of this model; the message names it and says why."""


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder by their steps, ascending; of a run's folder, its snapshots.

    They are files with one of :data:`SUFFIXES` and folders with one of :data:`WEIGHTS`. Those without a step in their
    names, such as ``last.ckpt``, are left out.

    Raises:
        ValueError: no such folder, none in it, or two of one step.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoints: {folder} is no folder")
    folder = folder / "snapshots" if (folder / "snapshots").is_dir() else folder
    paths = [path for path in folder.iterdir() if path.suffix in SUFFIXES or _weights(path)]
    numbered = [(step, path) for path in paths if (step := step_of(path)) is not None]
    if not numbered:
        raise ValueError(
            f"checkpoints: {folder} holds none with a step in its name: files that end with {', '.join(SUFFIXES)}, or "
            f"folders with a {WEIGHTS[0]}"
        )
    return sorted(numbered)


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name: after the word ``step``, if it is there, or its last whole number."""
    name = path.name.removesuffix(path.suffix) if path.suffix in SUFFIXES else path.name
    said = re.findall(r"step\D?(\d+)", name) or re.findall(r"(?<![\d.])\d+(?!\.?\d)", name)
    return int(said[-1]) if said else None


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """What a checkpoint holds, tensors on the CPU.

    Raises:
        CheckpointError: it is missing, cut, damaged, of no kind that is known, or holds what only code could make.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        # Of any kind: what a damaged pickle raises depends on where it is damaged.
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, no state dict")
    return found


def weights_of(model: nn.Module, found: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The model's state dict in what a checkpoint holds: at its top, or in a dict there, under a common prefix.

    So the model may be all of what was saved, or a part of it (``module.``, ``_orig_mod.``, an attribute of a
    LightningModule). Of tied weights one is enough.

    Raises:
        CheckpointError: keys that are missing, keys beyond the model's, or tensors of other shapes, by name.
    """
    wanted = model.state_dict(keep_vars=True)
    dicts = [found, *(value for value in found.values() if isinstance(value, Mapping))]
    count, prefix, best = max(((*_prefix(d, wanted), d) for d in dicts), key=lambda one: one[0])
    if not count:
        raise CheckpointError(f"{name} has none of the model's keys: {_listed(wanted)}; it has {_listed(found)}")
    own = {key.removeprefix(prefix): value for key, value in best.items() if str(key).startswith(prefix)}
    there = {id(tensor) for key, tensor in wanted.items() if key in own}
    amiss = {
        "missing": [key for key, tensor in wanted.items() if key not in own and id(tensor) not in there],
        "not the model's": [key for key in own if key not in wanted],
        "of another shape": [
            f"{key} {tuple(value.shape) if isinstance(value, Tensor) else type(value)} for {tuple(tensor.shape)}"
            for key, value in own.items()
            if isinstance(tensor := wanted.get(key), Tensor)
            and (not isinstance(value, Tensor) or value.shape != tensor.shape)
        ],
    }
    if said := "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in amiss.items() if keys):
        raise CheckpointError(f"{name} is not of this model: {said}")
    return own


def load_weights(model: nn.Module, own: Mapping[str, Any]) -> None:
    """Put what :func:`weights_of` found into the model, in place."""
    model.load_state_dict(own, strict=False)  # without the other names of tied weights


def _prefix(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[int, str]:
    """How many of the wanted keys there are behind the prefix that most have, and this prefix."""
    prefixes = Counter[str]()
    for key in map(str, found):
        parts = key.split(".")
        for place in range(len(parts)):
            if ".".join(parts[place:]) in wanted:
                prefixes["".join(f"{part}." for part in parts[:place])] += 1
    ((prefix, count),) = prefixes.most_common(1) or [("", 0)]
    return count, prefix


def _weights(path: Path) -> Path | None:
    return next((file for name in WEIGHTS if (file := path / name).is_file()), None) if path.is_dir() else None


def _read_folder(path: Path) -> Mapping[str, Any]:
    """The weights in the folder of a checkpoint, from as many files as they are in."""
    file = _weights(path)
    if file is None:
        raise ValueError(f"there is none of {', '.join(WEIGHTS)} in it")
    if file.suffix != ".json":
        return read_checkpoint(file)
    shards = sorted(set(json.loads(file.read_text())["weight_map"].values()))
    return {key: value for shard in shards for key, value in read_checkpoint(file.with_name(Path(shard).name)).items()}


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    """The tensors of a .safetensors file, of this package or of another."""
    from safetensors.torch import load

    data = read_file(path)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    # Those of this package carry a checksum.
    return unpack(data) if "crc32" in header.get("__metadata__", {}) else load(data)


def _listed(keys: Any) -> str:
    """The first few keys in words, and how many more there are."""
    keys = list(map(str, keys))
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more
