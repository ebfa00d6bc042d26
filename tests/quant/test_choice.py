from __future__ import annotations

import itertools
import math

from fxopt.quant.choice import Offer, decisions, in_order


def test_most_time_for_its_error_goes_first() -> None:
    offers = [Offer("a", "int8", 0.02, 4.0), Offer("b", "int8", 0.01, 4.0), Offer("c", "int8", 0.01, 1.0)]
    assert [offer.layer for offer in in_order(offers)] == ["b", "a", "c"]


def test_what_is_not_faster_or_breaks_the_model_is_not_taken() -> None:
    assert in_order([Offer("a", "int8", 0.0, 0.0), Offer("b", "int8", 0.0, -1.0), Offer("c", "fp8", math.inf, 5.0)]) == []


def test_a_layer_gets_a_faster_precision_later() -> None:
    order = in_order([Offer("a", "int8", 0.01, 3.0), Offer("a", "fp8", 0.1, 4.0), Offer("b", "fp8", 0.05, 3.0)])
    assert [(offer.layer, offer.precision) for offer in order] == [("a", "int8"), ("b", "fp8"), ("a", "fp8")]
    assert decisions(order) == {"a": "fp8", "b": "fp8"} and decisions(order[:2]) == {"a": "int8", "b": "fp8"}


def test_a_precision_that_is_slower_and_worse_is_never_taken() -> None:
    assert len(in_order([Offer("a", "int8", 0.01, 3.0), Offer("a", "fp8", 0.02, 2.0)])) == 1


def test_prefixes_save_nearly_as_much_as_the_best_subset() -> None:
    offers = [Offer(str(n), "int8", 0.01 * (1 + n % 5), 1.0 + (7 * n) % 11) for n in range(10)]
    order = in_order(offers)
    for budget in (0.02, 0.04, 0.06):
        subsets = itertools.chain.from_iterable(itertools.combinations(offers, n) for n in range(len(offers) + 1))
        fitting = (s for s in subsets if sum(o.error**2 for o in s) <= budget**2)
        best = max(sum(o.saved for o in s) for s in fitting)
        prefixes = (order[:n] for n in range(len(order) + 1))
        greedy = max(sum(o.saved for o in p) for p in prefixes if sum(o.error**2 for o in p) <= budget**2)
        # What does not fit any more may leave a gap of one layer at the end.
        assert greedy >= best - max(o.saved for o in offers)
