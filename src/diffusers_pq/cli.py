"""The console command `diffusers-pq`."""

import argparse
import sys
from pathlib import Path


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffusers-pq", description="Product-quantised image latents.")
    commands = parser.add_subparsers(dest="command", required=True)

    reconstruct = commands.add_parser("reconstruct", help="encode and decode a picture of any size")
    reconstruct.add_argument("picture", type=Path)
    reconstruct.add_argument("--model", required=True, help="folder or Hub repository of a PQModel or AutoencoderKL")
    reconstruct.add_argument("--output", type=Path, help="default: <picture>-reconstruction.png")
    reconstruct.add_argument("--device", default="cpu")
    reconstruct.set_defaults(run=_reconstruct)

    prepare = commands.add_parser("prepare-data", help="make an image dataset of Debian's wallpapers and stamps")
    prepare.add_argument("output", type=Path, help="folder to write; must not exist")
    prepare.add_argument("--source", type=Path, help="unpacked packages, one a sub-folder; default: fetch with apt")
    prepare.add_argument("--short-side", type=int, default=512)
    prepare.add_argument("--validation-share", type=float, default=0.05)
    prepare.add_argument("--tile-size", type=int, help="cut pictures into tiles of at least this side; default: whole")
    prepare.set_defaults(run=_prepare_data)

    widen = commands.add_parser("widen-unet", help="give a denoiser the latent channels of a PQModel")
    widen.add_argument("denoiser", help="model, or pipeline with --subfolder; folder or Hub repository")
    widen.add_argument("--subfolder", help='"unet" or "transformer" of a pipeline')
    widen.add_argument("--latent-channels", type=int, required=True, help="d of the PQModel")
    widen.add_argument("--init", choices=("copy", "copy_scaled", "zero"), default="copy")
    widen.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    widen.set_defaults(run=_widen_unet)
    return parser


def _reconstruct(args):
    from .images import load_image, save_image
    from .reconstruction import reconstruct_picture
    from .training.autoencoders import load_autoencoder

    picture = load_image(args.picture)
    model = load_autoencoder(args.model).to(args.device)
    result = reconstruct_picture(model, picture)
    output = args.output or args.picture.with_name(f"{args.picture.stem}-reconstruction.png")
    save_image(result.picture, output)
    print(f"{output}: " + ", ".join(f"{name} {value:.4g}" for name, value in result.scores.items()))


def _prepare_data(args):
    from .data_preparation import prepare_dataset

    counts = prepare_dataset(args.output, args.source, args.short_side, args.validation_share, args.tile_size)
    print(f"{args.output}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))


def _widen_unet(args):
    from diffusers import AutoModel

    from .models.widening import widen_denoiser

    if args.output.exists():
        raise FileExistsError(f"{args.output} exists already: choose another folder or remove it.")
    denoiser = AutoModel.from_pretrained(args.denoiser, subfolder=args.subfolder, use_safetensors=True)
    widened = widen_denoiser(denoiser, args.latent_channels, args.init)
    widened.save_pretrained(args.output)
    print(f"{args.output}: {denoiser.config.in_channels} -> {args.latent_channels} latent channels")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; expected errors are one line on stderr and exit status 1."""
    args = _build_parser().parse_args(argv)
    try:
        args.run(args)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"diffusers-pq: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
