"""Which pictures and captions something was made of, so that it is not taken for that of others."""

import hashlib
import json
import os
from collections.abc import Iterable

import datasets
import pyarrow


# Of a large picture or file, its length and three pieces of this many bytes are read: a cache of 100 GB of photographs
# is checked in seconds. Compressed pictures differ from each other nearly everywhere.
_PIECE = 16384


def fingerprint_rows(dataset: datasets.Dataset) -> str:
    """
    A SHA-256 of a dataset's rows in their order: of their pictures' encoded bytes (of large ones the length and three
    pieces) and of all other columns. Where the files lie, what they are called and when they were written has no
    influence.

    Args:
        dataset (`datasets.Dataset`): Its pictures are undecoded, as [`~diffusers_pq.data.pictures.PictureSource`]
            leaves them.
    """
    digest = hashlib.sha256(json.dumps([len(dataset), sorted(dataset.column_names)]).encode())
    for table in dataset.with_format("arrow").iter(batch_size=100):
        for name in sorted(dataset.column_names):
            column = table.column(name)
            if not isinstance(dataset.features[name], datasets.Image):
                digest.update(json.dumps(column.to_pylist(), default=str).encode())
                continue
            for chunk in column.chunks:
                _add_pictures(digest, chunk)
    return digest.hexdigest()


def fingerprint_files(files: Iterable[str]) -> str:
    """
    A SHA-256 of files in their order, for streams, whose rows are not all at hand: of local ones as of pictures in
    [`fingerprint_rows`], of others the address, which has the commit in it on the Hub.
    """
    digest = hashlib.sha256()
    for file in files:
        _add_file(digest, file)
    return digest.hexdigest()


def _add_pictures(digest, pictures: pyarrow.StructArray):
    fields = {field.name: values for field, values in zip(pictures.type, pictures.flatten())}
    for encoded, path in zip(fields["bytes"], fields["path"].to_pylist()):
        if encoded.is_valid:
            _add_pieces(digest, encoded.as_buffer())
        else:
            _add_file(digest, path or "")


def _add_file(digest, path: str):
    if not os.path.isfile(path):
        digest.update(json.dumps(path).encode())
        return
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        for start, stop in _pieces(size):
            file.seek(start)
            digest.update(file.read(stop - start))


def _add_pieces(digest, data: pyarrow.Buffer):
    digest.update(data.size.to_bytes(8, "little"))
    for start, stop in _pieces(data.size):
        digest.update(data.slice(start, stop - start))


def _pieces(size: int) -> list[tuple[int, int]]:
    if size <= 3 * _PIECE:
        return [(0, size)]
    starts = 0, (size - _PIECE) // 2, size - _PIECE
    return [(start, start + _PIECE) for start in starts]
