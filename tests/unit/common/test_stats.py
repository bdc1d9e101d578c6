"""Statistics of measured values."""

from services.common.stats import percentile


def test_a_percentile_is_one_of_the_values():
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, 0.95) == 95.0
    assert percentile(values, 0.955) == 96.0
    assert [percentile(values, rank / 100) for rank in range(1, 101)] == sorted(values)
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([1.0, 2.0], 0.0) == 1.0
