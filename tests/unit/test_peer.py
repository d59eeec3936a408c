"""The peer's columns by hand arithmetic, and our runs at its drop."""

import io
import json

import pytest
import torch
from PIL import Image

from benchmarks.bench_peer import at_drop, enlargement, main, panel_images
from hrf_fast.evaluation.grids import save_grid
from hrf_fast.evaluation.nanoflow import bits_per_pixel, nanoflow_columns, total_variation
from hrf_fast.report.comparison import read_runs
from tests.unit.test_report import write_run


def flat(value, count=1, size=8):
    return torch.full((count, 3, size, size), value)


def checkerboard(size=8):
    index = torch.arange(size)
    return ((index[:, None] + index) % 2).float().expand(1, 3, -1, -1)


class Classifier:
    """The brightest column is the class; sure of it by 0.8."""

    name, labels = "stand-in", {"label": ["left", "right"]}

    def features(self, images):
        return images.mean((1, 2))[:, [0, -1]]

    def log_probs_of(self, features):
        return {"label": torch.where(features == features.amax(1, keepdim=True), 0.8, 0.2).log()}

    def log_probs(self, images):
        return self.log_probs_of(self.features(images))


def test_total_variation_of_flat_images_and_of_a_checkerboard():
    # all neighbours across differ by 1, and all down: 1 + 1
    assert total_variation(torch.cat([flat(0.3), checkerboard()])).tolist() == [0, 2]
    # one step of 1 among seven neighbours across, none down
    half = torch.zeros(1, 3, 8, 8)
    half[..., 4:] = 1
    assert float(total_variation(half)) == pytest.approx(1 / 7)


@pytest.mark.parametrize("options", [{"format": "JPEG", "quality": 75}, {"format": "PNG"}])
def test_bits_per_pixel_are_those_of_grey_files(options):
    expected = []
    # 0.5 is 127.5 of 255, which rounds to the even 128
    for pixels in (bytes([128] * 64), bytes([0, 255] * 4 + [255, 0] * 4) * 4):
        buffer = io.BytesIO()
        Image.frombytes("L", (8, 8), pixels).save(buffer, **options)
        expected.append(8 * buffer.tell() / 64)
    assert bits_per_pixel(torch.cat([flat(0.5), checkerboard()]), **options).tolist() == expected


def test_columns_of_images_that_are_all_alike_and_have_changed_their_class():
    left, right = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    left[..., 0], right[..., -1] = 1, 1
    pretrained = torch.cat([left, left, right, right])
    columns = nanoflow_columns(torch.cat([left] * 4), pretrained, Classifier(), seed=0)
    # three of four repeat the first; two of four are no longer "right"
    assert columns["duplicates"] == [0.75]
    assert columns["consistency"][0] == 0.5
    assert columns["confidence"] == pytest.approx([0.8, 0.8, 0.8])
    assert nanoflow_columns(pretrained, pretrained, Classifier(), seed=0)["consistency"][0] == 1


def test_without_a_classifier_there_are_no_classes():
    assert set(nanoflow_columns(flat(0.1, 2), flat(0.1, 2), seed=0)) == {
        *("jpeg_bpp", "png_bpp", "total_variation", "duplicates"),
    }


def test_a_row_is_between_the_panels_where_the_drop_is_reached():
    panels = [{"jpeg_bpp": [bits], "duplicates": [share]} for bits, share in ((10.0, 0.0), (9.0, 0.1), (7.0, 0.5))]
    # 8 bits are half of the way from 9 to 7
    columns, reached = at_drop(panels, 0.2)
    assert reached and columns["jpeg_bpp"] == [8.0] and columns["duplicates"] == pytest.approx([0.3])
    columns, reached = at_drop(panels, 0.5)
    assert not reached and columns["jpeg_bpp"] == [7.0]


def test_runs_beside_the_peers_figures(tmp_path, capsys):
    run = write_run(tmp_path / "run", "full", start=[0.0, 1.0, 2.0, 3.0])
    noise = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for i, scale in enumerate((1.0, 0.2, 0.0)):
        save_grid(noise * scale, run / "samples" / f"iteration-{i:06d}.png")
    # grids show images of 32 pixels at 64
    shown = panel_images(read_runs([run])[0], 0)
    assert enlargement(shown) == 2 and enlargement(noise) == 1
    torch.testing.assert_close(shown[..., ::2, ::2], noise, atol=0.5 / 255 + 1e-6, rtol=0)
    main([str(run), "--drop", "0.1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "peer.json").read_text())["rows"]
    assert [row.get("reached") for row in rows] == [None, True]
    assert rows[1]["columns"]["jpeg_bpp"][0] == pytest.approx(0.9 * rows[0]["columns"]["jpeg_bpp"][0])
    assert "| NanoFlow, 300 epochs | 20.3 % | 4.999 |" in capsys.readouterr().out


def test_a_drop_that_is_no_share_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--drop is 20"):
        main([str(tmp_path), "--drop", "20"])
