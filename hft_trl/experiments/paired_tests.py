"""Paired tests of differences between methods, seed by seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean

from hft_trl.errors import HFTError


@dataclass(frozen=True)
class Difference:
    """
    Difference of a score between two runs, over their common seeds.

    `low` and `high` bound the mean's 95 % confidence interval, `p` is of the two-sided paired t-test; undefined values
    are `nan`. `ahead` is the number of seeds in which the first run was better.
    """

    seeds: int
    mean: float
    low: float
    high: float
    p: float
    ahead: int

    def cells(self, decimals: int) -> list[str]:
        """Return mean, interval, p-value and seeds ahead, for a table."""
        mean, low, high = (f"{value:+.{decimals}f}" for value in (self.mean, self.low, self.high))
        interval = "-" if self.low != self.low else f"{low} to {high}"
        return [mean, interval, p_value(self.p), f"{self.ahead} of {self.seeds}"]


def check_tests() -> None:
    """Reject a missing scipy before hours of training."""
    if find_spec("scipy") is None:
        raise HFTError(
            "the paired tests need scipy, which is not installed: pip install -c constraints.txt -e '.[eval]'."
        )


def paired(differences: Sequence[float], better: int = 1) -> Difference:
    """Test the differences of pairs against 0. With `better=-1` a lower value is ahead."""
    from scipy.stats import ttest_1samp

    ahead, nan = sum(difference * better > 0 for difference in differences), float("nan")
    if len(set(differences)) == 1:  # no spread to test against
        low = high = differences[0] if len(differences) > 1 else nan
        return Difference(len(differences), differences[0], low, high, nan, ahead)
    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(0.95)
    return Difference(len(differences), fmean(differences), interval.low, interval.high, test.pvalue, ahead)


def p_value(p: float) -> str:
    """Return a p-value for a table."""
    return "-" if p != p else "< 0.0001" if p < 0.0001 else f"{p:.4f}"
