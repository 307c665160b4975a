"""Models under DistributedDataParallel and fully_shard, on two and three processes, against one process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

dist = pytest.importorskip("torch.distributed")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

import ranks as on  # noqa: E402
from ranks import Ranks  # noqa: E402

import grokcurv as gc  # noqa: E402
from grokcurv.integrations.sharded import distributed  # noqa: E402

WORLD = 3
"""Processes, started once; a test on two uses the first two. On three the single row of a head leaves shards empty."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(WORLD, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture
def seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 20, (), generator=generator))


def same_everywhere(answers: list[dict[str, Any]], *names: str) -> None:
    for answer in answers[1:]:
        for name in names:
            assert torch.equal(answer[name].nan_to_num(), answers[0][name].nan_to_num()), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_of_given_gradients_add_up_to_the_whole(world, ranks, seed):
    answers = world.run(on.from_given_shards, seed, ranks=ranks)
    assert len({a["size"] for a in answers}) > 1  # uneven
    for answer in answers:
        for got, want, first in zip(answer["got"], answer["want"], answers[0]["got"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
            assert torch.equal(got, first)
        torch.testing.assert_close(*answer["norms"], rtol=1e-13, atol=0)


NUMBERS = ("defect", "grad_norm_a", "grad_norm_b", "grad_cosine", "bracket_norm", "eta", "energies", "reference")


@pytest.mark.parametrize(
    ("kind", "ranks", "options"),
    [
        ("fsdp", 2, {}),
        ("fsdp", 3, {"eta": "auto"}),
        ("hsdp", 2, {}),
        ("ddp", 2, {}),
        ("ddp", 2, {"method": "bracket"}),
        ("ddp", 3, {"eta": "auto", "strategy": "loop"}),
    ],
)
def test_float64_end_to_end(world, kind, ranks, options, seed):
    answers = world.run(on.measure, kind, seed, torch.float64, options, ranks=ranks)
    same_everywhere([a["stats"] for a in answers], *NUMBERS, "noise_floor")
    auto = options.get("eta") == "auto"  # a step of 1e-10 of theta: the rounding that the floor speaks of is larger
    for answer in answers:
        stats, alone = answer["stats"], answer["alone"]
        for name in NUMBERS:
            if name in ("defect", "bracket_norm", "energies", "reference") and auto:
                continue
            torch.testing.assert_close(stats[name], alone[name], rtol=1e-8, atol=1e-18, equal_nan=True)
        assert stats["reliable"].all()
        assert ((stats["defect"] - alone["defect"]).abs() <= stats["noise_floor"] + alone["noise_floor"]).all()
        scale = alone["delta"].norm(dim=1, keepdim=True)
        tolerance = 1e-3 if auto else 1e-8
        assert ((stats["delta"] - alone["delta"][:, answer["here"]]).abs() <= tolerance * scale).all()
    covered = torch.cat([a["here"] for a in answers]).unique()
    assert torch.equal(covered, torch.arange(answers[0]["alone"]["delta"].shape[1]))


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 2), ("fsdp", 3), ("ddp", 3)])
def test_float32_end_to_end_differs_by_less_than_the_floor(world, kind, ranks, seed):
    (answer, *_) = answers = world.run(on.measure, kind, seed, torch.float32, {}, ranks=ranks)
    same_everywhere([a["stats"] for a in answers], *NUMBERS, "noise_floor")
    stats, alone = answer["stats"], answer["alone"]
    assert ((stats["defect"] - alone["defect"]).abs() <= stats["noise_floor"] + alone["noise_floor"]).all()
    ratio = stats["noise_floor"] / alone["noise_floor"]
    assert ((ratio > 1 / 30) & (ratio < 30)).all()  # a floor that says something
    torch.testing.assert_close(stats["grad_norm_a"], alone["grad_norm_a"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 2), ("ddp", 3)])
def test_kinks(world, kind, ranks, seed):
    """Evaluated in float64 throughout, on all ranks, the rectified loss has the floor of that."""
    (answer, *_) = answers = world.run(on.measure, kind, seed, torch.float32, {}, True, ranks=ranks)
    same_everywhere([a["stats"] for a in answers], *NUMBERS, "noise_floor")
    stats, alone = answer["stats"], answer["alone"]
    torch.testing.assert_close(stats["noise_floor"], alone["noise_floor"], rtol=1e-4, atol=0)
    assert ((stats["defect"] - alone["defect"]).abs() <= stats["noise_floor"] + alone["noise_floor"]).all()


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"checkpointing": True}], ids=["plain", "dropout", "again"])
@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 3), ("ddp", 2)])
def test_measuring_changes_nothing(world, kind, ranks, options, seed):
    measured = world.run(on.train, kind, seed, True, options, ranks=ranks)
    bare = world.run(on.train, kind, seed, False, options, ranks=ranks)
    for a, b in zip(measured, bare, strict=True):
        assert a["losses"] == b["losses"]
        assert torch.equal(a["random"], b["random"])
        assert a["end"].keys() == b["end"].keys()
        for name in a["end"]:
            assert torch.equal(a["end"][name], b["end"][name]), name
        pd.testing.assert_frame_equal(a["records"], measured[0]["records"], check_exact=True)
    records = measured[0]["records"]
    assert len(records) == 6
    assert records["reliable"].any()


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 2), ("fsdp", 3), ("ddp", 2)])
def test_monitor_records_what_one_process_would(world, kind, ranks, seed):
    records = world.run(on.monitor_ranks, kind, seed, False, ranks=ranks)
    alone = on.monitor_alone(seed, ranks)
    for other in records[1:]:
        pd.testing.assert_frame_equal(other, records[0], check_exact=True)
    records = records[0]
    assert records["step"].tolist() == alone["step"].tolist()
    both = records["reliable"] & alone["reliable"]
    assert both.any()
    floor = records["noise_floor"] + alone["noise_floor"]
    assert ((records["defect_median"] - alone["defect_median"]).abs() <= floor)[both].all()
    assert records["exec_random_ratio"].notna().any()
    # Directions of delta: off by at most twice the floor over the defect.
    slack = (2 * floor / alone["defect_median"])[both]
    for name in ("rho", "exec_fraction", "attention_fraction"):
        same = (records[name] - alone[name]).abs()[both]
        assert (same.isna() | (same <= slack + 1e-4)).all(), name
    assert records["exec_random_ratio"].isna().equals(alone["exec_random_ratio"].isna())
    chance = [(r["exec_fraction"] / r["exec_random_ratio"])[both] for r in (records, alone)]
    pd.testing.assert_series_equal(*chance, rtol=1e-12)
    matched = [(r["exec_matched_ratio"] / r["exec_random_ratio"])[both] for r in (records, alone)]
    pd.testing.assert_series_equal(*matched, rtol=1e-6)
    chance = [(r["step_alignment"] / r["step_alignment_ratio"])[both] for r in (records, alone)]
    pd.testing.assert_series_equal(*chance, rtol=1e-12)
    same = (records["step_alignment"] - alone["step_alignment"]).abs()[both]
    assert (same.isna() | (same <= slack + 1e-4)).all()


@pytest.mark.parametrize(
    ("ranks", "segmented", "store"), [(2, False, None), (3, False, None), (3, True, None), (3, False, torch.bfloat16)]
)
def test_pca_of_shards_is_that_of_the_whole(world, ranks, segmented, store, seed):
    answers = world.run(on.pca, seed, segmented, store, ranks=ranks)
    for answer in answers:
        for name, (got, want) in answer["numbers"].items():
            scale = float(want[want.isfinite()].abs().max())
            rtol, atol = (1e-5, 1e-6) if name == "scores" else (1e-10, 1e-12)  # components are float32
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol * scale, equal_nan=True, msg=name)
            assert torch.equal(got.nan_to_num(), answers[0]["numbers"][name][0].nan_to_num())
        for got, want in answer["components"] + answer["means"]:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert answer["seen"] == 12
        assert "row 1 holds NaN" in answer["refused"]  # on all ranks, though one alone has it


def test_a_nan_of_one_rank_reaches_all(world, seed):
    for answer in world.run(on.nan, seed, ranks=3):
        assert answer["defect"].isnan().all()
        assert not answer["reliable"].any()
        assert answer["kept"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_makes_one_rank_doubt_makes_all_check(world, kind, seed):
    assert world.run(on.grown, kind, seed, ranks=3) == [[True, False, True]] * 3


def test_dropout_meets_the_same_mask_at_every_parameter_vector(world, seed):
    answers = world.run(on.dropout, seed, ranks=2)
    for answer in answers:
        first, again, other, longer = answer["stats"]
        assert torch.equal(first["defect"], again["defect"])
        assert not torch.equal(first["defect"], other["defect"])
        # With other masks past the step gradients would differ however short it is: the defect would rise tenfold.
        torch.testing.assert_close(first["defect"], longer["defect"], rtol=0.5, atol=0)
        assert answer["kept"]
        assert answer["random"]
    same_everywhere([a["stats"][0] for a in answers], "defect", "noise_floor")
    assert not torch.equal(answers[0]["mask"], answers[1]["mask"])


@pytest.mark.parametrize(("kind", "method"), [("fsdp", "difference"), ("ddp", "difference"), ("ddp", "bracket")])
def test_a_loss_that_breaks_off_leaves_the_model_as_it_was(world, kind, method, seed):
    for answer in world.run(on.failure, kind, seed, method, True, ranks=2):
        assert answer["message"] == "broken off"
        assert answer["kept"]
        assert answer["after"]["defect"].isfinite().all()


@pytest.mark.parametrize("method", ["difference", "bracket"])
def test_ddp_raises_on_all_ranks_what_one_raises(world, method, seed):
    *others, last = world.run(on.failure, "ddp", seed, method, False, ranks=3)
    assert last["message"] == "broken off"
    for answer in others:
        assert "on another rank" in answer["message"]
    for answer in (*others, last):
        assert answer["kept"]
        assert torch.equal(answer["after"]["defect"], last["after"]["defect"])


@pytest.mark.parametrize("mixed", [False, True])
def test_between_accumulated_passes_it_is_refused_and_harmless(world, mixed, seed):
    measured, bare = (world.run(on.accumulate, seed, measured, mixed, ranks=2) for measured in (True, False))
    for one, other in zip(measured, bare, strict=True):
        assert all("add up unreduced" in message for message in one["messages"])
        assert len(one["grads"]) == len(other["grads"])
        assert all(map(torch.equal, one["grads"], other["grads"]))
        assert one["after"]["defect"].isfinite().all()


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_a_monitor_resumes_from_the_state_of_each_rank(world, kind, seed):
    through, resumed = (world.run(on.monitor_ranks, kind, seed, again, ranks=2) for again in (False, True))
    for one, other in zip(through, resumed, strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_floor_rises_with_the_precision_that_fsdp_computes_in(world, seed):
    (full, low), *_ = [a["floors"] for a in world.run(on.low_precision, seed, ranks=2)]
    assert (low > 1e2 * full).all()


def test_without_an_exact_model_nothing_is_reliable(world, seed):
    for answer in world.run(on.unvouched, seed, ranks=2):
        assert answer["defect"].isfinite().all()
        assert answer["noise_floor"].isnan().all()
        assert not answer["reliable"].any()


ADVICE = "several processes (DistributedDataParallel, fully_shard): pass grokcurv.integrations.sharded.distributed"

MESSAGES = {
    "raw sharded": ADVICE,
    "raw ddp": ADVICE,
    "inside": ADVICE,
    "plain": "got Net; a model of one process needs no distributed()",
    "dataparallel": "got DataParallel",
    "ddp exact": "exact is for fully_shard",
    "mixed": "of one dtype and sharded alike",
    "ignored": "'head.weight' is not sharded",
    "sideways": "along its dimension 0",
    "exact plain": "exact must have had fully_shard(exact), got Net",
    "exact dtype": "exact must be torch.float64 on cpu, got torch.float32",
    "exact other": "exact has other modules, parameters",
    "bracket": "eta='auto' estimates the bracket",
    "strategy": "strategy must be 'auto' or 'loop'",
    "monitor": "give distributed(model, exact)",
    "monitor pca": "a ShardedPCA(model) where",
    "pca": "model must have had fully_shard(model), got Net",
    "pca order": "'0:4' does not",
    "pca end": "up to P = ",
    "ddp pca": "a StreamingPCA otherwise",
    "pca length": "coordinates, got 1",
    "hook": "'head.weight' has a hook",
}


def test_bad_input_is_named(world, seed):
    for answer in world.run(on.refusals, seed, ranks=2):
        assert answer.keys() == MESSAGES.keys()
        for name, message in answer.items():
            assert MESSAGES[name] in message, (name, message)


def test_the_code_of_the_documentation_runs(world):
    page = Path(__file__).parents[1] / "docs" / "sharded.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    loop = blocks[0][blocks[0].index("for batch") :]
    for counts in world.run(on.documented, blocks, loop, ranks=WORLD):
        assert counts == [4, 4]


def test_data_parallel_is_refused_with_advice():
    model = torch.nn.DataParallel(torch.nn.Linear(3, 1))

    def loss(module: torch.nn.Module, batch: Tensor) -> Tensor:
        return module(batch).square().mean()

    with pytest.raises(ValueError, match=r"nn\.DataParallel.*pass model\.module"):
        gc.CommutatorProbe(model, loss)
    with pytest.raises(ValueError, match=r"got DataParallel"):
        distributed(model)
    assert gc.commutator_defect(model.module, loss, torch.randn(4, 3), torch.randn(4, 3)).defect.isfinite().all()
