"""The handwritten digits, as the experiment reads them."""

import numpy as np

from experiments.digits import data
from experiments.digits.recipe import Digits


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


def test_training_pairs_images_with_their_labels_and_never_repeats_a_shift():
    train, _ = data.load()
    examples = Digits(shift=1).build().train
    for index in range(5):
        example = examples[index]
        places = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        rows = [
            row
            for row in np.flatnonzero(train.labels == example["labels"])
            if any(np.array_equal(data.shifted(train.pixels[row], *place), example["inputs"]) for place in places)
        ]
        assert len(rows) == 1
    drawn = {examples[epoch * len(examples)]["inputs"].tobytes() for epoch in range(8)}
    assert len(drawn) == 8


def test_training_examples_are_a_function_of_seed_and_number():
    first, again, other = (Digits(seed=seed).build().train for seed in (3, 3, 4))
    for index in (0, 5, 5 + len(first)):
        np.testing.assert_array_equal(first[index]["inputs"], again[index]["inputs"])
        assert not np.array_equal(first[index]["inputs"], other[index]["inputs"])


def test_an_epoch_has_every_image_once():
    labels = [int(example["labels"]) for example in Digits().build().train]
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(data.load()[0].labels))


def test_shifts_move_down_and_right_and_repeat_the_edge():
    pixels = np.arange(32.0 * 32).reshape(1024, 1)
    square = pixels.reshape(32, 32)
    np.testing.assert_array_equal(data.shifted(pixels, 0, 0), pixels)
    moved = data.shifted(pixels, 2, -1).reshape(32, 32)
    np.testing.assert_array_equal(moved[2:, :-1], square[:-2, 1:])
    np.testing.assert_array_equal(moved[0], moved[2])
    np.testing.assert_array_equal(moved[:, -1], moved[:, -2])
