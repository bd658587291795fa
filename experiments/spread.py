"""Means and spreads over runs that differ in their seed alone."""

import math
import statistics
from collections.abc import Sequence


def mean_and_spread(values: Sequence[float], spec: str) -> str:
    """`mean ± standard deviation` of the values of several runs; the value of a single one; `-` of none or NaN."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    mean = format(statistics.mean(known), spec)
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):{spec.lstrip('+')}}"
