"""Few rows out of a product of values, in which every pair of values appears: always the same rows, those with most new pairs first."""

import itertools

import pytest


def pairs_of(row):
    return set(itertools.combinations(enumerate(row), 2))


def covering(*values, allowed=lambda *_: True):
    """The allowed rows of the product, each that covers pairs which the rows before it do not. Greedy; ties go to the first.

    The beginning of the list has every value early: values that no row has had yet count first.
    """
    rows = [row for row in itertools.product(*values) if allowed(*row)]
    new = {row: pairs_of(row) for row in rows}
    unseen, chosen = {(i, value) for row in rows for i, value in enumerate(row)}, []
    while True:
        best = max(rows, key=lambda row: (len(unseen.intersection(enumerate(row))), len(new[row])), default=None)
        if best is None or not new[best]:
            return chosen
        chosen.append(best)
        unseen.difference_update(enumerate(best))
        covered = set(new[best])
        for row in rows:
            new[row] -= covered


def every_other(values):
    """The second, the fourth and so on are slow tests."""
    return [v if i % 2 == 0 else pytest.param(v, marks=pytest.mark.slow) for i, v in enumerate(values)]


def checkerboard(one, two):
    """The product, of which every second field is a slow test: each value of either stays with half of the other's."""
    fields = [(i + j, (a, b)) for i, a in enumerate(one) for j, b in enumerate(two)]
    return [pytest.param(*field, marks=[pytest.mark.slow] * (number % 2)) for number, field in fields]
