"""The handwritten digits, as the experiment reads them."""

import numpy as np

from experiments.digits import data


def test_every_digit_is_in_exactly_one_split():
    from sklearn.datasets import load_digits

    train, test = data.load()
    assert train.pixels.shape == (1397, 1024, 1)
    assert test.pixels.shape == (400, 1024, 1)
    labels = np.concatenate([train.labels, test.labels])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(load_digits().target))
    assert np.bincount(test.labels).min() >= 38
    assert np.bincount(test.labels).max() <= 41


def test_no_test_image_is_a_training_image():
    train, test = data.load()
    seen = {image.tobytes() for image in train.pixels}
    assert not [image for image in test.pixels if image.tobytes() in seen]


def test_training_pixels_are_standardised_and_splits_repeat():
    train, test = data.load()
    assert train.pixels.dtype == np.float32
    np.testing.assert_allclose([train.pixels.mean(), train.pixels.std()], [0, 1], atol=1e-5)
    again = data.load()
    np.testing.assert_array_equal(test.pixels, again[1].pixels)


def test_upsampling_is_bilinear():
    import jax

    images = np.random.default_rng(0).random((2, 8, 8), np.float32)
    # Measured difference 1.2e-7: the order of the additions.
    np.testing.assert_allclose(data.upsample(images, 32), jax.image.resize(images, (2, 32, 32), "linear"), atol=1e-6)


def test_batches_visit_each_row_at_most_once():
    split = data.Split(np.zeros((10, 1024, 1)), np.arange(10))
    seen = [batch.labels for batch in data.batches(split, 4, 2, np.random.default_rng(0))]
    assert [len(labels) for labels in seen] == [4, 4]
    assert len(set(np.concatenate(seen))) == 8


def test_batches_pair_images_with_their_labels():
    split = data.Split(np.tile(np.arange(10.0)[:, None, None], (1, 1024, 1)), np.arange(10))
    for pixels, labels in data.batches(split, 5, 2, np.random.default_rng(0)):
        np.testing.assert_array_equal(pixels[:, 0, 0], labels)


def test_shifts_move_down_and_right_and_repeat_the_edge():
    image = np.arange(32.0 * 32).reshape(1, 1024, 1)
    pixels = np.concatenate([image, image])
    first, second = data.shifted(pixels, np.array([[0, 2], [0, -1]])).reshape(2, 32, 32)
    square = image.reshape(32, 32)
    np.testing.assert_array_equal(first, square)
    np.testing.assert_array_equal(second[2:, :-1], square[:-2, 1:])
    np.testing.assert_array_equal(second[0], second[2])
    np.testing.assert_array_equal(second[:, -1], second[:, -2])
