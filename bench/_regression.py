"""A straight line through measurements, with a confidence interval of its slope; a row of blocks as a plot."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Slope:
    """The slope of a least-squares line and its 95 % interval, in units of y for one of x."""

    value: float
    low: float
    high: float

    @property
    def grows(self) -> bool:
        """The whole interval is above zero."""
        return self.low > 0.0


def slope(xs: Sequence[float], ys: Sequence[float], block: int = 1) -> Slope:
    """Fit y = a + b x to the means of `block` neighbours: single measurements that drift together would pretend to
    more certainty than they have. Needs three blocks; a rest of fewer than `block` at the start is left out."""
    skipped = len(xs) % block
    starts = range(skipped, len(xs), block)
    mean_x = [statistics.fmean(xs[start : start + block]) for start in starts]
    mean_y = [statistics.fmean(ys[start : start + block]) for start in starts]
    freedom = len(mean_x) - 2
    if freedom < 1:
        raise ValueError(f"{len(mean_x)} blocks of {block}: a slope with an interval needs three")
    fit = statistics.linear_regression(mean_x, mean_y)
    residuals = (y - fit.intercept - fit.slope * x for x, y in zip(mean_x, mean_y, strict=True))
    centre = statistics.fmean(mean_x)
    spread = math.fsum((x - centre) ** 2 for x in mean_x)
    error = math.sqrt(math.fsum(r * r for r in residuals) / freedom / spread)
    reach = t_quantile(freedom) * error
    return Slope(fit.slope, fit.slope - reach, fit.slope + reach)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for one and two degrees of freedom, for more its expansion about the
    normal quantile (Abramowitz and Stegun, 26.7.5), to 0.01 from three on."""
    p = 0.975
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = statistics.NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Means of `width` equal parts as blocks from the least to the most; a level row if all are equal."""
    size = max(1, math.ceil(len(values) / width))
    means = [statistics.fmean(values[start : start + size]) for start in range(0, len(values), size)]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[0] * len(means)
    return "".join(_BLOCKS[min(7, int((mean - low) / (high - low) * 8))] for mean in means)
