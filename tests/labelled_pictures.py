"""A folder of pictures with classes and captions, for trainings on conditions."""

import json
from pathlib import Path

import numpy as np
import PIL.Image


COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}


def write_labelled_pictures(folder: Path):
    """Pictures of three colours: 9 to train and 3 to validate, with the columns `category`, `number` and `text`."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 9), ("validation", 3)):
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            name, colour = list(COLOURS.items())[number % 3]
            pixels = (np.array(colour) + generator.integers(0, 40, (40, 56, 3))).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / split / f"{number}.png")
            row = {"category": name, "number": number % 3, "text": f"a {name} wall"}
            lines.append(json.dumps({"file_name": f"{number}.png"} | row))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
