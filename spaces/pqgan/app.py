"""A Hugging Face Space: one picture through three autoencoders, and pictures from prompts."""

import os
from collections.abc import Iterable
from pathlib import Path

import gradio as gr
import pandas as pd
import PIL.Image
import PIL.ImageOps
import torch

from diffusers_pq import StableDiffusionPQPipeline
from diffusers_pq.autoencoders import downsampling_factor, load_autoencoder
from diffusers_pq.figures import code_map, enlarged_detail
from diffusers_pq.images import load_image
from diffusers_pq.metrics import CodebookUsage
from diffusers_pq.photographs import load_photographs
from diffusers_pq.reconstruction import PictureReconstruction, reconstruct_picture
from diffusers_pq.tables import LATENT_COLUMNS, SCORE_COLUMNS


MODEL_CARDS = Path(__file__).resolve().parents[2] / "model_cards"
# Of a picture, in pixels. At the largest the three models take some ten seconds on two cores.
MIN_SIDE, MAX_SIDE = 16, 1024
MAX_PIXELS = 50_000_000  # of an upload, which is decoded before it is shrunk
DETAIL_SIDE, DETAIL_FACTOR = 64, 6
SCORES = ("psnr", "ssim", "bits_per_pixel", "H_n", "P_n", "seconds")
COLUMNS = {name: (SCORE_COLUMNS | LATENT_COLUMNS)[name] for name in SCORES}
INTRODUCTION = """# Product-quantised image latents
A VQGAN (**VQ**) maps each latent pixel to one of the K entries of a codebook. Product quantisation (**PQ**, the
paper's PQGAN) splits it into S parts and maps each to an entry of its own codebook. **KL** has continuous latents,
like Stable Diffusion's autoencoder. The three models here are small and were trained in the same way on a CPU; they
are not the paper's."""
TABLE_NOTE = """Bits per pixel: whole bits for each code, 16 bits for each continuous value; the original has 24.
H_n, P_n: entropy and perplexity of the codes relative to their maximum, averaged over the codebooks (Eq. 3)."""

GENERATION_NOTE = """This small model was trained on 745 stamps of Tux Paint with one object each. It can generate what
their captions name, and little else."""
PROMPTS = ["A ladybug.", "A red apple.", "A frog.", "A strawberry."]


def model_source(variable: str, name: str) -> str:
    """Folder or Hub id: the environment variable's, else on a Space its owner's model, else the repository's."""
    owner = os.environ.get("SPACE_AUTHOR_NAME")
    return os.environ.get(variable) or (f"{owner}/{name}" if owner else str(MODEL_CARDS / name))


def load_pipeline(source: str) -> tuple[StableDiffusionPQPipeline | None, str]:
    """The pipeline, or `None` and why it is missing."""
    try:
        return StableDiffusionPQPipeline.from_pretrained(source, use_safetensors=True), ""
    except (OSError, TypeError, ValueError) as error:
        advice = "Set `PQSD_MODEL` to the folder or Hub repository of a `StableDiffusionPQPipeline`."
        return None, f"**Nothing can be generated: there is no pipeline at `{source}`.** {advice}\n\n{error}"


AUTOENCODERS = {
    "PQ": load_autoencoder(model_source("PQ_MODEL", "pqgan-mini-f8-pq")),
    "VQ": load_autoencoder(model_source("VQ_MODEL", "pqgan-mini-f8-vq")),
    "KL": load_autoencoder(model_source("KL_MODEL", "pqgan-mini-f8-kl")),
}
PHOTOGRAPHS = load_photographs()
FIRST = PHOTOGRAPHS["flower"]  # whose results are on the screen at the start
PIPELINE, PIPELINE_MISSING = load_pipeline(model_source("PQSD_MODEL", "pqsd-mini"))


def refusal(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


def read_upload(path: str) -> PIL.Image.Image:
    try:
        return load_image(path, MAX_PIXELS)
    except ValueError:
        raise refusal(
            "This file is not a picture, is damaged, or is far too large. Try a PNG, JPEG or WebP file."
        ) from None


def fit(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture in a size that models and machine can take; the user is told of what that means."""
    if max(picture.size) > MAX_SIDE:
        size = f"{picture.width} x {picture.height}"
        picture = PIL.ImageOps.contain(picture, (MAX_SIDE, MAX_SIDE))
        gr.Warning(f"Shrunk from {size} to {picture.width} x {picture.height} pixels, to save time.")
    if min(picture.size) < MIN_SIDE:
        raise refusal(
            f"{picture.width} x {picture.height} pixels are too few: both sides must have at least {MIN_SIDE}."
        )
    factor = max(map(downsampling_factor, AUTOENCODERS.values()))
    if picture.width % factor or picture.height % factor:
        gr.Info(
            f"{picture.width} x {picture.height} is not a multiple of {factor}: the picture is padded, encoded, "
            "decoded and cropped."
        )
    return picture


def reconstruct(picture: PIL.Image.Image, progress=gr.Progress()):  # noqa: B008 (how Gradio hands it over)
    picture = fit(picture)
    results = reconstruct_by(progress.tqdm(AUTOENCODERS.items(), unit="models"), picture)
    return picture, results, middle(picture), picture, score_table(results)


def reconstruct_by(models: Iterable[tuple[str, torch.nn.Module]], picture: PIL.Image.Image) -> dict:
    return {name: reconstruct_picture(model, picture) for name, model in models}


def middle(picture: PIL.Image.Image) -> tuple[int, int]:
    return picture.width // 2, picture.height // 2


def score_table(results: dict) -> list[list[str]]:
    return [[name, *table_row(result)] for name, result in results.items()]


def table_row(result: PictureReconstruction) -> list[str]:
    return [format(result.scores[key], spec) if key in result.scores else "-" for key, (_, spec) in COLUMNS.items()]


def compare(picture: PIL.Image.Image, results: dict, name: str):
    return picture, results[name].picture


def show_details(picture: PIL.Image.Image, results: dict, center: tuple[int, int]):
    pictures = [picture, *(result.picture for result in results.values())]
    return [enlarged_detail(picture, center, DETAIL_SIDE, DETAIL_FACTOR) for picture in pictures]


def clicked_pixel(event: gr.SelectData) -> tuple[int, int]:
    return event.index


def subspace_slider(name: str) -> gr.Slider:
    last = AUTOENCODERS[name].config.num_subspaces - 1
    # Gradio has no slider with a single value.
    return gr.Slider(0, max(last, 1), value=0, step=1, label="Subspace", visible=last > 0)


def show_codes(results: dict, name: str, subspace: int):
    model, codes = AUTOENCODERS[name], results[name].codes
    size = model.config.codebook_size
    usage = CodebookUsage(1, size)
    usage.update(codes[:, subspace : subspace + 1])
    scores, counts = usage.compute(), usage.counts[0]
    summary = (
        f"Subspace {subspace} of {model.config.num_subspaces}: {int((counts > 0).sum())} of {size} entries used, "
        f"H_n {scores['H_n']:.3f}, P_n {scores['P_n']:.3f}"
    )
    plot = pd.DataFrame(
        {"entries, most used first": range(1, size + 1), "times used": counts.sort(descending=True)[0]}
    )
    places = code_map(model.quantizer, codes, subspace)
    enlarged = PIL.ImageOps.scale(places, model.downsampling_factor, PIL.Image.Resampling.NEAREST)
    return enlarged, summary, plot


def generate(prompt: str, steps: int, guidance: float, seed: int, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
    if not prompt.strip():
        raise refusal("Describe what the picture should show.")
    tokens = PIPELINE.tokenizer.model_max_length
    if len(PIPELINE.tokenizer(prompt).input_ids) > tokens:
        gr.Warning(f"The prompt is too long: everything after {tokens - 2} tokens is ignored.")
    generator = torch.Generator().manual_seed(seed)
    return PIPELINE(prompt, num_inference_steps=steps, guidance_scale=guidance, generator=generator).images[0]


def shown_picture(label: str, **options) -> gr.Image:
    # PNG: Gradio's default is lossy.
    return gr.Image(format="png", label=label, buttons=["fullscreen", "download"], interactive=False, **options)


def reconstruction_tab():
    found = reconstruct_by(AUTOENCODERS.items(), FIRST)
    picture, results, center = gr.State(FIRST), gr.State(found), gr.State(middle(FIRST))
    first_places, first_summary, first_plot = show_codes(found, "PQ", 0)
    with gr.Row():
        upload = gr.File(file_types=["image"], label="Picture", height=160)
        examples = gr.Dataset(
            components=[gr.Image(visible=False)],
            samples=[[photograph] for photograph in PHOTOGRAPHS.values()],
            label="Or choose one of these photographs, which no model was trained on",
            type="index",
        )
    table = gr.Dataframe(
        score_table(found), headers=["model", *(label for label, _ in COLUMNS.values())], interactive=False
    )
    gr.Markdown(TABLE_NOTE)
    with gr.Row():
        original = shown_picture("Original: click for a closer look", value=FIRST)
        with gr.Column():
            slider = gr.ImageSlider(
                compare(FIRST, found, "PQ"), format="png", label="Original | reconstruction", interactive=False
            )
            compared = gr.Radio(list(AUTOENCODERS), value="PQ", label="Reconstruction by")
    with gr.Row():
        details = [
            shown_picture(f"{DETAIL_SIDE} x {DETAIL_SIDE}, {name}", value=detail)
            for name, detail in zip(("original", *AUTOENCODERS), show_details(FIRST, found, middle(FIRST)))
        ]
    with gr.Row():
        with gr.Column():
            quantized = [name for name, model in AUTOENCODERS.items() if hasattr(model, "quantizer")]
            coded = gr.Radio(quantized, value="PQ", label="Codes of")
            subspace = subspace_slider("PQ")
            summary = gr.Textbox(first_summary, label="Codebook use")
            plot = gr.LinePlot(first_plot, x="entries, most used first", y="times used", height=220)
        places = shown_picture("Code map: similar entries have similar colours", value=first_places)

    comparison = {"fn": compare, "inputs": [picture, results, compared], "outputs": slider}
    closer_look = {"fn": show_details, "inputs": [picture, results, center], "outputs": details}
    code_view = {"fn": show_codes, "inputs": [results, coded, subspace], "outputs": [places, summary, plot]}
    uploaded = upload.upload(read_upload, upload, picture)
    # The field is freed for the next picture.
    uploaded.success(lambda: None, None, upload)
    uploaded.failure(lambda: None, None, upload)
    for chosen in (uploaded, examples.click(list(PHOTOGRAPHS.values()).__getitem__, examples, picture)):
        done = chosen.success(
            reconstruct,
            picture,
            [picture, results, center, original, table],
            concurrency_id="models",
        )
        done.success(**comparison)
        done.success(**closer_look)
        done.success(**code_view)
    compared.change(**comparison)
    original.select(clicked_pixel, None, center).success(**closer_look)
    coded.change(subspace_slider, coded, subspace).success(**code_view)
    subspace.change(**code_view, trigger_mode="always_last", show_progress="hidden")


def generation_tab():
    if PIPELINE is None:
        gr.Markdown(PIPELINE_MISSING)
        return
    gr.Markdown(GENERATION_NOTE)
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", placeholder="A red apple.")
            gr.Examples(PROMPTS, prompt, label="Captions it knows")
            steps = gr.Slider(1, 100, value=25, step=1, label="Steps")
            guidance = gr.Slider(1, 15, value=PIPELINE.config.guidance_scale, step=0.5, label="Guidance scale")
            seed = gr.Slider(0, 2**31 - 1, value=0, step=1, label="Seed")
            button = gr.Button("Generate", variant="primary")
        image = shown_picture("Generated", elem_id="generated")
    inputs = [prompt, steps, guidance, seed]
    gr.on([button.click, prompt.submit], generate, inputs, image, concurrency_id="models")


# The mini model's pictures have 64 pixels a side; only their display is enlarged.
STYLE = "#generated img { min-width: 384px; min-height: 384px; object-fit: contain; }"

# Uploaded pictures are deleted after an hour.
with gr.Blocks(title="Product-quantised image latents", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
    gr.Markdown(INTRODUCTION)
    with gr.Tab("Reconstruct"):
        reconstruction_tab()
    with gr.Tab("Generate"):
        generation_tab()


if __name__ == "__main__":
    demo.queue(max_size=16).launch(theme=gr.themes.Default(), css=STYLE, share=False, max_file_size="20mb")
