"""Captions and classes as columns hold them."""

import random

import pytest
from datasets import Dataset

from diffusers_pq.data.conditions import ClassLabels, check_condition_column, class_names


def test_a_column_of_true_and_false_has_two_classes():
    dataset = Dataset.from_dict({"label": [True, False]})
    names = class_names(dataset, "label")
    labels = [ClassLabels("label", names)(row, random.Random(0)) for row in dataset]
    assert names == ["0", "1"] and [label.item() for label in labels] == [1, 0]
    assert all(label.dtype.is_signed and not label.dtype.is_floating_point for label in labels)


@pytest.mark.parametrize("content", [None, b"caf\xe9"])
def test_a_file_of_names_that_cannot_be_read_is_named_with_its_flag(content, tmp_path):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"`--class_names_file` {path} cannot be read"):
        class_names(Dataset.from_dict({"label": [0]}), "label", str(path))


@pytest.mark.parametrize("values", [["a"], [["a", "b"], None], [1], [True], [None], [[]]], ids=str)
def test_captions_and_classes_can_be_kept_beside_codes(values):
    check_condition_column(Dataset.from_dict({"text": values}), "text")


@pytest.mark.parametrize("values", [[0.5], [{"en": "a"}], [[{"en": "a"}]], [[0.5]]], ids=str)
def test_other_columns_cannot(values):
    with pytest.raises(ValueError, match="The column 'text' must hold captions .* or classes"):
        check_condition_column(Dataset.from_dict({"text": values}), "text")
