"""Pieces of arrays, and dealing out work, against naive versions."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.pieces import Box, cover, cut_like, deal, rounds

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def tilings(draw):
    """An array's shape, and boxes that tile it: every dimension is cut at chosen places, as a mesh does."""
    shape = draw(shapes)
    ranges = []
    for size in shape:
        cuts = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
        ranges.append(list(itertools.pairwise([0, *cuts, size])))
    return shape, [Box(tuple(a for a, _ in one), tuple(b - a for a, b in one)) for one in itertools.product(*ranges)]


@given(tilings(), st.data())
def test_boxes_cover_an_array_where_every_number_is_in_one_of_them(tiling, data):
    shape, boxes = tiling
    kept = data.draw(st.lists(st.sampled_from(boxes), unique=True))
    counted = np.zeros(shape, int)
    for box in kept:
        counted[box.slices] += 1
    assert counted.max(initial=0) <= 1
    assert cover(kept, shape) == bool((counted == 1).all())
    assert sum(box.size for box in kept) == counted.sum()


@given(shapes, st.integers(1, 3))
def test_boxes_that_reach_beyond_an_array_do_not_cover_it(shape, beyond):
    moved = Box((beyond, *(0 for _ in shape[1:])), shape)
    assert not cover([moved], shape)


@given(tilings(), st.data())
def test_a_tensor_beside_a_piece_is_cut_where_it_has_the_lengths_of_the_piece(tiling, data):
    whole, boxes = tiling
    part = data.draw(st.sampled_from(boxes))
    kinds = [data.draw(st.sampled_from(["piece", "whole", "one"])) for _ in whole]
    length = {"piece": lambda i: part.shape[i], "whole": lambda i: whole[i], "one": lambda i: 1}
    shape = tuple(length[kind](i) for i, kind in enumerate(kinds))
    found = cut_like(shape, whole, part)
    assert found is not None
    array, box = found
    assert box.shape == shape
    for i, kind in enumerate(kinds):
        if kind == "piece" or shape[i] == part.shape[i]:  # where lengths do not tell, it is cut as the parameter is
            assert (array[i], box.offset[i]) == (whole[i], part.offset[i])
        else:
            assert (array[i], box.offset[i]) == (shape[i], 0)


@given(tilings(), st.data())
def test_a_tensor_of_other_lengths_is_no_piece(tiling, data):
    whole, boxes = tiling
    part = data.draw(st.sampled_from(boxes))
    at = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(2, 9).filter(lambda n: n not in (whole[at], part.shape[at])))
    shape = tuple(other if i == at else n for i, n in enumerate(part.shape))
    assert cut_like(shape, whole, part) is None
    assert cut_like((*part.shape, 1), whole, part) is None


@given(st.lists(st.tuples(st.integers(0, 20), st.sets(st.integers(0, 3), max_size=4)), max_size=8))
def test_work_is_dealt_to_holders_and_as_evenly_as_greed_makes_it(units):
    costs, holders = dict(enumerate(cost for cost, _ in units)), dict(enumerate(sorted(of) for _, of in units))
    given_to = deal(costs, holders)
    assert set(given_to) == {unit for unit in costs if holders[unit]}
    assert all(given_to[unit] in holders[unit] for unit in given_to)
    assert deal(dict(reversed(costs.items())), {unit: of[::-1] for unit, of in holders.items()}) == given_to
    if len(set(map(frozenset, holders.values()))) > 1:
        return
    # Where all can take all, nobody who could have taken another's smallest unit ends with less than that one had without it.
    load = {holder: sum(costs[unit] for unit, to in given_to.items() if to == holder) for holder in range(4)}
    for unit, to in given_to.items():
        if costs[unit] == min(costs[other] for other, of in given_to.items() if of == to):
            assert all(load[other] >= load[to] - costs[unit] for other in holders[unit])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8), st.integers(0, 20))
def test_rounds_keep_the_order_and_the_bound_and_are_no_more_than_needed(sizes, bound):
    groups = rounds(sizes, bound)
    assert [unit for group in groups for unit in group] == list(range(len(sizes)))

    def fits(group):
        return all(sum(sizes[unit][rank] for unit in group) <= bound for rank in range(2))

    assert all(fits(group) or len(group) == 1 for group in groups)

    # The fewest groups, by trying every way of cutting the list.
    def ways(n):
        return itertools.chain.from_iterable(itertools.combinations(range(1, n), k) for k in range(n))

    n = len(sizes)
    fewest = min(
        (len(cuts) + 1 for cuts in ways(n) if all(fits(range(a, b)) or b - a == 1 for a, b in itertools.pairwise([0, *cuts, n]))),
        default=0,
    )
    assert len(groups) == fewest
