"""What a sweep found: the paper's findings checked (section 4), and its figures in the paper's form (3, 5 and 6)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from spread import mean_and_spread

from diffusers_pq.evaluation.tables import RESULTS_FILE
from diffusers_pq.files import read_json, replacing
from diffusers_pq.tables import SCORE_COLUMNS, markdown_table


# score -> scale of its axis (Figures 3a and 6)
_QUALITY = {
    "rfid": "log",
    "psnr": "linear",
    "ssim": "linear",
    "cmmd": "log",
    "lpips_alex": "log",
    "lpips_vgg": "log",
    "fd_efficientnet_lite0": "log",
}
# column -> label of its axis, scale (Figures 3, 5 and 6)
_AXES = {
    "d": ("latent dimension d", "log"),
    "S": ("subspaces S", "log"),
    "K": ("codebook size K", "log"),
    **{name: (SCORE_COLUMNS[name][0], scale) for name, scale in _QUALITY.items()},
    "H_n": ("normalised entropy $H_n$", "linear"),
    "P_n": ("normalised perplexity $P_n$", "linear"),
    "seconds": ("seconds a reconstruction", "linear"),
    "overhead": ("quantisation overhead", "linear"),
}
_LATENTS = {"d": "latent_channels", "S": "num_subspaces", "K": "codebook_size", "bits_per_pixel": "bits_per_pixel"}
_TABLES = ("psnr", "psnr_pooled", "H_n")
_VQ = "1"  # the row of S = 1 in a table
_NEEDED = (_VQ, "d/4", "d/2", "d")


def read_sweep(output_dir: str | os.PathLike, evaluation: str | None = None) -> tuple[pd.DataFrame, list[dict]]:
    """
    The results of a sweep.

    Args:
        output_dir (`str` or `PathLike`): The folder of [`~experiments.sweep.Sweep`].
        evaluation (`str`, *optional*): Which one if there were several, such as `"imagenet-1k-validation-256"`.

    Returns:
        `tuple`: a table with a row for each configuration and columns `d`, `S`, `K`, `bits_per_pixel` and the scores,
        and what the evaluations wrote.

    Raises:
        ValueError: if there are no results, or those of several evaluations.
    """
    paths = list(Path(output_dir).glob(f"d*-s*-k*/evaluation/*/{evaluation or '*'}/{RESULTS_FILE}"))
    names = sorted({path.parent.name for path in paths})
    if len(names) != 1:
        found = f"those of {', '.join(names)}: choose one" if names else "none"
        raise ValueError(f"{output_dir} must hold the results of one evaluation, but holds {found}.")
    results = [read_json(path) for path in paths]
    rows = [{key: one["latents"][name] for key, name in _LATENTS.items()} | one["scores"] for one in results]
    return pd.DataFrame(rows).sort_values(["d", "S", "K"], ignore_index=True), results


def read_sweeps(output_dirs: Sequence[str | os.PathLike], evaluation: str | None = None) -> tuple[pd.DataFrame, list]:
    """As [`read_sweep`], of sweeps that differ in their seed; the column `run` numbers them."""
    sweeps = [read_sweep(folder, evaluation) for folder in output_dirs]
    rows = [rows.assign(run=number) for number, (rows, _) in enumerate(sweeps)]
    return pd.concat(rows, ignore_index=True), [result for _, results in sweeps for result in results]


def runs_of(results: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each run."""
    return [rows for _, rows in results.groupby("run")] if "run" in results else [results]


def mean_of_runs(results: pd.DataFrame) -> pd.DataFrame:
    """Means over the runs, a row for each configuration."""
    return results.drop(columns="run", errors="ignore").groupby(["d", "S", "K"], as_index=False).mean()


@dataclass(frozen=True)
class Finding:
    """
    Args:
        text (`str`): What the paper found.
        seen (`bool`): Whether these results show it, too: in every run, if there are several.
        numbers (`str`): What that is based on, means over the runs.
        seen_in (`tuple[int, int]`): In how many runs it is seen, of how many.
    """

    text: str
    seen: bool
    numbers: str
    seen_in: tuple[int, int] | None = None

    @property
    def verdict(self) -> str:
        """`yes` or `no`, if all runs agree."""
        count, runs = self.seen_in or (int(self.seen), 1)
        return {0: "no", runs: "yes"}.get(count, f"in {count} of {runs} runs")


def by_share(results: pd.DataFrame, column: str) -> pd.DataFrame:
    """Means over K, a column for each d: the row `"1"` is vector quantisation, the others hold S as a share of d."""
    product = results[results.S > 1]
    table = product.assign(divisor=product.d // product.S).pivot_table(column, index="divisor", columns="d")
    table = table.sort_index(ascending=False)
    table.index = ["d" if divisor == 1 else f"d/{divisor}" for divisor in table.index]
    vector = results[results.S == 1].pivot_table(column, index="S", columns="d").rename(index={1: _VQ})
    return pd.concat([vector, table]).sort_index(axis="columns")


def slope_per_doubling(row: pd.Series) -> float:
    """Least-squares change of the values for twice the index; NaN of fewer than two values."""
    row = row.dropna()
    if len(row) < 2:
        return float("nan")
    return float(np.polyfit(np.log2(row.index.to_numpy(float)), row, 1)[0])


def explained(results: pd.DataFrame, column: str, factor: str) -> float:
    """Share of a column's variance that lies between groups of one value of a factor (eta squared)."""
    means = results.groupby(factor)[column].transform("mean")
    return float(means.var(ddof=0) / results[column].var(ddof=0))


def judge(results: pd.DataFrame) -> list[Finding]:
    """[`check_findings`] of every run, and the numbers of their mean: a finding is seen if every run shows it."""
    runs = [check_findings(rows) for rows in runs_of(results)]
    judged = []
    for mean, *of_runs in zip(check_findings(mean_of_runs(results)), *runs):
        count = sum(bool(finding.seen) for finding in of_runs)
        judged.append(replace(mean, seen=count == len(of_runs), seen_in=(count, len(of_runs))))
    return judged


def check_findings(results: pd.DataFrame) -> list[Finding]:
    """
    The findings of sections 4.2 and 4.3 in one run, judged by PSNR, H_n and P_n.

    Args:
        results (`pd.DataFrame`): What [`read_sweep`] returns, with S = 1, d/4, d/2 and d, several d and several K.

    Raises:
        ValueError: if they are too few for that.
    """
    psnr = by_share(results, "psnr")
    missing = [share for share in _NEEDED if share not in psnr.index]
    if missing or results.d.nunique() < 2 or results.K.nunique() < 2:
        raise ValueError(
            f"Findings need S = {', '.join(_NEEDED)} at several d and K, but the {len(results)} configurations "
            f"done lack {'S = ' + ', '.join(missing) if missing else 'a second d or K'}."
        )
    slopes = psnr.apply(slope_per_doubling, axis="columns")
    whole = psnr.dropna(axis="columns").mean(axis="columns")
    if whole.isna().all():
        raise ValueError("Findings need a d and K with all values of S, but none is done yet.")
    gains = whole.diff().dropna()
    over_sizes = (results.groupby(["d", "S"]).psnr.max() - results.groupby(["d", "S"]).psnr.min()).mean()
    over_subspaces = (results.groupby(["d", "K"]).psnr.max() - results.groupby(["d", "K"]).psnr.min()).mean()
    fine = results[(results.d == results.d.max()) & (results.S >= results.d // 2) & (results.K == results.K.min())]
    best_vq = results[results.S == 1].psnr.max()
    largest = results[results.K == results.K.max()]
    entropy_largest = by_share(largest, "H_n").drop(_VQ, errors="ignore").mean(axis="columns")
    entropy = results.groupby("S").H_n.mean()
    entropy_vq = by_share(results, "H_n").loc[_VQ]
    by_size = results.assign(**{"d/S": results.d // results.S})
    shares = {factor: explained(by_size, "H_n", factor) for factor in ("S", "d", "K", "d/S")}
    perplexity = results.groupby("K").P_n.mean()
    return [
        Finding(
            "Quality grows with d under product quantisation and falls under vector quantisation (S = 1).",
            slopes[_VQ] < 0 < slopes["d/2"],
            f"dB for twice the d: {_listed(slopes, '+.2f', 'S = ')}",
        ),
        Finding(
            "Quality grows with S and saturates at d/2.",
            gains["d/2"] > 0 and gains["d"] < gains["d/2"] / 2,
            f"dB gained on the S before, d = {', '.join(map(str, psnr.dropna(axis='columns')))}: "
            f"{_listed(gains, '+.2f', 'S = ')}",
        ),
        Finding(
            "Quality depends on K only weakly.",
            over_sizes < over_subspaces / 4,
            f"PSNR differs by {over_sizes:.2f} dB between values of K, by {over_subspaces:.2f} dB between values of S",
        ),
        Finding(
            "Even with the smallest K, large d and S outperform all vector quantisation.",
            fine.psnr.min() > best_vq,
            f"d = {fine.d.max()}, S >= d/2, K = {fine.K.min()}: {fine.psnr.min():.2f} dB and more; best with S = 1: "
            f"{best_vq:.2f} dB",
        ),
        Finding(
            "H_n clusters by the subspaces and hardly depends on K.",
            max(shares["S"], shares["d/S"]) > max(shares["d"], shares["K"]) and shares["K"] < 0.1,
            f"share of the variance of H_n between groups: {_listed(shares, '.2f')}",
        ),
        Finding(
            "H_n is lowest at S = 1, where it falls with d.",
            entropy.idxmin() == 1 and slope_per_doubling(entropy_vq) < 0,
            f"mean H_n: {_listed(entropy, '.2f', 'S = ')}; at S = 1: {_listed(entropy_vq, '.2f', 'd = ')}",
        ),
        Finding(
            "P_n, unlike H_n, depends on K, and falls as it grows.",
            perplexity.is_monotonic_decreasing,
            f"mean P_n: {_listed(perplexity, '.3f', 'K = ')}",
        ),
        Finding(
            "Even with the largest K, product quantisation keeps H_n above 0.8.",
            largest[largest.S > 1].H_n.min() > 0.8,
            f"K = {results.K.max()}, mean H_n: {_listed(entropy_largest, '.2f', 'S = ')}",
        ),
    ]


def _listed(values, spec: str, prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name}: {value:{spec}}" for name, value in values.items())


def report(results: pd.DataFrame, findings: list[Finding]) -> str:
    """Markdown: the findings, and tables of PSNR, pooled PSNR and H_n with their change for twice the d."""
    lines = [(one.text, one.verdict, one.numbers) for one in findings]
    tables = [markdown_table(("finding of the paper", "seen here", "by"), lines)]
    for column in _TABLES:
        if column in results:  # what was evaluated before there was a pooled PSNR has none
            tables.append(_table_of_shares(results, column, *SCORE_COLUMNS[column]))
    return "\n\n".join(tables) + "\n"


def _table_of_shares(results, column, title, spec):
    """Means over K of each run, and of these the mean and the spread over the runs."""
    runs = [by_share(rows, column) for rows in runs_of(results)]
    dimensions = sorted({d for table in runs for d in table})
    lines = []
    for share in by_share(mean_of_runs(results), column).index:
        rows = [table.loc[share] for table in runs if share in table.index]
        cells = [mean_and_spread([row.get(d, np.nan) for row in rows], spec) for d in dimensions]
        slopes = mean_and_spread([slope_per_doubling(row) for row in rows], f"+{spec}")
        lines.append([f"S = {share}", *cells, slopes])
    return markdown_table([title, *(f"d = {d}" for d in dimensions), "for twice the d"], lines)


def draw_quality(results: pd.DataFrame, path: str | os.PathLike):
    """Figures 3a and 6: every metric there is against d (size: K), S and K (size: d); colour: S."""
    metrics = [name for name in _QUALITY if name in results]
    panels = [(x, name, "K" if x == "d" else "d") for name in metrics for x in ("d", "S", "K")]
    _draw(results, panels, path)


def draw_utilisation(results: pd.DataFrame, path: str | os.PathLike):
    """Figure 3b: H_n against S and K, and P_n against K; size: d, colour: S."""
    _draw(results, [("S", "H_n", "d"), ("K", "H_n", "d"), ("K", "P_n", "d")], path)


def draw_overhead(results: pd.DataFrame, path: str | os.PathLike):
    """Figure 5: the columns `seconds` and `overhead` against K; size: d, colour: S."""
    _draw(results, [("K", "seconds", "d"), ("K", "overhead", "d")], path)


def _draw(results: pd.DataFrame, panels: list[tuple[str, str, str]], path: str | os.PathLike):
    """Scatter plots of (x, y, size), three or fewer in a row."""
    columns = min(3, len(panels))
    rows = len(panels) // columns
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns + 1, 3.4 * rows), squeeze=False)
    colours = LogNorm(1, max(2, results.S.max()))
    # Large markers first, so that none hides another.
    results = results.sort_values(["d", "K"], ascending=False)
    for axis, (x, y, size) in zip(axes.flat, panels):
        style = {"c": results.S, "norm": colours, "alpha": 0.75, "edgecolors": "white", "linewidths": 0.5}
        axis.scatter(results[x], results[y], _area(results[size], results[size]), **style)
        (x_label, x_scale), (y_label, y_scale) = _AXES[x], _AXES[y]
        axis.set(xlabel=x_label, ylabel=y_label, xscale=x_scale, yscale=y_scale)
        axis.set_xticks(sorted(results[x].unique()), labels=sorted(results[x].unique()), fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    _add_legends(figure, results, sorted({size for *_, size in panels}), colours)
    figure.tight_layout(rect=(0, 0, 1 - 1 / figure.get_figwidth(), 1))
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=110)
    plt.close(figure)


def _area(values, known):
    """Areas of markers that grow with the logarithm, from 20 for the smallest known value to 160."""
    low, high = np.log2(known.min()), np.log2(known.max())
    return 20 + 140 * (np.log2(values) - low) / max(high - low, 1)


def _add_legends(figure, results: pd.DataFrame, sizes: list[str], colours: LogNorm):
    def marker(label, **style):
        return Line2D([], [], marker="o", linestyle="", label=label, **style)

    handles = [
        marker(f"S = {value}", color=plt.colormaps["viridis"](colours(value))) for value in sorted(results.S.unique())
    ]
    for name in sizes:
        values = np.array(sorted(results[name].unique()))
        for value, area in zip(values, _area(values, values)):
            handles.append(marker(f"{name} = {value}", color="grey", markersize=area**0.5))
    figure.legend(handles=handles, loc="center right", fontsize=8, frameon=False)
