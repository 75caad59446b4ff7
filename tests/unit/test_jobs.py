"""From file to file: what survives a restoration, and what happens when something goes wrong."""

from __future__ import annotations

import errno
import inspect
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import FakePipe, ramp, written
from latentindigo import jobs
from latentindigo.guidance import UPDATES
from latentindigo.images import LoadedImage, load_image, read_metadata
from latentindigo.jobs import RestoreSettings, failure_kind, fast_dtype, restore_file, restore_files
from latentindigo.pipeline import ModelLoadError, RestorationPipeline
from latentindigo.planning import Task, plan_tasks
from latentindigo.presets import INITS, METHODS, PRESETS
from tolerances import TOL


def run(source: Path, out: Path, **settings: Any) -> LoadedImage:
    (task,) = plan_tasks([source], out)
    restore_file(FakePipe(), task, RestoreSettings(**settings))
    return load_image(task.targets[0])


# ------------------------------------------------------------------------------------------------- what must survive


def test_a_photo_is_enlarged_and_carries_its_settings(tmp_path: Path) -> None:
    source = written(tmp_path / "a.png")
    (task,) = plan_tasks([source], tmp_path / "out")
    steps: list[int] = []
    outcome = restore_file(FakePipe(), task, RestoreSettings(scale=2, steps=3, seed=7), on_step=steps.append)
    assert outcome.status == "done"
    assert outcome.input_size == (8, 6)
    assert outcome.output_size == load_image(task.targets[0]).size == (16, 12)
    assert steps == [1, 2, 3]
    metadata = read_metadata(task.targets[0])
    assert metadata is not None
    assert metadata["settings"] == {"scale": 2, "steps": 3}
    assert (metadata["seed"], metadata["sample"], metadata["model_hash"]) == (7, 0, "c0ffee")
    assert metadata["version"] == outcome.as_json()["version"]
    json.dumps(outcome.as_json())


def test_grey_stays_grey(tmp_path: Path) -> None:
    source = written(tmp_path / "a.png", LoadedImage(ramp()[:1].expand(3, -1, -1), mode="L"))
    assert run(source, tmp_path / "out").mode == "L"


def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path) -> None:
    restored = run(written(tmp_path / "a.png", LoadedImage(ramp(), bits=16)), tmp_path / "out")
    assert restored.bits == 16
    assert restored.rgb.mul(255).frac().abs().max() > 0.01, "values between two 8-bit levels must be there"


def test_the_colour_profile_is_kept(tmp_path: Path) -> None:
    from PIL import ImageCms

    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = written(tmp_path / "a.png", LoadedImage(ramp(), icc=icc))
    assert run(source, tmp_path / "out").icc == icc


@pytest.mark.parametrize(("size", "crop"), [((16, 12), False), ((8, 12), True), ((16, 4), True)])
def test_opacity_follows_the_picture(tmp_path: Path, size: tuple[int, int], crop: bool) -> None:
    alpha = ramp()[1:2]  # opacity rises from left to right
    source = written(tmp_path / "a.png", LoadedImage(ramp(), alpha=alpha))
    restored = run(source, tmp_path / "out", size=size, crop=crop)
    assert restored.alpha is not None
    assert restored.alpha.shape == (1, size[1], size[0])
    columns = restored.alpha[0].mean(0)
    assert (columns.diff() >= 0).all()
    if crop and size == (8, 12):
        # 6 rows enlarged to 12, 8 columns to 16, of which the middle 8 stay: opacity 2/7 to 5/7, about.
        assert 0.2 < columns[0] < 0.35
        assert 0.65 < columns[-1] < 0.8
    else:
        assert columns[0] < 0.1
        assert columns[-1] > 0.9


def test_cropped_opacity_lies_where_the_pipeline_cuts(tmp_path: Path, tiny_pipeline: RestorationPipeline) -> None:
    picture = ramp(12, 20)
    source = written(tmp_path / "a.png", LoadedImage(picture, alpha=picture[1:2]))
    (task,) = plan_tasks([source], tmp_path / "out")
    outcome = restore_file(tiny_pipeline, task, RestoreSettings(size=(24, 24), crop=True, steps=1))
    alpha = load_image(task.targets[0]).alpha
    assert outcome.output_size == (24, 24)
    assert alpha is not None
    assert abs(alpha.mean().item() - 0.5) < 0.01, "an even cut of an even ramp has the mean of the whole"


def test_maps_are_brighter_by_one_fixed_factor(tmp_path: Path) -> None:
    source = written(tmp_path / "a.png")
    (task,) = plan_tasks([source], tmp_path / "out", num_samples=2, detail_map=True, uncertainty_map=True)
    restore_file(FakePipe(), task, RestoreSettings(num_samples=2))
    assert all(path.is_file() for path in task.files)
    assert task.uncertainty_map is not None
    for path, value in ((task.detail_maps[1], 0.1), (task.uncertainty_map, 0.05)):
        picture, metadata = load_image(path), read_metadata(path)
        assert metadata is not None
        assert (picture.bits, picture.mode) == (16, "L")
        assert torch.allclose(picture.rgb / metadata["gain"], torch.tensor(value), atol=TOL[torch.float32].atol)


# ------------------------------------------------------------------------------------------------- what may go wrong


def run_all(tasks: list[Task], pipe: FakePipe, **options: Any) -> list[jobs.Outcome]:
    return list(restore_files(lambda: pipe, tasks, RestoreSettings(), **options))


def three_tasks(tmp_path: Path) -> list[Task]:
    for name in ("a", "b", "c"):
        written(tmp_path / "in" / f"{name}.png")
    return plan_tasks([tmp_path / "in"], tmp_path / "out")


def test_a_bad_file_is_reported_and_the_rest_is_done(tmp_path: Path) -> None:
    tasks = three_tasks(tmp_path)
    tasks[1].source.write_bytes(b"no picture")
    outcomes = run_all(tasks, FakePipe())
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "done"]
    assert "b.png" in (outcomes[1].error or "")
    assert [task.targets[0].exists() for task in tasks] == [True, False, True]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    tasks = three_tasks(tmp_path)
    tasks[0].targets[0].parent.mkdir()
    tasks[0].targets[0].write_bytes(b"mine")
    pipe = FakePipe()
    outcomes = run_all(tasks, pipe)
    assert [outcome.status for outcome in outcomes] == ["failed", "done", "done"]
    assert "--overwrite" in (outcomes[0].error or "")
    assert tasks[0].targets[0].read_bytes() == b"mine"
    assert len(pipe.calls) == 2, "what cannot be written must not be computed"
    assert [outcome.status for outcome in run_all(tasks, pipe, overwrite=True)] == ["done"] * 3
    assert tasks[0].targets[0].read_bytes() != b"mine"


def test_out_of_memory_is_that_pictures_failure(tmp_path: Path) -> None:
    pipe = FakePipe(failures={0: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")})
    outcomes = run_all(three_tasks(tmp_path), pipe)
    assert [(outcome.status, outcome.kind) for outcome in outcomes] == [
        ("failed", "memory"),
        ("done", None),
        ("done", None),
    ]
    assert "--tile" in (outcomes[0].error or "")


def test_a_full_disk_ends_the_run(tmp_path: Path) -> None:
    pipe = FakePipe(failures={1: OSError(errno.ENOSPC, "No space left on device", "out/b.png")})
    outcomes = run_all(three_tasks(tmp_path), pipe)
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "failed"]
    assert [outcome.kind for outcome in outcomes] == [None, "disk", "disk"]
    assert len(pipe.calls) == 2


def test_a_mistake_of_ours_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_all(three_tasks(tmp_path), FakePipe(failures={0: ZeroDivisionError()}))


def test_the_model_is_loaded_once_and_only_for_a_readable_picture(tmp_path: Path) -> None:
    tasks = three_tasks(tmp_path)
    loads: list[int] = []

    def load() -> FakePipe:
        loads.append(1)
        return FakePipe()

    tasks[0].source.write_bytes(b"no picture")
    list(restore_files(load, tasks[:1], RestoreSettings()))
    assert not loads
    list(restore_files(load, tasks, RestoreSettings()))
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (RuntimeError("MPS backend out of memory"), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk"),
        (ModelLoadError("gone"), "model"),
        (RuntimeError("shapes differ"), "input"),
        (PermissionError(errno.EACCES, "Permission denied"), "input"),
        (ValueError("no"), "input"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_kinds_of_failure(error: Exception, kind: str) -> None:
    assert failure_kind(error) == kind


# ---------------------------------------------------------------------------------------------------------- settings


def test_settings_speak_the_pipelines_language() -> None:
    assert set(jobs._METHODS) == {None, *METHODS}
    assert set(jobs._UPDATES) == {None, *UPDATES}
    assert set(jobs._INITS) == {None, *INITS}
    assert set(jobs._PRESETS) == set(PRESETS)
    ours = {item.name: item.default for item in fields(RestoreSettings)}
    theirs = inspect.signature(RestorationPipeline.__call__).parameters
    assert ours == {name: theirs[name].default for name in ours}


def test_a_dry_run_predicts_the_settings_of_the_run(tiny_pipeline: RestorationPipeline, tiny_model: Path) -> None:
    for settings in (RestoreSettings(steps=1), RestoreSettings(fidelity=0.3, method="pixel-inn", steps=1, seed=3)):
        predicted = jobs.resolve_settings(settings, str(tiny_model))
        given = {name: value for name, value in asdict(settings).items() if value is not None}
        actual = tiny_pipeline(torch.rand(3, 8, 8), **given).settings
        assert predicted == {name: value for name, value in actual.items() if name in predicted}
        assert {name for name in actual if name not in predicted} <= {
                "size", "fidelity", "operator", "prompt", "negative_prompt", "guidance_scale",
            }  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0.5},
        {"scale": 17},
        {"size": (0, 5)},
        {"crop": True},
        {"preset": "bold"},
        {"method": "inn"},
        {"update": "none"},
        {"init": "zero"},
        {"steps": 0},
        {"strength": 0.0},
        {"strength": 1.5},
        {"fidelity": -0.1},
        {"num_samples": 0},
        {"seed": -1},
        {"tile": 32},
        {"tile": "big"},
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}:"):
        RestoreSettings(**wrong)


def test_an_absent_device_is_wrong_usage(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="device: 'nonsense' cannot be used"):
        jobs.load_pipeline(str(tiny_model), device="nonsense")


@pytest.mark.parametrize(("in_hardware", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_half_precision_is_taken_where_it_is_fast(
    in_hardware: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: in_hardware, raising=False)
    assert fast_dtype(torch.device("cpu")) == dtype
    assert fast_dtype(torch.device("mps")) == torch.float32
