"""The verdict on an option follows from the seeds of the base."""

from __future__ import annotations

import json

import pytest

from benchmarks.bench_accuracy import Row, last_accuracy, main


def test_a_variant_has_fallen_only_beyond_the_spread_of_the_seeds():
    base = Row("", [0.90, 0.92, 0.88], 1.0)  # mean 0.90, spread 0.04
    assert not Row("x=1", [0.86, 0.865, 0.86], 1.0).has_fallen(base)
    assert Row("x=1", [0.86, 0.85, 0.86], 1.0).has_fallen(base)
    assert not Row("x=1", [0.99, 0.99, 0.99], 1.0).has_fallen(base)
    assert "-0.0383 | within the spread" in Row("x=1", [0.86, 0.865, 0.86], 1.0).line(base)
    assert "| fallen |" in Row("x=1", [0.5, 0.5, 0.5], 1.0).line(base)


def test_the_accuracy_of_a_run_is_its_last_verifications_mean(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    scores = [
        {"a": {"accuracy_flip": 0.1}},
        {"a": {"accuracy_flip": 0.5}, "b": {"accuracy_flip": 0.7}},
    ]
    lines = [{"step": 1, "loss": 2.0}, *({"step": 1, "eval": each} for each in scores)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_accuracy(metrics) == pytest.approx(0.6)
    metrics.write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ValueError, match="val_targets"):
        last_accuracy(metrics)


def test_runs_are_made_and_compared(tmp_path, capsys, monkeypatch):
    made = []

    def run(words, ranks):
        made.append((tuple(words), ranks))
        return 0.5 if "precision=bf16" in words else 0.9

    monkeypatch.setattr("benchmarks.bench_accuracy.train_once", run)
    arguments = ["configs/demo", "lr=1", "--variant", "precision=bf16", "--seeds", "4", "5"]
    assert main([*arguments, "--json", str(tmp_path / "rows.json")]) == 1
    assert made == [
        (("configs/demo", "lr=1", *more, f"seed={seed}"), 1)
        for more in ((), ("precision=bf16",))
        for seed in (4, 5)
    ]
    assert "fallen: ['precision=bf16']" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 2
