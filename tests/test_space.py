"""The Space as its users meet it: its app in a process of its own, and a headless Chromium."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from huggingface_hub import RepoCard
from packaging.requirements import Requirement
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.reconstruction import reconstruct_picture
from diffusers_pq.tables import LATENT_COLUMNS, SCORE_COLUMNS
from diffusers_pq.training.stable_diffusion import create_stable_diffusion, train_clip_tokenizer


pytest.importorskip("gradio", reason='The Space is not installed: pip install -e ".[space]"')

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "spaces" / "pqgan"
COLUMNS = SCORE_COLUMNS | LATENT_COLUMNS
# Seconds that anything may take on a busy machine.
PATIENCE = 120
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1400,2000"
).split()


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """An untrained text-to-image pipeline for pictures of 64 x 64 pixels."""
    unet = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    text_encoder = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vae = load_autoencoder(str(ROOT / "model_cards" / "pqgan-mini-f8-pq"))
    tokenizer = train_clip_tokenizer(["a red apple"], 514, 16)
    folder = tmp_path_factory.mktemp("pipeline")
    create_stable_diffusion(vae, tokenizer, unet, text_encoder, "epsilon").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def space(pipeline_folder, tmp_path_factory):
    """Address and log of the running app."""
    folder = tmp_path_factory.mktemp("space")
    settings = {"PQSD_MODEL": pipeline_folder, "GRADIO_TEMP_DIR": folder / "uploads", "PYTHONUNBUFFERED": "1"}
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=SPACE, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        started = WebDriverWait(log, PATIENCE).until(lambda log: re.search("URL: *(http\\S+)", log.read_text()))
        yield started[1], log
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        reason = "No chromium and chromedriver on this machine: apt-get install chromium chromium-driver"
        pytest.fail(reason) if "CI" in os.environ else pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in [*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


class Page:
    """What a user does and sees."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, look):
        # Elements are replaced while the page is drawn.
        patient = WebDriverWait(self.browser, PATIENCE, ignored_exceptions=[StaleElementReferenceException])
        return patient.until(lambda _: look())

    def upload(self, path):
        self.wait(lambda: self.all("input[type=file]"))[0].send_keys(str(path))

    def click(self, selector, text):
        def find():
            return [element for element in self.all(selector) if element.is_displayed() and element.text == text]

        self.wait(find)[0].click()

    def messages(self):
        return " ".join(element.text for element in self.all(".toast-body"))

    def wait_for_message(self, text):
        self.wait(lambda: text in self.messages())

    def table(self):
        rows = [row.text.split("\n") for row in self.all("[role=row]")]
        return {name: cells for name, *cells in rows if name in ("PQ", "VQ", "KL")}

    def picture_sizes(self, label):
        """Of the loaded pictures in the component with this label, in pixels."""
        blocks = [block for block in self.all(".block") if label in block.text]
        images = [image for block in blocks for image in block.find_elements(By.TAG_NAME, "img")]
        sizes = [(image.get_property("naturalWidth"), image.get_property("naturalHeight")) for image in images]
        return [size for size in sizes if all(size)]

    def codebook_use(self):
        values = [element.get_attribute("value") or "" for element in self.all("textarea")]
        return next((value for value in values if "entries used" in value), "")


@pytest.fixture
def page(chromium, space):
    return Page(chromium, space[0])


@pytest.fixture
def picture(tmp_path):
    """A file of 101 x 80 pixels, and what is in it."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    content = PIL.Image.fromarray(pixels).resize((101, 80), PIL.Image.Resampling.BICUBIC)
    content.save(tmp_path / "picture.png")
    return tmp_path / "picture.png", content


def assert_no_trace(space):
    # Whatever an event raises passes through Gradio's queue. (A browser that leaves in haste causes other traces.)
    assert "queueing.py" not in space[1].read_text()


def test_the_page_opens_with_a_result(page):
    page.wait(lambda: len(page.table()) == 3)
    page.wait(lambda: page.picture_sizes("Original | reconstruction") == [(640, 427)] * 2)
    page.wait(lambda: page.picture_sizes("64 x 64, KL") == [(384, 384)])
    assert page.codebook_use().startswith("Subspace 0 of 32")


def test_every_view_has_a_value_before_anything_is_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("PQSD_MODEL", str(tmp_path / "absent"))
    components = runpy.run_path(str(SPACE / "app.py"))["demo"].config["components"]
    views = [one for one in components if one["type"] in ("image", "imageslider", "dataframe")]
    shown = [one for one in views if one["props"]["visible"]]
    assert len(shown) == 8 and all(one["props"]["value"] for one in shown)


def test_an_upload_is_reconstructed_and_measured(page, picture):
    path, content = picture
    page.wait(lambda: len(page.table()) == 3)
    before = page.table()
    page.upload(path)
    page.wait_for_message("101 x 80 is not a multiple of 8")
    table = page.wait(lambda: len(page.table()) == 3 and page.table() != before and page.table())
    for name, cells in table.items():
        scores = reconstruct_picture(
            load_autoencoder(str(ROOT / "model_cards" / f"pqgan-mini-f8-{name.lower()}")), content
        ).scores
        expected = [format(scores[key], COLUMNS[key][1]) for key in ("psnr", "ssim", "bits_per_pixel")]
        assert cells[:3] == expected, name
    page.wait(lambda: page.picture_sizes("Original | reconstruction") == [(101, 80)] * 2)
    page.wait(lambda: page.picture_sizes("64 x 64, KL") == [(384, 384)])
    page.wait(lambda: page.picture_sizes("Code map") == [(104, 80)])


def test_codes_of_a_chosen_subspace_and_model(page, picture):
    page.upload(picture[0])
    page.wait(lambda: page.codebook_use().startswith("Subspace 0 of 32"))
    number = page.all("input[type=number]")[0]
    number.clear()
    number.send_keys("7\n")
    page.wait(lambda: page.codebook_use().startswith("Subspace 7 of 32"))
    page.all("input[type=radio][value=VQ]")[-1].click()
    page.wait(lambda: re.match(r"Subspace 0 of 1: \d+ of 1024 entries used, H_n 0\.\d+", page.codebook_use()))


def test_a_photograph_is_taken_by_a_click(page):
    page.wait(lambda: len(page.picture_sizes("Or choose one of these photographs")) == 6)
    page.all("button.gallery-item")[1].click()
    page.wait(lambda: (451, 300) in page.picture_sizes("Original: click"))


def test_wrong_files_give_a_message_and_leave_the_field_free(page, picture, space, tmp_path):
    path, content = picture
    page.wait(lambda: len(page.table()) == 3)
    before = page.table()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:2000])
    (tmp_path / "document.txt").write_text("not a picture")
    content.resize((5, 9)).save(tmp_path / "tiny.png")
    PIL.Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    for name, message in [
        ("text.png", "This file is not a picture"),
        ("cut.png", "This file is not a picture"),
        ("bomb.png", "far too large"),
        ("tiny.png", "5 x 9 pixels are too few"),
        ("document.txt", "Invalid file type"),
    ]:
        page.upload(tmp_path / name)
        page.wait_for_message(message)
        for close in page.all(".toast-close"):
            close.click()
        page.wait(lambda: not page.messages())
    assert page.table() == before
    page.upload(path)
    page.wait(lambda: len(page.table()) == 3 and page.table() != before)
    assert_no_trace(space)


def test_a_large_picture_is_shrunk_and_the_user_told(page, picture, tmp_path):
    picture[1].resize((1500, 90)).save(tmp_path / "large.jpg")
    page.upload(tmp_path / "large.jpg")
    page.wait_for_message("Shrunk from 1500 x 90 to 1024 x 61 pixels")
    page.wait(lambda: (1024, 61) in page.picture_sizes("Original: click"))


def test_generates_from_a_prompt(page, space):
    page.click("button[role=tab]", "Generate")
    page.click("button.primary", "Generate")
    page.wait_for_message("Describe what the picture should show")
    prompt = next(field for field in page.all("textarea") if field.is_displayed())
    prompt.send_keys("a red apple " * 10)
    page.click("button.primary", "Generate")
    page.wait_for_message("everything after 14 tokens is ignored")
    page.wait(lambda: (64, 64) in page.picture_sizes("Generated"))
    assert_no_trace(space)


def test_nothing_is_fetched_from_elsewhere(page, space):
    page.wait(lambda: page.all("input[type=file]"))
    fetched = page.browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert fetched and all(name.startswith((space[0], "data:")) for name in fetched)


def test_without_a_pipeline_the_tab_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PQSD_MODEL", str(tmp_path / "absent"))
    components = runpy.run_path(str(SPACE / "app.py"))["demo"].config["components"]
    texts = [component["props"].get("value") for component in components if component["type"] == "markdown"]
    assert any(f"there is no pipeline at `{tmp_path / 'absent'}`" in text for text in texts)
    assert all(component["props"].get("label") != "Prompt" for component in components)


def test_a_space_takes_the_models_of_its_owner(monkeypatch):
    model_source = runpy.run_path(str(SPACE / "app.py"))["model_source"]
    monkeypatch.setenv("SPACE_AUTHOR_NAME", "somebody")
    assert model_source("PQ_MODEL", "pqgan-mini-f8-pq") == "somebody/pqgan-mini-f8-pq"
    monkeypatch.setenv("PQ_MODEL", "another/model")
    assert model_source("PQ_MODEL", "pqgan-mini-f8-pq") == "another/model"


def test_the_card_names_the_app_and_a_version_that_is_required():
    card = RepoCard.load(SPACE / "README.md", ignore_metadata_errors=False).data.to_dict()
    requirements = map(Requirement, (SPACE / "requirements.txt").read_text().split("\n")[:-1])
    gradio = next(requirement for requirement in requirements if requirement.name == "gradio")
    assert card["sdk"] == "gradio" and (SPACE / card["app_file"]).is_file()
    assert card["sdk_version"] in gradio.specifier
    assert {model.split("/")[1] for model in card["models"]} == {
        "pqgan-mini-f8-pq",
        "pqgan-mini-f8-vq",
        "pqgan-mini-f8-kl",
        "pqsd-mini",
    }
