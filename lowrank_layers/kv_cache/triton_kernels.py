"""One decoding step over packed levels on a GPU, in Triton: see ``triton_decode.py``, which launches these functions.

Products are of matrices whose rows and columns are filled up to powers of two, at least 16, with fp32 sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("count8", "count4", "count2", "count1", "threes", "tokens")
"""Numbers that differ between layers or grow with the tokens: nothing is compiled anew for them."""


@triton.jit
def _levels(direction, token, group, levels8, levels4, levels2, levels1, count8, count4, count2, count1, tokens, here):
    """Levels about zero of some directions and tokens, ``[directions, tokens]``: see ``bit_coefficients.packed``."""
    first4 = count8
    first2 = first4 + 2 * count4
    first1 = first2 + 4 * count2
    is8, is4, is2 = direction < first4, direction < first2, direction < first1
    width = tl.where(is8, 8, tl.where(is4, 4, tl.where(is2, 2, 1)))
    count = tl.where(is8, count8, tl.where(is4, count4, tl.where(is2, count2, tl.maximum(count1, 1))))
    at = direction - tl.where(is8, 0, tl.where(is4, first4, tl.where(is2, first2, first1)))
    part = tl.where(is8, levels8, tl.where(is4, levels4, tl.where(is2, levels2, levels1)))
    start = part + (group * count + at % count) * tokens
    packed = tl.load(start[:, None] + token[None, :], mask=here, other=0).to(tl.int32)
    most = (1 << width) - 1
    level = (packed >> (at // count * width)[:, None]) & most[:, None]
    return level.to(tl.float32) - most[:, None].to(tl.float32) / 2


@triton.jit
def _factors(gains, group, token, tokens, least_gain, per_octave):
    """The gains of tokens."""
    gain = tl.load(gains + group * tokens + token, mask=token < tokens, other=0)
    return tl.exp2((gain.to(tl.float32) + least_gain) / per_octave)


@triton.jit(do_not_specialize=[*SIZES, "count", "tiles", "bases"])
def tile_scores(
    rows,  # [groups, heads, count, size]
    waves,  # [tiles, 2 pairs + 1], of the tiles' centres
    offset_waves,  # [2 pairs + 1, tile], of the tokens about them
    basis,  # [bases, heads * size, rank]
    scale,  # [bases, rank]
    mean,  # [bases, heads * size]
    levels8,  # [groups, bytes, tokens], as the others
    levels4,
    levels2,
    levels1,
    gains,  # [groups, tokens]
    scores,  # [groups, heads, count, tokens]
    count8,
    count4,
    count2,
    count1,
    threes,  # directions with 3 bits, in two planes
    tokens,
    count,
    tiles,
    bases,
    LEAST_GAIN: tl.constexpr,
    PER_OCTAVE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,  # of a program
    COUNT: tl.constexpr,  # rows of a tile
    ROWS: tl.constexpr,  # of all tiles of a program
    START: tl.constexpr,  # the first entry that is rotated
    PAIRS: tl.constexpr,
    STEP: tl.constexpr,  # from one pair to the next
    APART: tl.constexpr,  # from the first entry of a pair to the second
    SIZE: tl.constexpr,
    MOST_PAIRS: tl.constexpr,
    MOST_REST: tl.constexpr,  # entries that are not rotated
    RANKS: tl.constexpr,  # directions at a time
    PRECISION: tl.constexpr,
):
    """Scores of one head's rows for some tiles of tokens: the rows of all tiles are one matrix, and so are the tokens.

    Products of a tile's rows with another tile's tokens are not stored; a matrix of fewer rows would take as long.
    """
    head, chunk, group = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    m, n, j = tl.arange(0, ROWS), tl.arange(0, TILES * TILE), tl.arange(0, MOST_PAIRS)
    row, tile = m % COUNT, chunk * TILES + m // COUNT
    token = chunk * TILES * TILE + n
    valid = ((m < COUNT * TILES) & (row < count) & (tile < tiles))[:, None]
    pair, first = (j < PAIRS)[None, :], START + STEP * j

    # R(-p) q for the centres p of the tiles
    query = rows + ((group * heads + head) * count + row[:, None]) * SIZE
    left = tl.load(query + first[None, :], mask=valid & pair, other=0).to(tl.float32)
    right = tl.load(query + first[None, :] + APART, mask=valid & pair, other=0).to(tl.float32)
    wave = waves + tile[:, None] * (2 * PAIRS + 1) + j[None, :]
    cos = tl.load(wave, mask=valid & pair, other=0)
    sin = tl.load(wave + PAIRS, mask=valid & pair, other=0)
    turned, other = left * cos + right * sin, right * cos - left * sin

    # (R(-p) q)^T R(d) mean for the offsets d of the tokens
    own = group % bases * heads + head
    average = mean + own * SIZE + first
    left = tl.load(average, mask=j < PAIRS, other=0)[None, :]
    right = tl.load(average + APART, mask=j < PAIRS, other=0)[None, :]
    wave = offset_waves + j[:, None] * TILE + tl.arange(0, TILE)[None, :]
    cos = tl.load(wave, mask=(j < PAIRS)[:, None], other=0)
    sin = tl.load(wave + PAIRS * TILE, mask=(j < PAIRS)[:, None], other=0)
    shift = tl.dot(turned * left + other * right, cos, input_precision=PRECISION)
    shift += tl.dot(other * left - turned * right, sin, input_precision=PRECISION)
    if MOST_REST > 0:
        k = tl.arange(0, MOST_REST)
        rest = k < SIZE - 2 * PAIRS
        entry = tl.where(k < START, k, k + 2 * PAIRS)
        still = tl.load(query + entry[None, :], mask=valid & rest[None, :], other=0).to(tl.float32)
        shift += tl.sum(still * tl.load(mean + own * SIZE + entry, mask=rest, other=0)[None, :], 1)[:, None]

    shift = tl.broadcast_to(shift[:, None, :], [ROWS, TILES, TILE]).reshape(ROWS, TILES * TILE)

    # a column per level: that of a direction with 3 bits comes twice, four times as long for its first bit
    low = count8 + 2 * count4
    high = low + 4 * count2
    levels_in_all = high + 8 * count1
    rank = levels_in_all - threes
    found = tl.zeros([ROWS, TILES * TILE], tl.float32)
    for start in range(0, levels_in_all, RANKS):
        i = start + tl.arange(0, RANKS)
        inside = (i < levels_in_all)[None, :]
        again = (i >= high) & (i < high + threes)
        direction = tl.where(again, i - high + low, tl.where(i < high, i, i - threes))
        column = basis + own * SIZE * rank + direction[None, :]
        part = tl.load(column + first[:, None] * rank, mask=(j < PAIRS)[:, None] & inside, other=0)
        formed = tl.dot(turned, part.to(tl.float32), input_precision=PRECISION)
        part = tl.load(column + (first[:, None] + APART) * rank, mask=(j < PAIRS)[:, None] & inside, other=0)
        formed += tl.dot(other, part.to(tl.float32), input_precision=PRECISION)
        if MOST_REST > 0:
            part = tl.load(column + entry[:, None] * rank, mask=rest[:, None] & inside, other=0)
            formed += tl.dot(still, part.to(tl.float32), input_precision=PRECISION)
        unit = tl.load(scale + group % bases * rank + direction, mask=i < levels_in_all, other=0)
        formed *= tl.where(again, 4 * unit, unit)[None, :]
        here = (i < levels_in_all)[:, None] & (token < tokens)[None, :]
        levels = _levels(
            i, token, group, levels8, levels4, levels2, levels1, count8, count4, count2, count1, tokens, here
        )
        found += tl.dot(formed, levels, input_precision=PRECISION)
    found = found * _factors(gains, group, token, tokens, LEAST_GAIN, PER_OCTAVE)[None, :] + shift
    to = scores + ((group * heads + head) * count + row[:, None]) * tokens + token[None, :]
    stored = valid & (m[:, None] // COUNT == n[None, :] // TILE) & (token < tokens)[None, :]
    tl.store(to, found.to(scores.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=[*SIZES, "rows", "stride", "run"])
def mixed(
    weights,  # [groups, rows, tokens], rows "stride" apart
    levels8,
    levels4,
    levels2,
    levels1,
    gains,
    sums,  # [runs, groups, rows, levels + 1]
    count8,
    count4,
    count2,
    count1,
    threes,  # directions with 3 bits, in two planes
    tokens,
    rows,
    stride,
    run,
    LEAST_GAIN: tl.constexpr,
    PER_OCTAVE: tl.constexpr,
    ROWS: tl.constexpr,  # at a time
    RANKS: tl.constexpr,  # directions of a program
    TOKENS: tl.constexpr,  # at a time
    PRECISION: tl.constexpr,
):
    """Weighted sums of the levels of some directions over a run of tokens, and the sums of the weights."""
    block, part = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(rows, ROWS)
    group = (tl.program_id(2) // blocks).to(tl.int64)
    m = tl.program_id(2) % blocks * ROWS + tl.arange(0, ROWS)
    i = block * RANKS + tl.arange(0, RANKS)
    rank = count8 + 2 * count4 + 4 * count2 + 8 * count1
    stop = tl.minimum((part + 1) * run, tokens)
    found = tl.zeros([ROWS, RANKS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(part * run, stop, TOKENS):
        token = start + tl.arange(0, TOKENS)
        own = weights + (group * rows + m[:, None]) * stride + token[None, :]
        weight = tl.load(own, mask=(m < rows)[:, None] & (token < stop)[None, :], other=0).to(tl.float32)
        total += tl.sum(weight, 1)
        weight *= _factors(gains, group, token, tokens, LEAST_GAIN, PER_OCTAVE)[None, :]
        here = (i < rank)[:, None] & (token < stop)[None, :]
        levels = _levels(
            i, token, group, levels8, levels4, levels2, levels1, count8, count4, count2, count1, tokens, here
        )
        found += tl.dot(weight, tl.trans(levels), input_precision=PRECISION)
    groups = tl.num_programs(2) // blocks
    to = sums + ((part * groups + group) * rows + m) * (rank + 1)
    tl.store(to[:, None] + i[None, :], found, mask=(m < rows)[:, None] & (i < rank)[None, :])
    if block == 0:
        tl.store(to + rank, total, mask=m < rows)
