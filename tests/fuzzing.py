"""
Feeds damaged pictures, compressed files, models and checkpoints to what reads them.

    python tests/fuzzing.py pictures --seed 0 --count 200

prints what went wrong, by seed; [`test_fuzz.py`] runs it. Each case either works or ends with an error that
[`~diffusers_pq.console.report`] turns into a line, within seconds and within a GiB of memory.
"""

import argparse
import copy
import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import yaml
from conftest import tiny_config
from test_conversion import make_original, write

from diffusers_pq import PQModel
from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.compression import compress_picture, decompress_picture
from diffusers_pq.console import explain
from diffusers_pq.conversion import load_original_autoencoder
from diffusers_pq.data.pictures import decode_image
from diffusers_pq.images import load_image
from diffusers_pq.reconstruction import reconstruct_picture


SECONDS = 20
MEMORY = 2**30
_TOKENS = (b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x10\x00", b"{")
_VALUES = (None, -1, 0, 1, 3, 10**9, 2**40, 0.5, float("nan"), True, "", "x", [], [0], [8, "x"], {}, {"a": 1})


def mutate(data: bytes, generator: random.Random) -> bytes:
    """A few changes of single bytes, of runs and of the length, more of them near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        reach = generator.choice((32, 256, len(data)))
        place = generator.randrange(max(1, min(reach, len(data))))
        kind = generator.randrange(6)
        if kind == 0:
            data[place : place + 1] = bytes([generator.randrange(256)])
        elif kind == 1 and data:
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 2:
            token = generator.choice(_TOKENS)
            data[place : place + len(token)] = token
        elif kind == 3:
            data[place:place] = data[place : place + generator.randrange(1, 64)]
        elif kind == 4:
            del data[place : place + generator.randrange(1, 64)]
        else:
            del data[generator.randrange(max(1, len(data))) :]
    return bytes(data)


def mutate_tree(tree: dict, generator: random.Random) -> dict:
    """Another value at one or two places of nested mappings and lists, or one place less."""
    tree = copy.deepcopy(tree)
    for _ in range(generator.choice((1, 1, 2))):
        holder, key = generator.choice(list(_places(tree)) or [(tree, "x")])
        if isinstance(holder, dict) and generator.random() < 0.1:
            holder.pop(key, None)
        else:
            holder[key] = copy.deepcopy(generator.choice(_VALUES))
    return tree


def _places(tree):
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], (dict, list)) and tree[key]:
            yield from _places(tree[key])


def tiny_model() -> PQModel:
    torch.manual_seed(0)
    return PQModel(**tiny_config()).eval()


def photograph(width: int = 44, height: int = 30) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC)


def encoded_pictures() -> list[bytes]:
    """A photograph in the formats and modes that people have, with and without EXIF."""
    picture = photograph()
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    grey = picture.convert("L")
    deep = PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    kinds = [(picture, "PNG", {}), (picture.convert("RGBA"), "PNG", {}), (picture.convert("P"), "PNG", {})]
    kinds += [(picture, "JPEG", {"exif": exif}), (picture.convert("CMYK"), "JPEG", {}), (grey, "JPEG", {})]
    kinds += [(picture, "WEBP", {"exif": exif}), (picture, "GIF", {}), (picture, "BMP", {}), (picture, "PPM", {})]
    kinds += [(deep, "TIFF", {}), (picture, "TIFF", {"compression": "tiff_lzw"}), (deep, "PNG", {})]
    kinds += [(grey.convert("F"), "TIFF", {}), (picture, "ICO", {}), (picture, "TGA", {}), (picture, "JPEG2000", {})]
    files = []
    for one, format, options in kinds:
        buffer = io.BytesIO()
        one.save(buffer, format, **options)
        files.append(buffer.getvalue())
    return files


def prepare_pictures(folder: Path) -> Callable[[random.Random], object]:
    """A picture file from the command line, and a picture of a dataset."""
    originals = encoded_pictures()
    model = tiny_model()
    path = folder / "picture"

    def case(generator):
        data = mutate(generator.choice(originals), generator)
        if generator.random() < 0.5:
            return decode_image({"bytes": data, "path": None})
        path.write_bytes(data)
        picture = load_image(path)
        if picture.width * picture.height < 10_000:
            reconstruct_picture(model, picture)

    return case


def prepare_compressed(folder: Path) -> Callable[[random.Random], object]:
    """A compressed file; half of them with a checksum that holds again."""
    model = tiny_model()
    originals = [compress_picture(model, photograph(*size)) for size in ((44, 30), (8, 8), (61, 3))]

    def case(generator):
        data = mutate(generator.choice(originals), generator)
        if generator.random() < 0.7 and len(data) > 4:
            data = data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))
        return decompress_picture(model, data)

    return case


def prepare_models(folder: Path) -> Callable[[random.Random], object]:
    """A folder of `save_pretrained`, with another configuration or damaged weights."""
    tiny_model().save_pretrained(folder)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    config_path = folder / "config.json"
    config = json.loads(files[config_path])

    def case(generator):
        for path, data in files.items():
            path.write_bytes(data)
        if generator.random() < 0.6:
            config_path.write_text(json.dumps(mutate_tree(config, generator)))
        else:
            path = generator.choice(list(files))
            path.write_bytes(mutate(files[path], generator))
        return load_autoencoder(str(folder))

    return case


def prepare_checkpoints(folder: Path) -> Callable[[random.Random], object]:
    """A checkpoint of the original code, with another configuration or damaged tensors."""
    sizes = {"embed_dim": 16, "n_embed": 32}
    checkpoint, config_path = write(folder, make_original(**sizes).state_dict(), **sizes)
    original, config = checkpoint.read_bytes(), yaml.safe_load(config_path.read_text())

    def case(generator):
        checkpoint.write_bytes(original)
        config_path.write_text(yaml.safe_dump(config))
        kind = generator.random()
        if kind < 0.5:
            config_path.write_text(yaml.safe_dump(mutate_tree(config, generator)))
        elif kind < 0.6:
            config_path.write_bytes(mutate(config_path.read_bytes(), generator))
        else:
            checkpoint.write_bytes(mutate(original, generator))
        return load_original_autoencoder(checkpoint, config_path)

    return case


KINDS = {
    "pictures": prepare_pictures,
    "compressed": prepare_compressed,
    "models": prepare_models,
    "checkpoints": prepare_checkpoints,
}


class Hang(BaseException):
    """A case took too long."""


def _hang(*_):
    raise Hang


def run_case(case: Callable, seed: str) -> str | None:
    """What is wrong about a case, or `None`."""
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        case(random.Random(seed))
    except Hang:
        return f"takes more than {SECONDS} s"
    except Exception as error:
        line = explain(error)
        if line is None or line.startswith("out of memory"):
            return "".join(traceback.format_exception(error)[-4:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None if time.perf_counter() - started < SECONDS else f"takes more than {SECONDS} s"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count on")
    parser.add_argument("--count", type=int, default=200, help="cases")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _hang)
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        case = KINDS[args.kind](Path(folder))
        run_case(case, "warm up")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for seed in range(args.seed, args.seed + args.count):
            fault = run_case(case, f"{args.kind} {seed}")
            if fault is not None:
                faults += 1
                print(f"--- {args.kind}, seed {seed}\n{fault}")
    print(f"{args.count} {args.kind}, {faults} faults")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
