"""The PNG: an image of the report's figures, in both schemes, and a remedy without matplotlib."""

from __future__ import annotations

import struct

import pytest

from memrt.profiling import render_png
from memrt.profiling.render_html_style import DARK
from memrt.profiling.render_png import to_png
from tests.profiling.reports import profile
from tests.profiling.test_render_html import PICTURED


@pytest.mark.parametrize("kind", PICTURED)
def test_an_image_as_tall_as_its_figures(kind: str) -> None:
    pytest.importorskip("matplotlib")
    image = to_png(PICTURED[kind]())
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", image[16:24])
    assert width == 1200
    assert 600 < height < 3000


def test_a_dark_ground() -> None:
    pytest.importorskip("matplotlib")
    from io import BytesIO

    from matplotlib.image import imread

    corner = imread(BytesIO(to_png(profile(), dark=True)))[0, -1, :3]
    assert "#" + "".join(f"{round(float(c) * 255):02x}" for c in corner) == DARK["page"]


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_png, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "memrt\[png\]"'):
        to_png(profile())
