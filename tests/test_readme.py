"""The README's Python is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from models import PROBLEMS

README = Path(__file__).parents[1] / "README.md"


def test_code_blocks_run(capsys, generator):
    problem = PROBLEMS["tied attention"]
    model = problem.model()
    loader = [problem.batch(generator) for _ in range(30)]
    names = {
        "model": model,
        "loss_fn": problem.loss_fn,
        "loader": loader,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "batch_a": loader[0],
        "batch_b": loader[1],
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    loop, attached, once = blocks
    exec(loop, names)
    assert len(names["monitor"].records()) == 29
    exec(attached, names)
    names["optimizer"].step()
    assert len(names["monitor"].records()) == 1
    exec(once, names)
    assert names["stats"].reliable.all()
    assert "noise_floor" in capsys.readouterr().out


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", README.read_text()):
        assert target.startswith("https://") or (README.parent / target).exists(), target
