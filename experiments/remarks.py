"""
What the pages say in words about results: sentences whose numbers, and whose verdicts where they have one, follow from
the JSON files. Each function takes the contents of all files by their names.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd
from spread import mean_and_spread
from sweep_report import by_share, mean_of_runs, runs_of, slope_per_doubling

from diffusers_pq.files import read_json


ROOT = Path(__file__).parent.parent
COLLAPSED = 0.01  # H_n of a codebook of which hardly more than one entry is used
EARLIER_START = "pca"  # of an earlier version, which also split pictures by their file names
EARLIER = (
    f"**Measured with the earlier start `{EARLIER_START}`**, which distributes large and small components evenly over "
    "the subspaces and so favours product quantisation"
)


def mini_rates(records: Mapping) -> str:
    results = records["photographs"]["results"]
    return listed(f"{name} {row['bits_per_pixel']:.2g}" for name, row in results.items())


def channel_spread(records: Mapping) -> str:
    deviations = read_json(ROOT / "model_cards" / "pqsd-mini" / "vae" / "config.json")["latents_std"]
    return f"from {min(deviations):.1g} to {max(deviations):.2g}"


def sweep_doubling(records: Mapping) -> str:
    normal, kmeans = (
        [_over_runs(rows, lambda psnr, share=share: slope_per_doubling(psnr.loc[share])) for share in ("d/2", "1")]
        for rows in _sweeps(records)
    )
    return (
        f"twice the d changes PSNR by {normal[0]} dB at S = d/2 and by {normal[1]} dB at S = 1; with codebooks "
        f"initialised by k-means, by {kmeans[0]} and {kmeans[1]} dB"
    )


def sweep_saturation(records: Mapping) -> str:
    normal, kmeans = (
        [_over_runs(rows, lambda psnr, share=share: _gains(psnr)[share]) for share in ("d/2", "d")]
        for rows in _sweeps(records)
    )
    return (
        f"PSNR changes by {normal[0]} dB from S = d/4 to d/2 and by {normal[1]} dB from d/2 to d (from k-means: "
        f"{kmeans[0]} and {kmeans[1]} dB)"
    )


def sweep_sizes(records: Mapping) -> str:
    rows, _ = _sweeps(records)
    by_size, by_subspaces = (
        mean_and_spread([_range(run, factor) for run in runs_of(rows)], ".2f") for factor in ("K", "S")
    )
    sizes = sorted(rows.K.unique())
    return (
        f"K = {sizes[0]} to {sizes[-1]} differ by {by_size} dB, the worst and the best S by {by_subspaces} dB, means "
        "over the other numbers"
    )


def without_quantisation(records: Mapping) -> str:
    psnr = _comparison(records["quantizer_comparison"], "photographs")
    return f"{mean_and_spread(psnr.pq - psnr.none, '+.2f')} dB"


def quantiser_share(records: Mapping) -> str:
    return f"{max(row['share'] for row in records['quantizer_speed']['models']):.2%}"


def largest_overhead(records: Mapping) -> str:
    row = max(records["quantisation_overhead"]["configurations"], key=lambda row: row["overhead"])
    return f"{row['overhead']:.1%} (d = {row['d']}, S = {row['S']}, K = {row['K']})"


def jpeg_share(records: Mapping) -> str:
    model, jpeg = _mini(records), records["rate_distortion"]["codecs"]["JPEG"]
    needed = min(row["bits_per_pixel"] for row in jpeg if row["psnr"] >= model["psnr"])
    return f"{needed / model['bits_per_pixel']:.0%}"


def jpeg_rates(records: Mapping) -> str:
    rows = [row for row in records["rate_distortion"]["codecs"]["JPEG"] if row["quality"] in (80, 90)]
    return listed(f"{row['bits_per_pixel']:.1f} at quality {row['quality']}" for row in rows)


def entropy_coding(records: Mapping) -> str:
    return f"{1 - _mini(records)['bits_per_pixel'] / _mini(records)['bits_per_pixel_uncoded']:.0%}"


def fixed_frequencies(records: Mapping) -> str:
    """What adapting the frequencies of codes to each picture saves."""
    return listed(
        f"{row['bits_per_pixel']:.3g} instead of {row['bits_per_pixel_static']:.3g} bits per pixel "
        f"of `{Path(path).name}`"
        for path, row in records["rate_distortion"]["models"].items()
    )


def sweep_conditions(records: Mapping) -> str:
    """How the sweeps that are shown were made."""
    record = records["sweep_normal"]
    rows = pd.DataFrame(record["configurations"])
    runs = len(runs_of(rows))
    seeds = "One seed" if runs == 1 else f"{runs} seeds: mean ± standard deviation"
    text = f"`make sweep-mini`, {record['date']}, {record['machine']}: {len(mean_of_runs(rows))} models, evaluated on "
    text += f"{record['pictures']} held-out pictures at {record['settings']['resolution']} px. {seeds}. "
    training = record.get("training", {"weight_init": EARLIER_START})
    if training["weight_init"] == EARLIER_START:
        return text + (
            f"{EARLIER}, and on an earlier split, whose validation pictures include variants of training pictures."
        )
    return text + f"Start: `{training['weight_init']}`."


def sweep_details(records: Mapping) -> str:
    """What the table of the sweep from N(0, 1) does not show."""
    rows = pd.DataFrame(records["sweep_normal"]["configurations"])
    means = mean_of_runs(rows)
    psnr = by_share(means, "psnr")
    sizes = sorted(means.K.unique())
    worse = means.pivot_table("psnr", index=["d", "S"], columns="K")
    worse = int((worse[sizes[-1]] < worse[sizes[0]]).sum())
    slopes = means[means.S == 1].pivot_table("psnr", index="K", columns="d").apply(slope_per_doubling, axis="columns")
    product = means[means.S > 1]
    common = product.groupby("S").d.nunique().idxmax()  # of which there are the most d
    entropy, of_common = by_share(means, "H_n").loc["d/2"], product[product.S == common].groupby("d").H_n.mean()
    lines = [
        f"**From S = d/2 to d**, PSNR changes by {_by(psnr.loc['d'] - psnr.loc['d/2'], '+.2f', 'd', ' dB')}."
        + _left_out(psnr),
        f"**At S = 1**, twice the d changes PSNR by {_by(slopes, '+.2f', 'K', ' dB')}. "
        + _collapsed(rows[rows.H_n < COLLAPSED]),
        f"**K varies only by a factor of {sizes[-1] // sizes[0]} here**, in the paper by 128. K = {sizes[-1]} is "
        f"worse than K = {sizes[0]} in {worse} of {len(means.groupby(['d', 'S']))} cases.",
        f"**H_n at sub-vectors of one size**, S = d/2, is {_by(entropy, '.2f', 'd')}; at one number of subspaces, S = "
        f"{common}, it is {_by(of_common, '.2f', 'd')}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def sweep_starts(records: Mapping) -> str:
    """The sweep from k-means against that from N(0, 1)."""
    normal, kmeans = (mean_of_runs(rows) for rows in _sweeps(records))
    both = normal.merge(kmeans, on=["d", "S", "K"], suffixes=("_normal", "_kmeans"))
    gain = both.psnr_kmeans - both.psnr_normal
    vector = gain[both.S == 1]
    slopes = [slope_per_doubling(by_share(rows, "psnr").loc["1"]) for rows in (normal, kmeans)]
    psnr = by_share(kmeans, "psnr")
    lead = (psnr.loc["d/8"] - psnr.loc["1"]).dropna()
    return (
        f"Against its run from N(0, 1), each configuration changes by {gain.min():+.1f} to {gain.max():+.1f} dB, "
        f"those at S = 1 by {vector.min():+.1f} to {vector.max():+.1f} dB. {_vector_quantisation(*slopes)} Product "
        f"quantisation at S = d/8 against S = 1: {_by(lead, '+.1f', 'd', ' dB')}."
    )


def _vector_quantisation(from_normal, from_kmeans):
    numbers = f"({from_kmeans:+.2f} dB for twice the d, {from_normal:+.2f} dB from N(0, 1))"
    if from_kmeans <= 0:
        return f"**Vector quantisation does not gain with d from this start either** {numbers}."
    if from_normal >= 0:
        return f"**Vector quantisation gains with d from both starts** {numbers}."
    return (
        f"**Vector quantisation gains with d from this start** {numbers}: its fall with d is due to unused entries "
        "here, not to the latents themselves."
    )


def comparison_conditions(records: Mapping) -> str:
    settings = [result["settings"] for result in records["quantizer_comparison"]]
    seeds = {one["seed"] for one in settings}
    sure = "One seed says nothing about chance." if len(seeds) == 1 else f"{len(seeds)} seeds."
    if all(one["weight_init"] != EARLIER_START for one in settings):
        return sure
    return (
        f"{EARLIER} over scalar and finite scalar quantisation, and on an earlier split, whose validation pictures "
        f"include variants of training pictures. {sure} Differences between bottlenecks of the same rate mean little "
        "until the command has been run again."
    )


def comparison_details(records: Mapping) -> str:
    results = records["quantizer_comparison"]
    bits = {one["name"]: one["latents"]["bits_per_pixel"] for one in results}
    equal = [name for name, rate in bits.items() if rate == bits["pq"]]
    photographs, validation = (_comparison(results, part) for part in ("photographs", "validation"))
    lost = {name: mean_and_spread(photographs[name] - photographs.none, "+.2f") for name in equal}
    behind = {name: mean_and_spread(validation[name] - validation.pq, "+.2f") for name in equal if name != "pq"}
    entropy = [one["validation"]["scores"]["H_n"] for one in results if one["name"] == "vq"]
    return (
        f"- On the photographs, against no quantisation at all: {_differences(lost)}.\n"
        f"- On the validation pictures, against product quantisation: {_differences(behind)}.\n"
        f"- VQ has one in {bits['pq'] / bits['vq']:.0f} of the bits of product quantisation, with H_n = "
        f"{mean_and_spread(entropy, '.2f')}."
    )


def denoising(records: Mapping) -> str:
    """Whose pictures are the best after one denoising step, by the noise."""
    runs = records["latent_diffusion"]["runs"]
    clean = {name: run["held_out"][0]["psnr"] for name, run in runs.items()}
    levels = [level["snr"] for level in runs["PQ"]["held_out"][1:]]
    best = {}
    for number, snr in enumerate(levels, 1):
        name = max(runs, key=lambda run: runs[run]["held_out"][number]["psnr"])
        best.setdefault(name, []).append(f"{snr:.2g}")
    ahead = "; ".join(f"at an SNR of {listed(at)}, those on {name} latents" for name, at in best.items())
    lead = listed(f"{clean['PQ'] - psnr:+.1f} dB against {name}" for name, psnr in clean.items() if name != "PQ")
    return f"{ahead}. Without noise, PQ reconstructs better by {lead}"


def listed(parts: Iterable) -> str:
    """`a, b and c`."""
    *first, last = map(str, parts)
    return f"{', '.join(first)} and {last}" if first else last


def _sweeps(records) -> tuple[pd.DataFrame, pd.DataFrame]:
    """From N(0, 1) and from k-means."""
    return tuple(pd.DataFrame(records[f"sweep_{start}"]["configurations"]) for start in ("normal", "kmeans"))


def _over_runs(rows: pd.DataFrame, score: Callable[[pd.DataFrame], float]) -> str:
    return mean_and_spread([score(by_share(run, "psnr")) for run in runs_of(rows)], "+.2f")


def _gains(psnr: pd.DataFrame) -> pd.Series:
    """Of each S on the one before, means over the d that have all."""
    return psnr.dropna(axis="columns").mean(axis="columns").diff()


def _range(rows: pd.DataFrame, factor: str) -> float:
    """How much PSNR differs between the values of a factor, the others being equal."""
    groups = rows.groupby([name for name in ("d", "S", "K") if name != factor]).psnr
    return (groups.max() - groups.min()).mean()


def _left_out(psnr: pd.DataFrame) -> str:
    dimensions = [d for d in psnr if psnr[d].isna().any()]
    if not dimensions:
        return ""
    return f" The second finding leaves out d = {listed(dimensions)}, which not all shares give a number of subspaces."


def _collapsed(rows: pd.DataFrame) -> str:
    if rows.empty:
        return "No codebook collapsed."
    models = (f"d = {row.d}, S = {row.S}, K = {row.K} ({row.psnr:.1f} dB)" for row in rows.itertuples())
    return f"Of {listed(models)}, hardly more than one entry is used (H_n below {COLLAPSED})."


def _by(values: pd.Series, spec: str, name: str, unit: str = "") -> str:
    return listed(f"{value:{spec}}{unit} ({name} = {key})" for key, value in values.dropna().items())


def _comparison(results: list[dict], part: str) -> pd.DataFrame:
    """PSNR, a row for each seed and a column for each bottleneck."""
    rows = pd.DataFrame(
        {"name": one["name"], "seed": one["settings"]["seed"], "psnr": one[part]["scores"]["psnr"]} for one in results
    )
    return rows.pivot_table("psnr", index="seed", columns="name")


def _differences(values: Mapping[str, str]) -> str:
    return listed(f"{name.replace('_', '-')} {value} dB" for name, value in values.items())


def _mini(records) -> dict:
    return records["rate_distortion"]["models"]["model_cards/pqgan-mini-f8-pq"]


REMARKS = {
    function.__name__: function
    for function in (
        channel_spread,
        comparison_conditions,
        comparison_details,
        denoising,
        entropy_coding,
        fixed_frequencies,
        jpeg_rates,
        jpeg_share,
        largest_overhead,
        mini_rates,
        quantiser_share,
        sweep_conditions,
        sweep_details,
        sweep_doubling,
        sweep_saturation,
        sweep_sizes,
        sweep_starts,
        without_quantisation,
    )
}
"""Block of a page -> what renders it."""
