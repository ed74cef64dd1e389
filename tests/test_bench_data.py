import pytest
import torch

from proard.data import Augmenter


@pytest.mark.parametrize("shape", [{}, {"side": 8, "channels": 1}])
def test_crops_are_torchvisions_at_every_offset(shape):
    import bench_data

    bench_data.require_equal(bench_data.differing_pixels(bench_data.make_images(50, **shape)))


@pytest.mark.parametrize("fault", ["transposed", "never mirrored"])
def test_a_wrong_crop_is_noticed(fault, monkeypatch):
    import bench_data

    crop = Augmenter.crop
    wrong = {
        "transposed": lambda self, index, top, left, mirrored: crop(self, index, left, top, mirrored),
        "never mirrored": lambda self, index, top, left, mirrored: crop(self, index, top, left, mirrored & False),
    }
    monkeypatch.setattr(Augmenter, "crop", wrong[fault])
    with pytest.raises(SystemExit, match="crops at equal offsets differ"):
        bench_data.require_equal(bench_data.differing_pixels(bench_data.make_images(50)))


def test_every_row_goes_through_the_whole_epoch():
    import bench_data

    images = bench_data.make_images(70, side=8, channels=1)
    loader = bench_data.DataLoader(bench_data.Images(images.numpy()), batch_size=32)
    batch = next(iter(loader))
    assert batch.shape == (32, 1, 8, 8)
    assert batch.dtype is torch.float32
    assert batch.max() <= 1
    with bench_data.timed_calls(images, batch_size=32, workers=1) as calls:
        calls["D0"](0)
        calls["D2"](0)
    with pytest.raises(AssertionError, match="69 images of 70"):
        bench_data.require_all(69, 70)
