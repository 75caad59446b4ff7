"""The benchmark of full-size priors runs, in miniature, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentindigo.evaluation import check_result_schema

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd21", "sdxl", "sd35-medium", "flux1-dev"])
def test_the_benchmark_runs_in_miniature(name: str, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu_priors.py"), "--tiny", "--model", name, "--side", "64"]
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [*script, "--steps", "2", "--rounds", "1", "--out", str(tmp_path), "--date", "today"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "today-gpu-priors-tiny.json").read_text())
    check_result_schema(result)
    assert result["settings"]["failed"] == {}
    assert len(result["rows"]) == 6
    through = next(row for row in result["rows"] if row["method"] == "latent-inn" and row["variant"] == "through")
    # It is the package's own loop that is timed: two steps, each with a backward pass through the denoiser.
    assert through["calls"] == {
        "denoiser": 2, "denoiser_backward": 2, "decoder": 0, "decoder_backward": 0, "encoder": 0, "inn": 4
    }  # fmt: skip
