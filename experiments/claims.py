"""The paper's claims, and which of them this repository's measurements show."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
from sweep_report import judge, runs_of

from diffusers_pq.tables import markdown_table


# How the codebooks of a sweep start: its name -> in words.
STARTS = {"sweep_normal": "N(0, 1), as in the paper", "sweep_kmeans": "k-means"}
TIE = 0.1  # dB: bottlenecks that are closer count as equal
SPEED_TOLERANCE = 0.1  # of a ratio of times, of which one step was timed


@dataclass(frozen=True)
class Claim:
    """
    Args:
        where (`str`): Section or table of the paper.
        text (`str`): What the paper says.
        verdict (`str`): Whether it is seen here.
        numbers (`str`): What that is based on.
        basis (`str`): How much was measured, which says how far to trust it.
    """

    where: str
    text: str
    verdict: str
    numbers: str
    basis: str


def _yes(seen: bool) -> str:
    return "yes" if seen else "no"


def claims(records: Mapping) -> list[Claim]:
    """Claims beside the findings on d, S and K, judged by the contents of the JSON files, which are given by name."""
    return [
        Claim("Tables 1, 2", "PQGAN reaches 37.4 dB and rFID 0.036 on ImageNet.", "not tested", "-", "needs GPUs"),
        reconstruction(records["photographs"]),
        equal_rate(records["quantizer_comparison"]),
        overhead(records["quantisation_overhead"]),
        *speed(records["generation_speed"]),
        head_start(records["adaptation"]),
        from_scratch(records["latent_diffusion"]),
        index_tasks(records["masked_generation"]),
        codec(records["rate_distortion"]),
    ]


def reconstruction(record) -> Claim:
    results = record["results"]
    psnr = {name: row["psnr"] for name, row in results.items()}
    rates = [f"{name} {row['psnr']:.1f} dB at {row['bits_per_pixel']:.2g} bpp" for name, row in results.items()]
    return Claim(
        "4.4",
        "PQ latents reconstruct better than VQ latents and continuous (KL) latents.",
        _yes(psnr["PQ"] > max(psnr["VQ"], psnr["KL"])),
        f"mini models: {', '.join(rates)}",
        f"one training each, {len(results['PQ']['psnr_per_picture'])} photographs; rates differ",
    )


def equal_rate(results) -> Claim:
    bits = next(result["latents"]["bits_per_pixel"] for result in results if result["name"] == "pq")
    equal = [result for result in results if result["latents"]["bits_per_pixel"] == bits]
    rows = pd.DataFrame(
        {"name": one["name"], "seed": one["settings"]["seed"], **one["photographs"]["scores"]} for one in equal
    )
    table = rows.pivot_table("psnr", index="seed", columns="name")
    lead = (-table.drop(columns="pq").sub(table.pq, axis="index")).min()
    not_behind = list(lead.index[lead < TIE])
    means = table.mean().sort_values(ascending=False)
    return Claim(
        "4.4",
        f"PQ reconstructs better than other bottlenecks of the same rate ({bits:g} bits per pixel).",
        f"yes, except for {_listed(not_behind)}" if not_behind else "yes",
        _listed(f"{name} {value:.2f}" for name, value in means.items()) + " dB",
        _runs(len(table)),
    )


def overhead(record) -> Claim:
    rows = pd.DataFrame(record["configurations"])
    by_subspaces = rows.groupby(["d", "K"]).quantisation.agg(lambda times: times.max() / times.min()).median()
    by_size = rows.groupby(["d", "S"]).quantisation.agg(lambda times: times.max() / times.min()).median()
    return Claim(
        "Figure 5",
        "The time of quantisation grows with S and hardly with K; 50% overhead at d = 128, S = 64.",
        _yes(by_subspaces > by_size),
        f"largest over smallest time: {by_subspaces:.1f} over S, {by_size:.0f} over K; overhead up to "
        f"{rows.overhead.max():.1%}",
        f"{len(rows)} configurations on a CPU, where the paper has an A100",
    )


def speed(record) -> list[Claim]:
    systems = record["systems"]
    quick, double = systems["PQSD-Quick"], systems["PQSD-HR"]
    basis = f"random weights, {record['machine'].split(',')[0].upper()}, one timed step"
    return [
        Claim(
            "Table 3",
            "PQSD-Quick generates about four times as fast as Stable Diffusion 2.1.",
            _yes(quick["speed_ratio"] > (1 - SPEED_TOLERANCE) * quick["paper_ratio"]),
            f"{quick['speed_ratio']:.2f} times (paper: {quick['paper_ratio']:.2f})",
            basis,
        ),
        Claim(
            "Table 3",
            "PQSD-HR doubles the resolution at no additional cost.",
            f"{_yes(abs(double['speed_ratio'] - double['paper_ratio']) < SPEED_TOLERANCE)} (time)",
            f"{double['speed_ratio']:.2f} times the speed of SD 2.1 (paper: {double['paper_ratio']:.2f}), "
            f"{double['peak_gib']:.1f} against {systems['SD 2.1']['peak_gib']:.1f} GiB",
            basis,
        ),
    ]


def head_start(record) -> Claim:
    lowest = {
        name: min(record["runs"][name]["validation/loss"], key=lambda entry: entry[1]) for name in ("copy", "random")
    }
    listed = {"copy": "adapted", "random": "from scratch"}
    return Claim(
        "3.2, 4.5",
        "A pretrained diffusion model adapts efficiently to PQ latents.",
        _yes(lowest["copy"][1] < lowest["random"][1]),
        "lowest held-out loss: "
        + ", ".join(f"{listed[name]} {loss:.3f} at step {step:,}" for name, (step, loss) in lowest.items()),
        "one run each, of a small source model",
    )


def from_scratch(record) -> Claim:
    distances = {name: record["runs"][name]["frechet_distances"]["samples"] for name in ("PQ", "KL")}
    ahead = sum(distances["PQ"][space] < distances["KL"][space] for space in distances["KL"])
    return Claim(
        "Table 5",
        "Latent diffusion from scratch generates better on PQ latents than on KL latents.",
        _yes(2 * ahead > len(distances["KL"])),
        f"PQ samples are closer to the data in {ahead} of {len(distances['KL'])} feature spaces",
        f"one run each, {record['settings']['num_samples']} samples, no FID",
    )


def index_tasks(record) -> Claim:
    runs = [run for run in record["runs"] if run["system"] == "masked-pq"]
    bits = {name: statistics.mean(run["bits_per_code"][name] for run in runs) for name in runs[0]["bits_per_code"]}
    return Claim(
        "5",
        "PQ latents cannot be used directly for index-based tasks.",
        _yes(bits["masked"] >= min(bits["adaptive"], bits["uniform"])),
        f"a masked transformer takes {bits['masked']:.2f} bits per code of held-out pictures, an adaptive coder "
        f"{bits['adaptive']:.2f}, a uniform guess {bits['uniform']:g}",
        f"{_runs(len(runs))}, {runs[0]['settings']['max_train_steps']} steps; samples are in masked_generation.md",
    )


def codec(record) -> Claim:
    model = record["models"]["model_cards/pqgan-mini-f8-pq"]
    jpeg = min(
        (row for row in record["codecs"]["JPEG"] if row["psnr"] >= model["psnr"]),
        key=lambda row: row["bits_per_pixel"],
    )
    return Claim(
        "1, 5",
        "PQ latents do not suit compression.",
        _yes(jpeg["bits_per_pixel"] < model["bits_per_pixel"]),
        f"{model['psnr']:.1f} dB at {model['bits_per_pixel']:.2f} bpp; JPEG: {jpeg['psnr']:.1f} dB at "
        f"{jpeg['bits_per_pixel']:.2f} bpp",
        f"{len(model['photographs'])} photographs",
    )


def _listed(names) -> str:
    return ", ".join(names).replace("_", "-")


def _runs(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def claims_table(records: Mapping) -> str:
    lines = [(one.where, one.text, one.verdict, one.numbers, one.basis) for one in claims(records)]
    return markdown_table(("paper", "claim", "seen here", "numbers", "basis"), lines)


def _sweeps(records: Mapping) -> dict[str, pd.DataFrame]:
    return {label: pd.DataFrame(records[name]["configurations"]) for name, label in STARTS.items()}


def _basis(sweeps: Mapping[str, pd.DataFrame]) -> str:
    return (
        f"{sum(map(len, sweeps.values()))} small models, {_runs(min(len(runs_of(rows)) for rows in sweeps.values()))}"
    )


def findings_table(records: Mapping) -> str:
    """The findings on d, S and K: a verdict for each start of the codebooks."""
    sweeps = _sweeps(records)
    judged = [judge(rows) for rows in sweeps.values()]
    lines = [(same[0].text, *(finding.verdict for finding in same)) for same in zip(*judged)]
    head = ("finding", *(f"seen, codebooks from {label}" for label in sweeps))
    return f"{_basis(sweeps)} for each start:\n\n{markdown_table(head, lines)}"


def findings_in_short(records: Mapping) -> str:
    sweeps = _sweeps(records)
    counts = []
    for label, rows in sweeps.items():
        judged = judge(rows)
        counts.append(f"{sum(one.seen for one in judged)} of {len(judged)} with codebooks that start from {label}")
    return f"Findings on d, S and K that are seen here ({_basis(sweeps)}): {'; '.join(counts)}."
