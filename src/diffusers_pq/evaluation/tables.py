"""Results of evaluations: their files, their table beside the paper's scores, and the head of a model card."""

import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..files import read_json, write_text
from ..tables import LATENT_COLUMNS, SCORE_COLUMNS, markdown_table
from .data import EvaluationData, protocol_of
from .systems import KNOWN


RESULTS_FILE = "results.json"

# Names of the paper's scores -> of what they are to be compared with.
_AS_IN_THE_PAPER = {"psnr": "psnr_pooled"}
# The metric types that the Hub knows.
_HUB_METRICS = {"rfid": "fid", "lpips_alex": "lpips", "lpips_vgg": "lpips"}


def model_index(result: dict) -> str:
    """The YAML lines of a model card that tell the Hub an evaluation's scores."""
    data = EvaluationData.of(result["settings"])
    hub_results = [
        EvalResult(
            task_type="image-to-image",
            task_name="Image reconstruction",
            dataset_type=data.dataset_name or "imagefolder",
            dataset_name=data.name,
            dataset_config=data.dataset_config_name,
            dataset_split=data.split,
            dataset_args={
                "resolution": data.resolution,
                "resize_mode": data.resize_mode,
                "pictures": result["pictures"],
            },
            metric_type=_HUB_METRICS.get(name, name),
            metric_name=label,
            metric_value=result["scores"][name],
        )
        for name, (label, _) in SCORE_COLUMNS.items()
        if name in result["scores"]
    ]
    return ModelCardData(model_name=result["name"], eval_results=hub_results).to_yaml()


def read_results(output_dir: str | os.PathLike) -> list[dict]:
    """The results of all evaluations in a folder, in the order of their names."""
    paths = sorted(Path(output_dir).glob(f"*/*/{RESULTS_FILE}"))
    return [read_json(path) for path in paths]


def write_table(output_dir: str | os.PathLike) -> str:
    """Write the table of all evaluations in a folder to its `results.md`, and return it."""
    table = results_table(read_results(output_dir))
    write_text(Path(output_dir, "results.md"), table)
    return table


def results_table(results: list[dict]) -> str:
    """
    Markdown: a table for each dataset with a row for each model, and what unavailable metrics want. Models with the
    name of a known system are followed by its published scores.
    """
    sections = {}
    for result in results:
        data = EvaluationData.of(result["settings"])
        side = f"{data.resolution} x {data.resolution}" + (", stretched" if data.resize_mode == "stretch" else "")
        if protocol := protocol_of(result["settings"]):
            side += f", by the protocol of the {protocol}"
        title = f"{data.name}, {data.split}, {side}, {result['pictures']} pictures"
        sections.setdefault(title, []).append(result)
    return "\n\n".join(f"### {title}\n\n{_section(rows)}" for title, rows in sections.items()) + "\n"


def _section(results: list[dict]) -> str:
    rows = [row for result in results for row in _rows(result)]
    known = (LATENT_COLUMNS | SCORE_COLUMNS).items()
    columns = {name: column for name, column in known if any(name in row for _, row in rows)}
    lines = [[title, *(_cell(row, name, spec) for name, (_, spec) in columns.items())] for title, row in rows]
    table = markdown_table(["model", *(label for label, _ in columns.values())], lines)
    wanted = {name: weights for result in results for name, weights in result["unavailable"].items()}
    notes = [f"- n/a: {SCORE_COLUMNS[name][0]} needs {weights}" for name, weights in wanted.items()]
    return "\n".join([table, *([""] if notes else []), *notes])


def _rows(result: dict) -> Iterable[tuple[str, dict]]:
    """First cells and values of a result's row and, for a known system, of the paper's."""
    yield result["name"], result["latents"] | result["scores"] | dict.fromkeys(result["unavailable"])
    system = KNOWN.get(result["name"])
    if system is not None and system.published_by is not None:
        dataset, scores = system.published_scores(EvaluationData.of(result["settings"]).name)
        title = f"*{system.published_by}'s, {dataset}*"
        yield title, {_AS_IN_THE_PAPER.get(name, name): score for name, score in scores.items()}


def _cell(row: dict, name: str, spec: str) -> str:
    if name not in row:
        return "-"
    if isinstance(row[name], str):  # as the paper prints it
        return row[name]
    return "n/a" if row[name] is None else format(row[name], spec)
