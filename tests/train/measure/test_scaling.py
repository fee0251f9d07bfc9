"""The scaling benchmark: its output, and equal losses on every mesh."""

import dataclasses
import json

import numpy as np
import pytest

import train.measure.scaling
from tests.train.small import CONFIG, T, small_run
from train.config import MeshSpec, sparse
from train.measure.scaling import measure


def test_it_prints_and_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train.measure.scaling, "large", lambda: CONFIG)
    file = tmp_path / "one.json"
    arguments = ["--rows", "2", "--length", str(T), "--steps", "3", "--json", str(file)]
    assert train.measure.scaling.main(arguments) == 0
    written, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert len(written["losses"]) == 3 and np.isfinite(written["losses"]).all()
    assert written["devices"] == 1 and written["tokens_per_s_per_device"] > 0
    assert f"{written['losses'][0]:.7f}" in printed and f"{written['seconds']:.3f} s" in printed


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", [MeshSpec(expert=2), MeshSpec(context=2, tensor=2)], ids=str)
def test_every_mesh_has_the_losses_of_one_device(mesh):
    run = small_run(batch=8, stages=(sparse(3, lr=1e-3, index_lr=1e-3),))
    alone = measure(run, 3)
    spread = measure(dataclasses.replace(run, mesh=mesh), 3)
    assert spread["devices"] == 8
    np.testing.assert_allclose(spread["losses"], alone["losses"], rtol=1e-5)
