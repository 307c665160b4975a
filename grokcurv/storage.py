"""Files that survive being killed at any instant: written whole or not at all, checked when they are read.

Every file is written under a temporary name, synced and renamed, and carries a schema version. States are safetensors
with a checksum, tables are Parquet, all else is JSON: nothing is ever unpickled. One process at a time holds a folder.

A folder may come from anyone. Where a file or a folder of ours should be, links are refused, which could lead out of
it, and so are pipes and devices, which never end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import secrets
import stat
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA = 1
"""Version of every file."""


class RunError(RuntimeError):
    """A run folder that cannot be read, written or continued; the message says which and what to do."""


@contextlib.contextmanager
def open_file(path: Path, flags: int = os.O_RDONLY) -> Iterator[BinaryIO]:
    """Open a regular file, or make it, as ``flags`` say; OSError for a link, and for what is no file."""
    _check_kind(path, stat.S_ISREG)
    # Whatever takes its place meanwhile is not followed, and without O_NONBLOCK a pipe would wait for its other end.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "rb" if flags == os.O_RDONLY else "wb") as file:
        yield file


def read_file(path: Path) -> bytes:
    """What a regular file holds; OSError as for :func:`open_file`."""
    with open_file(path) as file:
        return file.read()


def make_folder(path: Path, *, parents: bool = False) -> Path:
    """The path of a folder, which is made if it is missing; RunError where that cannot be.

    With ``parents`` it is one that the user names, and may be a link; without, one of ours in such a folder.
    """
    try:
        path.mkdir(parents=parents, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write into {path}: {error.strerror}") from error
    return path if parents else check_folder(path)


def check_folder(path: Path) -> Path:
    """The path; RunError if anything but a folder has that name, such as a link to one."""
    try:
        _check_kind(path, stat.S_ISDIR)
    except OSError as error:
        raise RunError(f"{path} cannot be used: {error.strerror}") from error
    return path


def _check_kind(path: Path, wanted: Callable[[int], bool]) -> None:
    """OSError if what has this name, if anything, is of another kind."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not wanted(mode):
            kind = "a file" if wanted is stat.S_ISREG else "a folder"
            link = "a link, and links are not followed" if stat.S_ISLNK(mode) else f"not {kind}"
            raise OSError(errno.EINVAL, f"it must be {kind} and is {link}", str(path))


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a whole file, or leave the one that was there as it was.

    Unless it need not be ``durable``, it is on the disk then, whatever happens to the machine.

    Raises:
        RunError: the disk is full, or refuses for another reason; or what is there is no file.
    """
    # Under a name that nobody could know, which is made and not opened: a link there would have been followed.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        _check_kind(path, stat.S_ISREG)
        try:
            with open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        reason = f"{error.strerror} ({len(data)} bytes to write); what was there is intact"
        raise RunError(f"cannot write {path}: {reason}") from error


def write_json(path: Path, name: str, value: Any, *, durable: bool = True) -> None:
    """Write a file that says ``value`` of ``name``; :func:`read_json` reads it."""
    write_atomically(path, json.dumps({"schema": SCHEMA, name: value}, indent=1).encode(), durable=durable)


def read_json(path: Path, name: str, kind: type) -> Any:
    """What the file says of ``name``; RunError unless it is whole, of this schema, and a ``kind``."""
    try:
        content = json.loads(read_file(path))
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
    """Put tensors back into the tree that was flattened around them."""
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
    """CRC-32 of a tree and its tensors: names, dtypes, shapes and bytes."""
    crc = zlib.crc32(tree.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _check_schema(schema: int) -> None:
    if schema != SCHEMA:
        raise ValueError(f"its schema version is {schema}, this grokcurv reads {SCHEMA}")


def read_state(path: Path) -> dict[str, Any]:
    """The state in a file; a RunError if it is missing or damaged."""
    try:
        return unpack(read_file(path))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is missing or damaged: {error}") from error


def write_table(path: Path, frame: pd.DataFrame, said: Mapping[str, str] | None = None) -> None:
    """Write a table, with the schema version and what else is ``said`` of it; :func:`read_table` reads it."""
    import pyarrow as pa

    table = pa.Table.from_pandas(frame, preserve_index=False)
    known = table.schema.metadata or {}
    write_parquet(path, table.replace_schema_metadata({**known, **(said or {}), "grokcurv_schema": str(SCHEMA)}))


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table of Arrow's as it is, with checksums."""
    import pyarrow.parquet as pq
    from pyarrow.types import is_floating, is_integer

    # Numbers that were measured do not repeat: to look for what does would take longer than all else.
    text = [field.name for field in table.schema if not (is_floating(field.type) or is_integer(field.type))]
    buffer = io.BytesIO()
    pq.write_table(table, buffer, use_dictionary=text, write_page_checksum=True)
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


def read_parquet(path: Path, columns: Collection[str] | None = None) -> pa.Table | None:
    """A table of a run folder as Arrow has it, in one thread; None where none has been written yet.

    Args:
        path: of the file.
        columns: names of those to read, as far as they are there, beside ``step``; all if None.

    Raises:
        RunError: it is damaged, of another schema version, or its ``step`` is not a whole number in every row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(read_file(path)), page_checksum_verification=True)
        schema = file.schema_arrow
        _check_schema(int((schema.metadata or {})[b"grokcurv_schema"]))
        names = schema.names
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have one name, of {', '.join(names)}")
        wanted = None if columns is None else [name for name in names if name in columns or name == "step"]
        table = file.read(wanted, use_threads=False)
        table.validate(full=True)
        if table.num_rows and ("step" not in names or not pa.types.is_integer(table["step"].type)):
            raise ValueError("it has no column step of whole numbers")
        if table.num_rows and table["step"].null_count:
            raise ValueError("step is missing in some rows")
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return table


class News:
    """What is being done in a folder, for those who watch: ``progress.json``, written once a second at most."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "progress.json"
        self._told = -math.inf

    def tell(self, latest: Mapping[str, Any]) -> None:
        """Say how far it is. A disk that refuses is for others to report."""
        if time.monotonic() - self._told >= 1.0:
            self._told = time.monotonic()
            with contextlib.suppress(RunError):
                write_json(self.path, "progress", latest, durable=False)

    def read(self) -> dict[str, Any]:
        """What was told last; nothing if there is nothing yet."""
        latest: dict[str, Any] = read_json(self.path, "progress", dict) if os.path.lexists(self.path) else {}
        return latest


@contextlib.contextmanager
def hold(folder: Path, doing: str) -> Iterator[None]:
    """Be the one process that has the folder, which is made if missing.

    Raises:
        RunError: another process has it, which "is being ``doing``" by that one; or it cannot be written into.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(open_file(folder / ".lock", os.O_RDWR | os.O_CREAT))
        except OSError as error:
            what = "" if Path(error.filename or "") == folder else ".lock: "
            raise RunError(f"cannot write into {folder}: {what}{error.strerror}") from error
        for patience in (0.05, 0.2, None):  # one that asks for the holder has the lock for an instant
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience is None:
                    raise RunError(f"{folder} is being {doing} by process {holder(folder) or 'unknown'}") from None
                time.sleep(patience)
        with contextlib.suppress(OSError):  # on a full disk it stays unknown who has it
            os.truncate(lock.fileno(), 0)
            os.write(lock.fileno(), str(os.getpid()).encode())
        yield


def holder(path: Path) -> int | None:
    """The process that is writing into the folder, or None; 0 where it cannot be told which."""
    with contextlib.suppress(OSError), open_file(path / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            said = lock.read()
            return int(said) if said.isdigit() else 0
    return None
