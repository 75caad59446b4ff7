"""From file to file: what survives a restoration, and what happens when something goes wrong."""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes import FakeOutput, FakePipe, ramp, written
from latentindigo import jobs
from latentindigo.failures import failure_kind
from latentindigo.guidance import UPDATES
from latentindigo.images import LoadedImage, load_image, read_metadata
from latentindigo.jobs import RestoreSettings, fast_dtype, restore_file, restore_files
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


def free_room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Let every disk have this many bytes left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_after_a_full_disk_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is as large is named without being computed; what is smaller is tried."""
    tasks = three_tasks(tmp_path)
    written(tmp_path / "in" / "d.png", LoadedImage(ramp(4, 4)))
    tasks = plan_tasks([tmp_path / "in"], tmp_path / "out")
    free_room(monkeypatch, 100_000)
    pipe = FakePipe(failures={1: OSError(errno.ENOSPC, "No space left on device", "out/b.png")})
    outcomes = run_all(tasks, pipe)
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "failed", "done"]
    assert [outcome.kind for outcome in outcomes] == [None, "disk", "disk", None]
    assert [task.source.name in (outcome.error or "") for task, outcome in zip(tasks, outcomes, strict=True)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert "is not computed: an earlier result, no larger, found no room" in (outcomes[2].error or "")
    assert len(pipe.calls) == 3


def test_room_that_was_made_meanwhile_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FakePipe(failures={0: OSError(errno.ENOSPC, "No space left on device")})
    free_room(monkeypatch, 100_000)
    outcomes = restore_files(lambda: pipe, three_tasks(tmp_path), RestoreSettings())
    assert next(outcomes).kind == "disk"
    free_room(monkeypatch, 200_000)
    assert [outcome.status for outcome in outcomes] == ["done", "done"]


def test_nothing_is_computed_for_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FakePipe()
    free_room(monkeypatch, 4000)
    outcomes = run_all(three_tasks(tmp_path), pipe)
    assert [outcome.kind for outcome in outcomes] == ["disk"] * 3
    assert not pipe.calls
    for name, outcome in zip("abc", outcomes, strict=True):
        assert f"{name}.png' is not computed: it needs 4.4 kB or more and 4.0 kB are free" in (outcome.error or "")
    assert not (tmp_path / "out").exists()
    free_room(monkeypatch, 5000)
    assert [outcome.kind for outcome in run_all(plan_tasks([tmp_path / "in"], tmp_path / "out"), pipe)] == [None] * 3


@pytest.mark.parametrize("stage", range(5))
def test_a_task_leaves_all_of_its_files_or_none(tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples, two maps of detail and one of uncertainty: whichever cannot be written, the others are not left."""
    source = written(tmp_path / "a.png")
    (task,) = plan_tasks([source], tmp_path / "out", num_samples=2, detail_map=True, uncertainty_map=True)
    files = [*task.targets, *task.detail_maps, task.uncertainty_map]
    save = jobs.save_image

    def full(image: LoadedImage, target: Path, **options: Any) -> None:
        if target == files[stage]:
            raise OSError(errno.ENOSPC, "cannot be written: No space left on device", str(target))
        save(image, target, **options)

    monkeypatch.setattr(jobs, "save_image", full)
    settings = RestoreSettings(num_samples=2)
    (outcome,) = restore_files(FakePipe, [task], settings)
    assert outcome.kind == "disk" and str(files[stage]) in (outcome.error or "")
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr(jobs, "save_image", save)
    (outcome,) = restore_files(FakePipe, [task], settings)
    assert outcome.status == "done", "what a failure left would be in the way"


def test_a_failure_takes_no_file_away_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = plan_tasks([written(tmp_path / "a.png")], tmp_path / "out", detail_map=True)
    old = LoadedImage(torch.zeros(3, 2, 2))
    written(task.targets[0], old)
    save = jobs.save_image

    def full(image: LoadedImage, target: Path, **options: Any) -> None:
        if target in task.detail_maps:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        save(image, target, **options)

    monkeypatch.setattr(jobs, "save_image", full)
    (outcome,) = restore_files(FakePipe, [task], RestoreSettings(), overwrite=True)
    assert outcome.kind == "disk"
    assert task.targets[0].exists()


@pytest.mark.parametrize(
    ("name", "scale", "expected"),
    [
        ("a.webp", 16, "WebP holds at most 16383 a side"),
        ("a.jpg", 16, "JPEG holds at most 65500 a side"),
        ("a.png", 16, None),
    ],
)
def test_a_side_that_the_format_cannot_hold_is_not_computed(
    tmp_path: Path, name: str, scale: float, expected: str | None
) -> None:
    side = 4100 if name == "a.jpg" else 1100
    source = written(tmp_path / name, LoadedImage(torch.zeros(3, 1, side)))
    pipe = FakePipe()
    (outcome,) = run_all_at(plan_tasks([source], tmp_path / "out"), pipe, scale)
    assert (outcome.error is None) == (expected is None) and len(pipe.calls) == (expected is None)
    assert expected is None or expected in (outcome.error or "")


def run_all_at(tasks: list[Task], pipe: FakePipe, scale: float) -> list[jobs.Outcome]:
    return list(restore_files(lambda: pipe, tasks, RestoreSettings(scale=scale)))


def test_names_that_cannot_be_written_are_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, out = FakePipe(), tmp_path / "out"
    long = written(tmp_path / f"{'x' * 245}.png")
    (task,) = plan_tasks([long], out, detail_map=True)
    error = next(restore_files(lambda: pipe, [task], RestoreSettings())).error or ""
    assert "File name too long; give the photo a shorter name" in error
    assert run_all(plan_tasks([long], out), pipe)[0].status == "done", "without the map it fits"
    # A link that leads nowhere is there all the same; a file is no folder; nor is all that is a folder writable.
    source = written(tmp_path / "a.png")
    (out / "a.png").symlink_to(tmp_path / "nowhere")
    assert "exists already" in (run_all(plan_tasks([source], out), pipe)[0].error or "")
    error = run_all(plan_tasks([source], long / "out"), pipe)[0].error or ""
    assert "Not a directory; one of the folders in its path is a file" in error
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    error = run_all(plan_tasks([source], tmp_path / "new" / "er"), pipe)[0].error or ""
    assert "new/er' cannot be written: Permission denied; change its permissions" in error
    assert len(pipe.calls) == 1 and not (tmp_path / "new").exists()


def test_an_output_folder_that_vanishes_costs_one_picture(tmp_path: Path) -> None:
    class Vandal(FakePipe):
        """Replaces the output folder by a file while the second picture is computed."""

        def __call__(self, image: Tensor, **options: Any) -> FakeOutput:
            if len(self.calls) == 1:
                shutil.rmtree(tmp_path / "out")
                (tmp_path / "out").touch()
            elif len(self.calls) == 2:
                (tmp_path / "out").unlink()
            return super().__call__(image, **options)

    pipe = Vandal()
    outcomes = run_all(three_tasks(tmp_path), pipe)
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "failed"]
    assert "out' cannot be made: File exists" in (outcomes[1].error or "")
    assert "out' cannot be written: Not a directory" in (outcomes[2].error or "")


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
