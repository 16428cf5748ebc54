"""The monitor under DDP and FSDP2: rank 0 has the spectra of one process that trains on all data, the others none."""

import pytest

import lowrank_layers as lr

from ..processes import run_processes
from .distributed_worker import build, inputs, monitor_both, train


def test_rank_0_has_the_records_of_one_process(tmp_path):
    (tmp_path / "files").mkdir()
    first, second = run_processes(monitor_both, tmp_path / "work", str(tmp_path / "files"))
    with lr.SpectrumMonitor(model := build(), every=1, k=3) as monitor:
        train(model, inputs())
    expected = monitor.records
    assert len(expected) == 2
    assert list(expected[0].deltas) == ["2.weight/default"]
    for name in ("ddp", "fsdp"):
        records = [lr.SpectrumRecord.from_json(line) for line in first[name]]
        assert [record.step for record in records] == [1, 2]
        for record, own in zip(records, expected, strict=True):
            assert_same(record, own)
        assert lr.read_spectra(tmp_path / "files" / f"{name}_0.jsonl") == records
        assert second[name] == []
        assert not (tmp_path / "files" / f"{name}_1.jsonl").exists()


def assert_same(record, expected):
    spectra, own = dict(record.items()), dict(expected.items())
    assert spectra.keys() == own.keys()
    for name, spectrum in spectra.items():
        assert spectrum.singular_values == pytest.approx(own[name].singular_values, rel=1e-4, abs=1e-6)
        assert spectrum.frobenius_norm == pytest.approx(own[name].frobenius_norm, rel=1e-5)
