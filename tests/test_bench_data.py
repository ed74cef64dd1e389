import pytest
import torch

from proard.data import Augmenter


@pytest.mark.parametrize("shape", [{}, {"side": 8, "channels": 1}])
def test_crops_are_torchvisions_at_every_offset(shape):
    import bench_data

    bench_data.require_equal(bench_data.make_images(50, **shape))


@pytest.mark.parametrize("fault", ["transposed", "never mirrored"])
def test_a_wrong_crop_is_noticed(fault):
    import bench_data

    images = bench_data.make_images(50)
    crop = Augmenter(images, padding=bench_data.PADDING).crop
    wrong = {
        "transposed": lambda index, top, left, mirrored: crop(index, left, top, mirrored),
        "never mirrored": lambda index, top, left, mirrored: crop(index, top, left, mirrored & False),
    }
    with pytest.raises(SystemExit, match="crops at equal offsets differ"):
        bench_data.require_equal(images, crop=wrong[fault])


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
