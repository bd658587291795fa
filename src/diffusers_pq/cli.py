"""The console command `diffusers-pq`."""

import sys
from pathlib import Path

from . import __version__
from .console import progress_on_terminals, report
from .flags import COUNT, DTYPES, SEED, FlagParser, device, number, output_folder


def _build_parser() -> FlagParser:
    parser = FlagParser(prog="diffusers-pq", description="Product-quantised image latents.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    reconstruct = commands.add_parser("reconstruct", help="encode and decode a picture of any size")
    reconstruct.add_argument("picture", type=Path, help="file to read")
    reconstruct.add_argument("--model", required=True, help="folder or Hub repository of a PQModel or AutoencoderKL")
    reconstruct.add_argument("--output", type=Path, help="file to write; default: <picture>-reconstruction.png")
    reconstruct.add_argument("--device", type=device, default="cpu", help="device to compute on, such as cuda or mps")
    reconstruct.set_defaults(run=_reconstruct)

    prepare = commands.add_parser("prepare-data", help="make a captioned image dataset of open pictures")
    prepare.add_argument("output", type=output_folder, help="folder to write; must not exist")
    prepare.add_argument(
        "--source",
        choices=("debian", "emoji"),
        default="debian",
        help="debian: wallpapers and stamps of Debian's packages; emoji: the same subjects in four styles, of npm's",
    )
    prepare.add_argument(
        "--packages-dir",
        type=Path,
        help="folder of unpacked Debian packages, or node_modules; default: fetch with apt or npm",
    )
    prepare.add_argument(
        "--short-side", type=COUNT, help="shrink pictures to it, in pixels; default: 512, emoji have a side of 256"
    )
    prepare.add_argument(
        "--validation-share",
        type=number(float, minimum=0, below=1),
        default=0.05,
        help="part of the motifs that is held back; of emoji, of the pairs of subject and style",
    )
    debian = prepare.add_argument_group("--source debian")
    debian.add_argument(
        "--tile-size", type=COUNT, help="cut pictures into tiles of at least this side; default: whole"
    )
    debian.add_argument("--packages", nargs="+", help="Debian packages to take pictures from; default: all known")
    debian.add_argument("--pad-to-square", action="store_true", help="add white margins to pictures that are not")
    debian.add_argument(
        "--split-by",
        choices=("motif", "file"),
        help="what stays on one side of the split; file: as for the models in model_cards/; default: motif",
    )
    prepare.set_defaults(run=_prepare_data)

    test_set = commands.add_parser("prepare-test-set", help="fetch the 16 test photographs that nothing is tuned on")
    test_set.add_argument("output", type=output_folder, help="folder to write; must not exist")
    test_set.add_argument(
        "--packages-dir", type=Path, help="unpacked packages, one a sub-folder; default: fetch with apt"
    )
    test_set.add_argument("--short-side", type=COUNT, default=512, help="shrink pictures to it, in pixels")
    test_set.set_defaults(run=_prepare_test_set)

    widen = commands.add_parser("widen-unet", help="give a denoiser the latent channels of a PQModel")
    widen.add_argument("denoiser", help="model, or pipeline with --subfolder; folder or Hub repository")
    widen.add_argument("--subfolder", help='folder of the denoiser in a pipeline, "unet" or "transformer"')
    widen.add_argument("--latent-channels", type=COUNT, required=True, help="latent channels d of the PQModel")
    widen.add_argument(
        "--init", choices=("copy", "copy_scaled", "zero"), default="copy", help="weights of the new channels"
    )
    widen.add_argument("--dtype", choices=DTYPES, default="float32", help="precision that is saved")
    widen.add_argument("--output", type=output_folder, required=True, help="folder to write; must not exist")
    widen.set_defaults(run=_widen_unet)

    push = commands.add_parser("push", help="check a folder with a model or a pipeline, and upload it to the Hub")
    push.add_argument("folder", type=Path, help="holds README.md, and config.json or model_index.json with weights")
    push.add_argument("repo_id", help="org/name; created if it does not exist")
    push.add_argument("--private", action="store_true", help="create the repository private")
    push.add_argument("--revision", help="branch to push to, created if it does not exist; default: main")
    push.add_argument("--token", help="token to upload with; default: HF_TOKEN or that of `hf auth login`")
    push.set_defaults(run=_push)

    code = commands.add_parser(
        "write-code", help="write the code by which diffusers loads a saved model without diffusers_pq"
    )
    code.add_argument("folder", type=Path, help="of a model or a pipeline")
    code.set_defaults(run=_write_code)

    modular = commands.add_parser(
        "save-modular", help="save a pipeline as a modular one, which diffusers loads without diffusers_pq"
    )
    modular.add_argument("pipeline", help="folder or Hub repository of a PQ pipeline of Stable Diffusion XL or 3")
    modular.add_argument("output", type=output_folder, help="folder to write; must not exist")
    modular.add_argument("--repo-id", help="org/name to which the folder will be uploaded; its index names it")
    modular.set_defaults(run=_save_modular)

    convert = commands.add_parser(
        "convert", help="make a diffusers folder of an original VQGAN, PQGAN or LDM checkpoint"
    )
    convert.add_argument(
        "checkpoint",
        help="Lightning .ckpt, torch state dict or .safetensors; org/name:FILE is one on the Hub, and the paper's "
        "authors' are CVL-Heidelberg/PQGAN:F8 and CVL-Heidelberg/PQGAN:F16",
    )
    convert.add_argument(
        "--config", help="YAML file the checkpoint was trained with; default: the checkpoint's name with .yaml"
    )
    convert.add_argument("--output", type=output_folder, required=True, help="folder to write; must not exist")
    convert.add_argument(
        "--target",
        choices=("PQModel", "VQModel", "AutoencoderKL"),
        help="class of the model; default: PQModel for a checkpoint with codebooks, else AutoencoderKL",
    )
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        convert.add_argument(
            f"--image-{name}",
            type=float,
            nargs="+",
            help=f"{what} of each colour channel, in [0, 1], by which training pictures were normalised; default: as "
            "the YAML file says, ImageNet's for the authors' checkpoints",
        )
    convert.add_argument("--revision", help="branch, tag or commit of the repository on the Hub; default: main")
    convert.add_argument(
        "--use_ema", action="store_true", help="take the moving average of the autoencoder's weights (model_ema.*)"
    )
    convert.set_defaults(run=_convert)

    compress = commands.add_parser("compress", help="write a picture of any size as entropy-coded codes")
    compress.add_argument("picture", type=Path, help="file to read")
    compress.add_argument("--model", required=True, help="folder or Hub repository of a PQModel")
    compress.add_argument("--output", type=Path, required=True, help="file to write, such as picture.pqc")
    compress.add_argument("--device", type=device, default="cpu", help="device to compute on, such as cuda or mps")
    compress.set_defaults(run=_compress)

    length = commands.add_parser(
        "code-length", help="estimate the bits per code of pictures under a masked transformer, beside compress's"
    )
    length.add_argument("pictures", type=Path, nargs="+", help="files to read")
    length.add_argument("--model", required=True, help="folder or Hub repository of a MaskedPQPipeline")
    length.add_argument("--class-label", help="name or number of the pictures' class; default: no class")
    length.add_argument("--prompt", help="text of the pictures, for a model that takes texts; default: no text")
    length.add_argument("--steps", type=COUNT, default=32, help="calls of the transformer for each picture")
    length.add_argument("--seed", type=SEED, default=0, help="seed of the order in which codes are revealed")
    length.add_argument("--device", type=device, default="cpu", help="device to compute on, such as cuda or mps")
    length.set_defaults(run=_code_length)

    decompress = commands.add_parser("decompress", help="turn a compressed file back into a picture")
    decompress.add_argument("file", type=Path, help="what compress wrote")
    decompress.add_argument("--model", required=True, help="folder or Hub repository of the same PQModel")
    decompress.add_argument("--output", type=Path, required=True, help="picture to write")
    decompress.add_argument("--device", type=device, default="cpu", help="device to compute on, such as cuda or mps")
    decompress.set_defaults(run=_decompress)
    return parser


def _reconstruct(args):
    from .autoencoders import load_autoencoder
    from .images import check_picture_output, load_image, save_image
    from .reconstruction import reconstruct_picture

    output = args.output or args.picture.with_name(f"{args.picture.stem}-reconstruction.png")
    check_picture_output(output, args.picture)
    picture = load_image(args.picture)
    model = load_autoencoder(args.model).to(args.device)
    result = reconstruct_picture(model, picture)
    save_image(result.picture, output)
    print(f"{output}: " + ", ".join(f"{name} {value:.4g}" for name, value in result.scores.items()))


def _prepare_data(args):
    prepare = _prepare_emoji if args.source == "emoji" else _prepare_debian
    counts = prepare(args)
    print(f"{args.output}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))


def _prepare_emoji(args) -> dict[str, int]:
    from .emoji import prepare_emoji

    for name in ("tile_size", "packages", "pad_to_square", "split_by"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for `--source debian` only: leave it out.")
    return prepare_emoji(args.output, args.packages_dir, args.short_side or 256, args.validation_share)


def _prepare_debian(args) -> dict[str, int]:
    from .data_preparation import PACKAGES, prepare_dataset

    return prepare_dataset(
        args.output,
        args.packages_dir,
        args.short_side or 512,
        args.validation_share,
        args.tile_size,
        args.packages or PACKAGES,
        args.pad_to_square,
        args.split_by or "motif",
    )


def _prepare_test_set(args):
    from .photographs import prepare_test_photographs

    count = prepare_test_photographs(args.output, args.packages_dir, args.short_side)
    print(f"{args.output}: {count} photographs, split test")


def _widen_unet(args):
    import torch
    from diffusers import AutoModel

    from .files import check_new, folder_or_hub
    from .models.widening import widen_denoiser

    check_new(args.output)
    options = {"subfolder": args.subfolder, "dtype": getattr(torch, args.dtype), "use_safetensors": True}
    try:
        with folder_or_hub(args.denoiser):
            denoiser = AutoModel.from_pretrained(args.denoiser, **options)
    except OSError as error:
        if args.subfolder is not None or not Path(args.denoiser, "model_index.json").is_file():
            raise
        raise OSError(
            f"{error} Of a pipeline, name the denoiser: `--subfolder unet` or `--subfolder transformer`."
        ) from error
    widened = widen_denoiser(denoiser, args.latent_channels, args.init)
    widened.save_pretrained(args.output)
    inputs = f"in_channels {denoiser.config.in_channels} -> {widened.config.in_channels}"
    print(f"{args.output}: {args.latent_channels} latent channels, {inputs}")


def _push(args):
    from .hub.push import push_folder

    print(push_folder(args.folder, args.repo_id, args.private, args.revision, args.token))


def _write_code(args):
    from .hub.code import write_code

    for path in write_code(args.folder):
        print(path)


def _save_modular(args):
    from .files import check_new, folder_or_hub
    from .hub.modular import load_pipeline, save_modular, to_modular

    check_new(args.output)
    with folder_or_hub(args.pipeline):
        pipeline = load_pipeline(args.pipeline)
    save_modular(to_modular(pipeline), args.output, args.repo_id)
    print(args.output)


def _convert(args):
    from .conversion import convert_checkpoint

    model = convert_checkpoint(
        args.checkpoint,
        args.config,
        args.output,
        args.target,
        image_mean=args.image_mean,
        image_std=args.image_std,
        revision=args.revision,
        use_ema=args.use_ema,
    )
    normalisation = ""
    if model.config.get("image_mean") is not None:
        normalisation = f", image_mean {model.config.image_mean}, image_std {model.config.image_std}"
    print(
        f"{args.output}: {type(model).__name__} of {model.num_parameters()} parameters, "
        f"scaling_factor {model.config.scaling_factor}{normalisation}"
    )


def _compress(args):
    from .autoencoders import load_autoencoder
    from .compression import compress_picture, decompress_picture
    from .files import check_output, replacing
    from .images import load_image, to_tensor, to_uint8
    from .metrics import psnr

    check_output(args.output, args.picture)
    picture = load_image(args.picture)
    model = load_autoencoder(args.model).to(args.device)
    data = compress_picture(model, picture)
    pair = (to_uint8(to_tensor(image))[None] for image in (decompress_picture(model, data), picture))
    with replacing(args.output) as unfinished:
        unfinished.write_bytes(data)
    bits = 8 * len(data) / (picture.width * picture.height)
    print(f"{args.output}: bits_per_pixel {bits:.4g}, psnr {psnr(*pair).item():.4g}")


def _code_length(args):
    from .evaluation.code_length import bits_per_code_of_files
    from .files import folder_or_hub
    from .pipelines.class_labels import class_label
    from .pipelines.pipeline_masked_pq import MaskedPQPipeline

    with folder_or_hub(args.model):
        pipeline = MaskedPQPipeline.from_pretrained(args.model, use_safetensors=True).to(args.device)
    label = None if args.class_label is None else class_label(args.class_label)
    bits = bits_per_code_of_files(pipeline, args.pictures, label, args.prompt, args.steps, args.seed)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in bits.items())
    print(f"bits per code of {len(args.pictures)} pictures: {shown}")


def _decompress(args):
    from .autoencoders import load_autoencoder
    from .compression import decompress_picture
    from .images import check_picture_output, save_image

    check_picture_output(args.output, args.file)
    if args.file.is_char_device() or args.file.is_block_device():  # /dev/zero never ends
        raise ValueError(f"{args.file} is a device: give a file that `compress` wrote.")
    data = args.file.read_bytes()
    model = load_autoencoder(args.model).to(args.device)
    save_image(decompress_picture(model, data), args.output)
    print(args.output)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; expected errors are one line on stderr and exit status 1."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    try:
        with progress_on_terminals():
            args.run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return report(error, parser.prog)
    return 0


if __name__ == "__main__":
    sys.exit(main())
