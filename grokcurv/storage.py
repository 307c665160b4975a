"""Files that survive being killed at any instant: written whole or not at all, checked when they are read.

Every file is written under a temporary name, synced and renamed, and carries a schema version. States are safetensors
with a checksum, tables are Parquet, all else is JSON: nothing is ever unpickled. One process at a time holds a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA = 1
"""Version of every file."""


class RunError(RuntimeError):
    """A run folder that cannot be read, written or continued; the message says which and what to do."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file, or leave the one that was there as it was.

    Raises:
        RunError: the disk is full, or refuses for another reason.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        reason = f"{error.strerror} ({len(data)} bytes to write); what was there is intact"
        raise RunError(f"cannot write {path}: {reason}") from error


def write_json(path: Path, name: str, value: Any) -> None:
    """Write a file that says ``value`` of ``name``; :func:`read_json` reads it."""
    write_atomically(path, json.dumps({"schema": SCHEMA, name: value}, indent=1).encode())


def read_json(path: Path, name: str, kind: type) -> Any:
    """What the file says of ``name``; RunError unless it is whole, of this schema, and a ``kind``."""
    try:
        content = json.loads(path.read_bytes())
        _check_schema(content["schema"])
        value = content[name]
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could be neither printed nor written
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(value, kind):
        raise RunError(f"{path} is damaged: {name} must be a {kind.__name__}; got {value!r:.100}")
    return value


def pack(state: Mapping[str, Any]) -> bytes:
    """A nested state as a safetensors file: tensors by their path in it, everything else as JSON metadata.

    Raises:
        TypeError: a value that is not a tensor, number, string, None, list, tuple or dict of these.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_flatten(state, "", tensors))
    return save(tensors, {"schema": str(SCHEMA), "state": tree, "crc32": str(_checksum(tree, tensors))})


def unpack(data: bytes) -> dict[str, Any]:
    """The state that :func:`pack` packed; ValueError if it was not that, or is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])["__metadata__"]
        schema, tree, crc = int(header["schema"]), header["state"], int(header["crc32"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"not a packed state ({error})") from error
    _check_schema(schema)
    if _checksum(tree, tensors) != crc:
        raise ValueError("its checksum does not match its contents")
    try:
        state = _unflatten(json.loads(tree), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a packed state ({error!r})") from error
    if not isinstance(state, dict):
        raise ValueError(f"not a packed state (of {type(state).__name__})")
    return state


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors go into ``tensors`` and leave their path behind."""
    if isinstance(value, Tensor):
        while path in tensors:  # a key with a slash in it
            path += "'"
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {"dict": [[k, _flatten(v, f"{path}/{k}" if path else str(k), tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"state: {path} is a {type(value).__name__}; tensors and plain values can be saved")


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unflatten(item, tensors) for item in content)
    return {key: _unflatten(item, tensors) for key, item in content}


def _checksum(tree: str, tensors: Mapping[str, Tensor]) -> int:
    crc = zlib.crc32(tree.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _check_schema(schema: int) -> None:
    if schema != SCHEMA:
        raise ValueError(f"its schema version is {schema}, this grokcurv reads {SCHEMA}")


def read_state(path: Path) -> dict[str, Any]:
    try:
        return unpack(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is missing or damaged: {error}") from error


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a table, with the schema version; :func:`read_table` reads it."""
    import pyarrow as pa

    table = pa.Table.from_pandas(frame, preserve_index=False)
    known = table.schema.metadata or {}
    write_parquet(path, table.replace_schema_metadata({**known, b"grokcurv_schema": str(SCHEMA).encode()}))


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table of Arrow's as it is, with checksums."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    write_atomically(path, buffer.getvalue())


def read_table(path: Path) -> pd.DataFrame:
    """A table; an empty one where none has been written yet."""
    import pandas as pd
    import pyarrow as pa

    table = read_parquet(path)
    try:
        frame: pd.DataFrame = pd.DataFrame() if table is None else table.to_pandas(ignore_metadata=True)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise RunError(f"{path} has a column that pandas cannot hold: {error}") from error
    return frame


def read_parquet(path: Path) -> pa.Table | None:
    """A table of a run folder as Arrow has it, in one thread; None where none has been written yet.

    Raises:
        RunError: it is damaged, of another schema version, or its ``step`` is not a whole number in every row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            table = pq.ParquetFile(file, page_checksum_verification=True).read(use_threads=False)
        table.validate(full=True)
        _check_schema(int((table.schema.metadata or {})[b"grokcurv_schema"]))
        names = table.column_names
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have one name, of {', '.join(names)}")
        if table.num_rows and ("step" not in names or not pa.types.is_integer(table["step"].type)):
            raise ValueError("it has no column step of whole numbers")
        if table.num_rows and table["step"].null_count:
            raise ValueError("step is missing in some rows")
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return table


@contextlib.contextmanager
def hold(folder: Path, doing: str) -> Iterator[None]:
    """Be the one process that has the folder, which is made if missing.

    Raises:
        RunError: another process has it, which "is being ``doing``" by that one; or it cannot be written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(f"cannot write into {folder}: {error.strerror}") from error
    try:
        for patience in (0.05, 0.2, None):  # one that asks for the holder has the lock for an instant
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience is None:
                    raise RunError(f"{folder} is being {doing} by process {holder(folder) or 'unknown'}") from None
                time.sleep(patience)
        with contextlib.suppress(OSError):  # on a full disk it stays unknown who has it
            os.truncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        os.close(lock)


def holder(path: Path) -> int | None:
    """The process that is writing into the folder, or None; 0 where it cannot be told which."""
    with contextlib.suppress(OSError), (path / ".lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            said = lock.read()
            return int(said) if said.isdigit() else 0
    return None
