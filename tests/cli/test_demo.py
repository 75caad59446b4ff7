"""The demo, with a tiny model in place of the embedded one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from latentindigo.images import load_image, read_metadata


def test_the_demo_writes_every_photo_and_the_sheet(root: Path, tiny_model: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("demo", root / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    sheet = demo.restore_photos(tmp_path / "out", str(tiny_model))
    photos = {path.stem for path in demo.PHOTOS.iterdir()}
    assert len(photos) >= 4
    assert {path.stem for path in (tmp_path / "out").iterdir()} == photos | {"comparison"}
    assert load_image(tmp_path / "out" / "astronaut.png").size == (512, 512)
    assert read_metadata(tmp_path / "out" / "astronaut.png")
    assert load_image(sheet).size[0] > 4 * 400
