"""Classes by number or name, for pipelines that are told a class."""

from collections.abc import Sequence


def class_label(text: str) -> int | str:
    """A class's number, or its name."""
    return int(text) if text.isdecimal() else text


class ClassLabelsMixin:
    """
    Reads the `class_labels` of a pipeline with `num_classes` and, in its config, `id2label`: the classes' names.
    Names with commas, as ImageNet's, are lists of synonyms.
    """

    def _register_labels(self, id2label: dict[int, str] | dict[str, str] | None):
        # JSON makes strings of the numbers, and sorts them so.
        names = dict(sorted((int(label), name) for label, name in (id2label or {}).items()))
        self.register_to_config(id2label=names or None)
        classes = self.num_classes
        if names and sorted(names) != list(range(classes)):
            raise ValueError(
                f"`id2label` names {len(names)} classes, but the denoiser has {classes}: 0 ... {classes - 1}."
            )
        self.labels = labels_by_name(names)

    def get_label_ids(self, class_labels: int | str | Sequence[int | str]) -> list[int]:
        r"""
        The numbers of classes that are given by number or name.

        Raises:
            ValueError: if there is no such class, or several have the name.
        """
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: int | str) -> int:
        if isinstance(label, str):
            found = self.labels.get(label, [])
            if len(found) > 1:
                raise ValueError(f"`class_labels`: {label!r} is a name of the classes {found}; give the number.")
            if not found:
                known = ", ".join(list(self.labels)[:10]) or "none, since there is no `id2label`"
                raise ValueError(f"`class_labels`: unknown class {label!r}; known names are {known}, ...")
            return found[0]
        if not 0 <= int(label) < self.num_classes:
            raise ValueError(f"`class_labels` must be in 0 ... {self.num_classes - 1}, but one is {int(label)}.")
        return int(label)


def labels_by_name(names: dict[int, str]) -> dict[str, list[int]]:
    """Classes by their whole names and by each of their synonyms; the former come first."""
    whole, synonyms = {}, {}
    for label, name in names.items():
        whole.setdefault(name, []).append(label)
        for synonym in dict.fromkeys(map(str.strip, name.split(","))):
            synonyms.setdefault(synonym, []).append(label)
    return synonyms | whole
