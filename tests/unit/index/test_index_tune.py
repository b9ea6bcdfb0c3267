import math

import pytest

from sslscale.index.factory import Effort
from sslscale.index.tune import tune


def asked(curve):
    """A recall function that notes what it was asked."""
    calls = []

    def recall(effort):
        calls.append(effort)
        return curve(effort)

    return recall, calls


@pytest.mark.parametrize(("enough", "found"), [(1, 1), (2, 2), (37, 38), (100, 108), (1000, 1024)])
def test_the_least_nprobe_within_a_step(enough, found):
    recall, calls = asked(lambda effort: 0.95 + 0.04 * math.log2(effort.nprobe / enough))
    best = tune(recall, Effort(nprobe=1), Effort(nprobe=1024), 0.95, 1.0)
    assert best.effort == Effort(nprobe=found) and best.recall == recall(best.effort)
    assert len(calls) <= 16


def test_a_parameter_that_is_given_stays():
    recall, calls = asked(lambda effort: 0.5)
    assert tune(recall, Effort(nprobe=8), Effort(nprobe=8), 0.95, 1.0).effort == Effort(nprobe=8)
    assert calls == [Effort(nprobe=8)]


def test_an_index_without_parameters_is_measured_once():
    recall, calls = asked(lambda effort: 0.7)
    assert tune(recall, Effort(), Effort(), 0.95, 0.0).recall == 0.7
    assert calls == [Effort()]


def test_codes_that_cannot_tell_end_the_doubling():
    recall, calls = asked(lambda effort: min(0.6, 0.2 * effort.nprobe))
    best = tune(recall, Effort(nprobe=1), Effort(nprobe=2**20), 0.95, 1.0)
    assert best.recall == 0.6 and len(calls) < 8


@pytest.mark.parametrize(("bytes_per_list", "factor"), [(1e6, 32), (10.0, 8)])
def test_of_many_lists_and_many_candidates_the_cheaper(bytes_per_list, factor):
    """Enough is found where nprobe times k_factor is 512 and k_factor at least 8."""
    recall, _ = asked(lambda effort: 0.96 if effort.k_factor >= 8 and effort.nprobe * effort.k_factor >= 512 else 0.0)

    def rising(effort):  # so that the doubling goes on
        return recall(effort) or min(0.9, 0.05 * effort.nprobe) * (effort.k_factor >= 8)

    best = tune(rising, Effort(nprobe=1, k_factor=1), Effort(nprobe=1024, k_factor=1), 0.95, bytes_per_list)
    assert best.effort.k_factor >= factor and best.effort.nprobe * best.effort.k_factor >= 512
