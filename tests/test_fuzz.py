"""What is wrong in a folder is never more than a RunError: its files are flipped, cut, swapped and written anew."""

from __future__ import annotations

import io
import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic_run
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from grokcurv import runs
from grokcurv.report import page
from grokcurv.report.page import Drawing, draw, write_report
from grokcurv.report.summary import Summary
from grokcurv.report.sweep_summary import SweepSummary
from grokcurv.runs import RunError, RunWriter, open_run
from grokcurv.sweep import SweepConfig, open_sweep
from grokcurv.sweep.folder import claim
from grokcurv.training import TrainConfig, train
from grokcurv.training.network import load_model

fuzz = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

TABLES = {
    "metrics": synthetic_run.metrics(),
    "curvature": synthetic_run.curvature(),
    "pca": synthetic_run.pca_history(),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    folder = synthetic_run.write_run(
        tmp_path_factory.mktemp("sound") / "run", TABLES, intervention="kick", strength=2.0
    )
    with RunWriter(folder, open_run(folder).config, resume=True) as writer:
        writer.write_checkpoint({"step": 7, "betas": (0.9, 0.98), "w": torch.randn(3, 5)})
        writer.write_basis({"values": torch.randn(4), "name": "é"})
        writer.write_snapshot(7, {"w": torch.randn(5)})
        writer.set_status("finished")
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, sound: Path) -> Path:
    """A sweep of two runs, one of them failed."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    folder.mkdir()
    sweep = claim(folder, SweepConfig(run={"p": 11, "batch_size": 16}, grid={"lr": [1e-3, 1e-2]}))
    first, second = sweep.plan
    shutil.copytree(sound, sweep.folder(first))
    failures = {second: {"reason": "loss is NaN", "final": True}}
    (folder / "failures.json").write_text(json.dumps({"schema": 1, "failures": failures}))
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def copy(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


def outcome(read: Callable[[], object]) -> str:
    """What comes of reading: "read", or the message of a RunError. Anything else passes, and fails the test."""
    with warnings.catch_warnings():
        for kind in (UserWarning, RuntimeWarning):  # matplotlib's: a character its font has not, an axis of 600 decades
            warnings.simplefilter("ignore", kind)
        try:
            read()
        except RunError as error:
            return str(error) or pytest.fail("a RunError without a message")
    return "read"


def everything(folder: Path) -> dict[str, str]:
    """All that can be read of a run, each by itself."""
    said = {"open": outcome(lambda: open_run(folder))}
    if said["open"] != "read":
        return said
    run = open_run(folder)
    reads: dict[str, Callable[[], object]] = {
        "status": lambda: run.status,
        "metrics": lambda: run.metrics,
        "curvature": lambda: run.curvature,
        "pca": lambda: run.pca_history,
        "records": run.records,
        "checkpoint": run.checkpoint,
        "basis": run.basis,
        "snapshots": lambda: [run.snapshot(step) for step in run.snapshots],
    }
    return said | {name: outcome(read) for name, read in reads.items()}


SETTINGS = TrainConfig(
    **{"p": 5, "layers": 1, "d_model": 8, "heads": 1, "d_ff": 8, "batch_size": 8, "steps": 4},
    **{"eval_every": 2, "measure_every": 2, "pca_every": 2, "checkpoint_every": 2},
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the trainer."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(SETTINGS, out=folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without their pictures, which take a second and have a test of their own."""
    monkeypatch.setattr(page, "draw_all", lambda name, alt, _: Drawing(name, alt, *[b""] * 5))


@st.composite
def damages(draw: st.DrawFn, data: bytes) -> bytes:
    """A few bits turned, a piece cut off or out, or bytes put in."""
    kind = draw(st.sampled_from(["flip", "truncate", "remove", "insert"]))
    place = draw(st.integers(0, max(len(data) - 1, 0)))
    if kind == "flip" and data:
        damaged = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            damaged[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(damaged)
    if kind == "truncate":
        return data[:place]
    if kind == "remove":
        return data[:place] + data[place + draw(st.integers(1, 64)) :]
    return data[:place] + draw(st.binary(min_size=1, max_size=64)) + data[place:]


@pytest.mark.usefixtures("undrawn")
@fuzz
@given(data=st.data())
def test_damaged_bytes(sound: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = copy(sound, tmp_path / "run")
    name = data.draw(st.sampled_from(files(folder)))
    original = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(damages(original)))
    said = everything(folder)
    if name.endswith(".safetensors") and (folder / name).read_bytes() != original:  # these carry a checksum
        assert sum(text != "read" for text in said.values()) == 1
    assert outcome(lambda: write_report(folder))


def test_every_bit_of_a_page_of_a_table_is_checked(sound: Path, tmp_path: Path) -> None:
    """Numbers that a bad disk has changed are not numbers of the run: flips within the pages are seen."""
    folder = copy(sound, tmp_path / "run")
    path = folder / "metrics.parquet"
    whole = path.read_bytes()
    chunk = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(0).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    generator = np.random.default_rng()
    for place in generator.integers(start, start + chunk.total_compressed_size, 100):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        if (said := outcome(lambda: open_run(folder).metrics)) != "read":
            assert "metrics.parquet is damaged" in said
        else:  # within a page's header, and of no consequence
            pd.testing.assert_frame_equal(open_run(folder).metrics, TABLES["metrics"])


@pytest.mark.usefixtures("undrawn")
@fuzz
@given(data=st.data())
def test_files_in_each_others_place(sound: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = copy(sound, tmp_path / "run")
    names = files(folder)
    one, other = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    a, b = (folder / one).read_bytes(), (folder / other).read_bytes()
    (folder / one).write_bytes(b)
    (folder / other).write_bytes(a)
    everything(folder)
    assert outcome(lambda: write_report(folder))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("missing", ["file", "folder"])
def test_a_file_that_is_missing_or_a_folder(sound: Path, tmp_path: Path, missing: str) -> None:
    for name in files(sound):
        folder = copy(sound, tmp_path / "run")
        (folder / name).unlink()
        if missing == "folder":
            (folder / name).mkdir()
        everything(folder)
        assert outcome(lambda: write_report(folder))  # noqa: B023


WORTHLESS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8)
JSON = st.recursive(
    WORTHLESS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one of its parts, or the whole, replaced by anything or left out."""
    inner = [*value] if isinstance(value, dict) else [*range(len(value))] if isinstance(value, list) else []
    if not inner or draw(st.integers(0, 4)) == 0:
        return draw(JSON)
    place = draw(st.sampled_from(inner))
    if isinstance(value, dict) and draw(st.integers(0, 5)) == 0:
        return {name: part for name, part in value.items() if name != place}
    if isinstance(value, dict):
        return {**value, place: draw(changed(value[place]))}
    return [*value[:place], draw(changed(value[place])), *value[place + 1 :]]


@pytest.mark.usefixtures("undrawn")
@fuzz
@given(data=st.data(), name=st.sampled_from(["config", "environment", "status"]))
def test_json_of_another_kind(sound: Path, tmp_path: Path, data: st.DataObject, name: str) -> None:
    folder = copy(sound, tmp_path / "run")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data.draw(changed(json.loads(path.read_text())))))
    everything(folder)
    assert outcome(lambda: write_report(folder))


@fuzz
@given(data=st.data())
def test_damaged_runs_are_resumed_and_loaded_or_refused(trained: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = copy(trained, tmp_path / "run")
    path = folder / data.draw(st.sampled_from(files(trained)))
    if path.suffix == ".json" and data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(changed(json.loads(path.read_text())))))
    else:
        path.write_bytes(data.draw(damages(path.read_bytes())))
    loaded, resumed = [], []
    outcome(lambda: loaded.append(load_model(open_run(folder)).state_dict()))
    outcome(lambda: resumed.append(train(SETTINGS, out=folder, resume=True)))
    for weights in loaded + [run.checkpoint()["model"] for run in resumed]:
        for name, weight in open_run(trained).checkpoint()["model"].items():
            assert torch.equal(weights[name], weight)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": 1, "config": ' + '{"a":' * 100_000, "9" * 10_000])
def test_json_that_would_overflow_the_reader(sound: Path, tmp_path: Path, text: str) -> None:
    folder = copy(sound, tmp_path / "run")
    (folder / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config\.json is missing or damaged"):
        open_run(folder)


COLUMN = st.one_of(
    st.just(pa.int64()).flatmap(lambda kind: st.tuples(st.just(kind), st.integers(-(2**63), 2**63 - 1))),
    st.just(pa.float64()).flatmap(lambda kind: st.tuples(st.just(kind), st.floats())),
    st.tuples(st.just(pa.string()), st.text(max_size=6)),
    st.tuples(st.just(pa.bool_()), st.booleans()),
    st.tuples(st.just(pa.list_(pa.int8())), st.just([1, 2])),
    st.tuples(st.just(pa.timestamp("us")), st.integers(-(2**62), 2**62)),
    st.tuples(st.just(pa.binary()), st.binary(max_size=4)),
    st.tuples(st.just(pa.null()), st.none()),
)


def write_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table.replace_schema_metadata({b"grokcurv_schema": b"1"}), path)


@st.composite
def altered(draw: st.DrawFn, frame: pd.DataFrame) -> pa.Table:
    """The table with columns left out, renamed, of other types, with nulls, twice; or with no rows."""
    table = pa.Table.from_pandas(frame.head(draw(st.sampled_from([0, 1, 2, 40]))), preserve_index=False)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, table.num_columns - 1))
        name = table.column_names[place]
        what = draw(st.sampled_from(["drop", "rename", "type", "null", "twice"]))
        if what == "drop" and table.num_columns > 1:
            table = table.remove_column(place)
        elif what == "rename":
            table = table.set_column(place, draw(st.text(max_size=4) | st.just("run")), table[place])
        elif what == "type":
            kind, value = draw(COLUMN)
            table = table.set_column(place, name, pa.array([value] * len(table), kind))
        elif what == "null":
            table = table.set_column(place, name, pa.array([None] * len(table), table[place].type))
        else:
            table = table.append_column(name, table[place])
    return table


@pytest.mark.usefixtures("undrawn")
@fuzz
@given(data=st.data(), name=st.sampled_from(runs.TABLES))
def test_tables_of_something_else(sound: Path, tmp_path: Path, data: st.DataObject, name: str) -> None:
    folder = copy(sound, tmp_path / "run")
    write_parquet(folder / f"{name}.parquet", data.draw(altered(TABLES[name])))
    everything(folder)
    assert outcome(lambda: write_report(folder))


NUMBER = st.floats(-1e100, 1e100) | st.sampled_from([0.0, -1.0, 1e-320, 1e-300, math.inf, -math.inf, math.nan])


@st.composite
def numbers_of_every_size(draw: st.DrawFn) -> dict[str, pd.DataFrame]:
    """A run's tables, with other numbers in them."""
    rows = draw(st.integers(1, 4))
    tables = {}
    for name, frame in TABLES.items():
        made = frame.head(rows).copy()
        for column in made.select_dtypes("float"):
            made[column] = draw(st.lists(NUMBER, min_size=len(made), max_size=len(made)))
        made["step"] = sorted(draw(st.lists(st.integers(0, 10**6), min_size=len(made), max_size=len(made))))
        tables[name] = made
    return tables


def write_tables(folder: Path, tables: dict[str, pd.DataFrame]) -> Path:
    for name, table in tables.items():
        write_parquet(folder / f"{name}.parquet", pa.Table.from_pandas(table, preserve_index=False))
    return folder


@pytest.mark.usefixtures("undrawn")
@fuzz
@given(tables=numbers_of_every_size())
def test_numbers_of_every_size(sound: Path, tmp_path: Path, tables: dict[str, pd.DataFrame]) -> None:
    assert outcome(lambda: write_report(write_tables(copy(sound, tmp_path / "run"), tables))) == "read"


@pytest.mark.usefixtures("drawn_once")
@settings(fuzz, max_examples=4, phases=[Phase.generate])  # shrinking would draw for minutes
@given(tables=numbers_of_every_size())
def test_pictures_of_numbers_of_every_size(sound: Path, tmp_path: Path, tables: dict[str, pd.DataFrame]) -> None:
    assert outcome(lambda: write_report(write_tables(copy(sound, tmp_path / "run"), tables))) == "read"


def test_a_number_that_no_run_records(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "run")
    write_tables(folder, {"metrics": TABLES["metrics"].assign(train_loss=1e101)})
    with pytest.raises(RunError, match=r"train_loss in metrics.parquet must lie within 1e\+100; got 1e\+101"):
        write_report(folder)


@pytest.mark.usefixtures("undrawn")
def test_nothing_can_be_written(sound: Path, tmp_path: Path) -> None:
    folder = copy(sound, tmp_path / "run")
    (folder / "figures").write_bytes(b"")
    with pytest.raises(RunError, match=r"cannot write .*figures"):
        write_report(folder)


@pytest.mark.usefixtures("undrawn")
@fuzz
@given(data=st.data(), name=st.sampled_from(["sweep.json", "failures.json"]))
def test_damaged_sweeps(swept: Path, tmp_path: Path, data: st.DataObject, name: str) -> None:
    folder = copy(swept, tmp_path / "sweep")
    path = folder / name
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damages(path.read_bytes())))
    else:
        path.write_text(json.dumps(data.draw(changed(json.loads(path.read_text())))))
    assert outcome(lambda: write_report(folder))


@pytest.mark.usefixtures("undrawn")
@fuzz
@given(data=st.data(), name=st.sampled_from(["metrics", "curvature"]))
def test_damaged_runs_of_a_sweep(swept: Path, tmp_path: Path, data: st.DataObject, name: str) -> None:
    folder = copy(swept, tmp_path / "sweep")
    (run,) = (folder / "runs").iterdir()
    path = run / f"{name}.parquet"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damages(path.read_bytes())))
    else:
        write_parquet(path, data.draw(altered(TABLES[name])))
    assert outcome(lambda: write_report(folder))


def test_the_sound_ones_are_read(sound: Path, swept: Path) -> None:
    """What the tests above damage has nothing wrong with it."""
    assert set(everything(sound).values()) == {"read"}
    assert len(list(draw(Summary(open_run(sound))))) == 5
    assert [row[0] for row in SweepSummary(open_sweep(swept)).runs_table[1]] == list(open_sweep(swept).plan)
