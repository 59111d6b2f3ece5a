"""Prices that are steered so that abilities drift alike."""

import pytest

from corda_lora.training.keeping import even_prices


def test_prices_keep_their_sum_and_follow_what_drifts_more():
    prices = even_prices([10.0, 10.0, 10.0], [0.1, 0.01, 0.001], 0.1, 0.02)
    assert sum(prices) == pytest.approx(30)
    assert prices[0] > prices[1] > prices[2]
    assert even_prices([1.0, 5.0], [0.2, 0.2], 0.1, 0.02) == pytest.approx([1, 5])
    assert even_prices([1.0, 5.0], [0.0, 0.0], 0.1, 0.02) == pytest.approx([1, 5])  # before the first step


def test_the_largest_drift_comes_to_its_least():
    """Where each drift is c / price, the least largest one is Σc / total, all alike."""
    costs, prices = (0.3, 0.05, 0.01), [10.0, 10.0, 10.0]
    for _ in range(200):
        prices = even_prices(prices, [c / p for c, p in zip(costs, prices)], 0.1, 0.001)
    assert [c / p for c, p in zip(costs, prices)] == pytest.approx([sum(costs) / 30] * 3, rel=1e-3)


def test_a_price_ends_at_its_least_share():
    prices = [10.0, 10.0]
    for _ in range(300):
        prices = even_prices(prices, [1.0, 1e-9], 0.1, 0.02)
    assert prices == pytest.approx([20 - 0.2, 0.2], rel=0.15)
