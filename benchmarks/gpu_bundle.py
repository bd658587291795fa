#!/usr/bin/env python
"""Pack what `make gpu-check BARE=1` needs on a machine with torch, transformers and accelerate but without a registry.

    python -m benchmarks.gpu_bundle                                     # wheels
    python -m benchmarks.gpu_bundle --data data/emoji --side 64         # and pictures for `make gpu-train BARE=1`

Writes wheels to .whl/, which git ignores, in the versions that are installed here, and DeepSpeed's; they and the tree
are to be copied there. Pictures are packed reduced, with their captions, into .whl/data.tar.gz.
"""

import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import PIL.Image

from diffusers_pq.console import one_line_errors
from diffusers_pq.files import replacing
from diffusers_pq.flags import COUNT, FlagParser, output_folder
from diffusers_pq.images import load_image


# Not in the images that hold torch, transformers and accelerate; without what they hold, such as numpy and pyarrow.
PACKAGES = ("diffusers", "datasets", "dill", "multiprocess", "torchdata", "lpips", "torch-fidelity", "flash-kmeans")
# diffusers asks for it; newer ones no longer import as it expects.
PINNED = ("importlib-metadata<9",)
# Published as source alone, of which a wheel without compiled operators is made here, and what the images lack of what
# it needs. Version 0.19.8 is the one that was tried.
BUILT = ("deepspeed==0.19.8",)
NEEDED_BY_BUILT = ("hjson", "pydantic")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
ROOT = Path(__file__).parent.parent
MOST_BYTES = 60 * 2**20


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--python_version", default="3.12", help="of the machine that the wheels are for")
    parser.add_argument("--data", type=Path, help="imagefolder of captioned pictures to pack; by default none")
    parser.add_argument("--side", type=COUNT, default=128, help="longest side of the packed pictures, in pixels")
    parser.add_argument("--output_dir", type=output_folder, default=ROOT / ".whl", help="folder of the wheels")
    return parser.parse_args(argv)


def requirements():
    """Each package in the version that is installed here, or in any, if it is not."""
    for name in PACKAGES:
        try:
            yield f"{name}=={importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield name
    yield from PINNED


def pip_commands(folder, python_version):
    """What fetches all wheels: those published, those that they need, and those that are built."""
    pip = [sys.executable, "-m", "pip"]
    there = ["--implementation", "cp", "--python-version", python_version]
    there += [flag for platform in PLATFORMS for flag in ("--platform", platform)]
    published = [*pip, "download", "--quiet", "--only-binary", ":all:", *there, "--dest", str(folder)]
    built = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    return [*published, "--no-deps", *requirements()], [*published, *NEEDED_BY_BUILT], [*built, *BUILT]


def download(folder, python_version):
    environment = os.environ | {"DS_BUILD_OPS": "0"}
    for command in pip_commands(folder, python_version):
        if subprocess.run(command, env=environment).returncode:
            raise OSError(f"pip could not fetch the wheels: {' '.join(command)}")


def pack_pictures(data, side, path):
    """Reduced pictures and the lines of their metadata.jsonl, as an imagefolder in a tar file."""
    with replacing(path) as unfinished, tarfile.open(unfinished, "w:gz") as archive:
        for metadata in sorted(data.glob("*/metadata.jsonl")):
            lines = []
            for line in metadata.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                picture = load_image(metadata.parent / row["file_name"])
                picture.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
                row["file_name"] = str(Path(row["file_name"]).with_suffix(".webp"))
                lines.append(json.dumps(row))
                encoded = io.BytesIO()
                picture.save(encoded, "WEBP", quality=80)
                _add(archive, f"{metadata.parent.name}/{row['file_name']}", encoded.getvalue())
            _add(archive, f"{metadata.parent.name}/metadata.jsonl", "\n".join(lines).encode())


def _add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def tree_bytes():
    """Of all files that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file())


def main(args):
    if args.data is not None and not [*args.data.glob("*/metadata.jsonl")]:
        raise ValueError(f"--data {args.data} has no */metadata.jsonl: make it with `diffusers-pq prepare-data`.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for path in args.output_dir.glob("*.whl"):
        path.unlink()  # of two versions of a package none could be installed
    download(args.output_dir, args.python_version)
    if args.data is not None:
        pack_pictures(args.data, args.side, args.output_dir / "data.tar.gz")
    packed = sum(path.stat().st_size for path in args.output_dir.iterdir())
    total = packed + tree_bytes()
    print(f"{args.output_dir}: {packed / 2**20:.1f} MiB, {total / 2**20:.1f} MiB with the tree")
    if total > MOST_BYTES:
        raise ValueError(f"That is more than {MOST_BYTES / 2**20:.0f} MiB: take fewer pictures, or a lower --side.")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
