"""What `info` knows about this machine."""

from __future__ import annotations

import json
from pathlib import Path

from latentindigo.installation import describe_installation
from latentindigo.jobs import load_pipeline
from latentindigo.pipeline import RestorationPipeline


def test_a_model_is_described_by_the_hash_that_results_carry(
    tiny_model: Path, tiny_pipeline: RestorationPipeline
) -> None:
    facts = describe_installation(str(tiny_model), lambda model: load_pipeline(model, device="cpu", dtype="float32"))
    assert facts["model"]["hash"] == tiny_pipeline.weights_hash()
    assert facts["model"]["error"] is None
    assert {Path(name).parent.name for name in facts["model"]["files"]} >= {"vae", "denoiser", "pixel_inn"}
    assert facts["devices"][0]["device"] == "cpu"
    assert "float32" in facts["dtypes"]
    assert facts["packages"]["torch"]
    json.dumps(facts)


def test_a_missing_model_is_said_not_raised(tmp_path: Path) -> None:
    facts = describe_installation(str(tmp_path), lambda model: load_pipeline(model, device="cpu"))
    assert facts["model"]["hash"] is None
    assert "model_index.json" in facts["model"]["error"]
