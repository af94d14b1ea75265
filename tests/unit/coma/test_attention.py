"""Windows and DM-MSA against plain attention and slow loops."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coma.config import DyViTConfig
from coma.masking.patchify import spread
from coma.models import DyViT
from coma.models.attention import (
    DynamicMultiWindowAttention,
    WindowGate,
    concat_weighted,
    scaled_dot_product,
    stage_layout,
)
from coma.models.position_embeddings import rotary_table, rotate, sincos_positions
from coma.models.view_sequences import image_sequences
from coma.models.windows import (
    MASKED,
    fit,
    merge,
    nest,
    nested_places,
    same_group_bias,
    split,
    unnest,
)

SIDES = st.integers(1, 11)


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_nested_order_by_its_definition(side):
    """Four quarters, each in the same order; units row by row."""

    def order(square):
        if len(square) == 1:
            return [square[0, 0]]
        half = len(square) // 2
        return [
            token
            for rows in (square[:half], square[half:])
            for quarter in (rows[:, :half], rows[:, half:])
            for token in order(quarter)
        ]

    x = torch.arange(2 * 3 * side * side).view(1, 2 * side, 3 * side)
    units = nest(x, side)
    assert torch.equal(unnest(units, side, 2, 3), x)
    for unit in range(6):
        i, j = unit // 3 * side, unit % 3 * side
        assert units[0, unit].tolist() == order(x[0, i : i + side, j : j + side].numpy())
    places = nested_places(side, torch.device("cpu"))
    assert torch.equal(x[0][places[:, 0], places[:, 1]], units[0, 0])


@settings(deadline=None)
@given(h=st.integers(1, 4), w=st.integers(1, 4), views=st.integers(1, 4), b=st.integers(1, 3), data=st.data())
def test_every_unit_finds_its_view_and_its_way_back(h, w, views, b, data):
    drawn = st.lists(st.integers(-1, views - 1), min_size=b * h * w, max_size=b * h * w)
    group = torch.tensor(data.draw(drawn)).view(b, h, w)
    sequences = image_sequences(h, w, group)
    numbers = torch.arange(b * h * w).view(b, h * w)
    shared = sequences.gather(numbers)
    present = int(group.max()) + 1
    real = torch.ones_like(shared, dtype=torch.bool) if sequences.real is None else sequences.real
    for n, (row, counts) in enumerate(zip(shared, real, strict=True)):
        sample, view = divmod(n, max(present, 1))
        expected = numbers[sample][group[sample].flatten() == view]
        assert sorted(row[counts].tolist()) == expected.tolist()
    back = sequences.scatter(shared)
    assert torch.equal(back, torch.where(group.flatten(1) >= 0, numbers, 0))


@settings(deadline=None)
@given(h=SIDES, w=SIDES, window=st.integers(0, 12), b=st.integers(1, 3))
def test_merge_undoes_split(h, w, window, b):
    sides = fit(window, h, w)
    x = torch.randn(b, h, w, 2, 3)
    windows = split(x, sides)
    assert windows.shape == (b * math.ceil(h / sides[0]) * math.ceil(w / sides[1]), sides[0] * sides[1], 2, 3)
    assert torch.equal(merge(windows, sides, h, w), x)


@settings(deadline=None, max_examples=30)
@given(h=st.integers(1, 7), w=st.integers(1, 7), window=st.integers(1, 5), data=st.data())
def test_bias_forbids_exactly_the_pairs_of_different_groups(h, w, window, data):
    group = torch.tensor([data.draw(st.lists(st.integers(-1, 2), min_size=h * w, max_size=h * w))]).view(
        1, h, w
    )
    sides = fit(window, h, w)
    bias = same_group_bias(group, sides, torch.float32)
    cols = math.ceil(w / sides[1])
    for n in range(len(bias)):
        top, left = n // cols * sides[0], n % cols * sides[1]
        cells = [(top + i, left + j) for i in range(sides[0]) for j in range(sides[1])]
        labels = [int(group[0, i, j]) if i < h and j < w else "padding" for i, j in cells]
        expected = torch.tensor([[0.0 if a == b else MASKED for b in labels] for a in labels])
        assert torch.equal(bias[n, 0], expected)


def attention(heads, windows, dim=16):
    torch.manual_seed(0)
    layer = DynamicMultiWindowAttention(dim, heads, len(windows)).double().eval()
    return layer


def attend(layer, x, windows, group=None, side=1, change=lambda layout: layout):
    """The layer on a map `[b, h, w, c]`: to sequences, through it, and back."""
    sequences = image_sequences(x.shape[1] // side, x.shape[2] // side, group)
    tokens = sequences.gather(nest(x, side))
    layout = stage_layout(sequences, windows, x.shape[-1] // layer.heads, side, tokens)
    out = sequences.scatter(layer(tokens, change(layout)))
    return unnest(out, side, sequences.rows, sequences.cols)


def slow_attention(layer, x, windows, token_group=None):
    """DM-MSA, one token, head and pair at a time, from its definition."""
    b, h, w, c = x.shape
    heads, d = layer.heads, c // layer.heads
    frequencies = 100.0 ** -(torch.arange(d // 4, dtype=torch.float64) / (d // 4))
    q, k, v = (part.view(b, h, w, heads, d) for part in layer.qkv(x).chunk(3, dim=-1))

    def turned(vector, i, j):
        angles = torch.cat([i * frequencies, j * frequencies])
        pairs = torch.complex(vector[: d // 2], vector[d // 2 :]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat([pairs.real, pairs.imag])

    queries, keys = (
        {at: turned(part[at], at[1], at[2]) for at in itertools.product(*map(range, (b, h, w, heads)))}
        for part in (q, k)
    )
    out = torch.zeros_like(x)
    for n in range(b):
        for i in range(h):
            for j in range(w):
                for head in range(heads):
                    window = windows[head * len(windows) // heads]
                    wh, ww = window or h, window or w
                    seen = [
                        (r, s)
                        for r in range(h)
                        for s in range(w)
                        if r // wh == i // wh and s // ww == j // ww
                        and (token_group is None or token_group[n, r, s] == token_group[n, i, j])
                    ]  # fmt: skip
                    query = queries[n, i, j, head]
                    scores = torch.stack([query @ keys[n, r, s, head] for r, s in seen]) / d**0.5
                    values = torch.stack([v[n, r, s, head] for r, s in seen])
                    out[n, i, j, head * d : (head + 1) * d] = scores.softmax(0) @ values
    if layer.gate is not None:
        groups = torch.zeros(b, h, w) if token_group is None else token_group
        gated = out.clone()
        for n in range(b):
            for view in groups[n].unique():
                members = groups[n] == view
                pooled = out[n][members].mean(0)
                logits = layer.gate.out(F.gelu(layer.gate.hidden(pooled))).view(len(windows), -1)
                gated[n][members] = out[n][members] * (logits.softmax(0) * len(windows)).flatten()
        out = gated
    return layer.proj(out)


GROUPS = {
    "none": None,
    "equal": [[[0, 1, 0], [1, 1, 0]], [[1, 0, 0], [1, 0, 1]]],
    "unequal": [[[0, 1, 0], [1, 1, 0]], [[2, 0, -1], [1, 0, 2]]],
}


@pytest.mark.parametrize("windows", [(4,), (2, 4), (3, 2), (0, 3), (3, 0, 7, 1), (7,), (4, 2, 1, 0)])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("side", [1, 2, 4])
def test_dm_msa_equals_a_slow_loop(windows, groups, side):
    layer = attention(4, windows)
    x = torch.randn(2, 2 * side, 3 * side, 16, dtype=torch.float64)
    if GROUPS[groups] is None:
        fast, slow = attend(layer, x, windows, side=side), slow_attention(layer, x, windows)
    else:
        group = torch.tensor(GROUPS[groups])
        tokens = spread(group, side)
        fast, slow = attend(layer, x, windows, group, side), slow_attention(layer, x, windows, tokens)
        assert (fast[tokens < 0] == 0).all()
        fast, slow = fast[tokens >= 0], slow[tokens >= 0]
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-7)


def test_one_full_window_without_positions_is_plain_multi_head_attention():
    layer = attention(4, (0,))
    plain = torch.nn.MultiheadAttention(16, 4, batch_first=True).double().eval()
    plain.load_state_dict(
        {
            "in_proj_weight": layer.qkv.weight,
            "in_proj_bias": layer.qkv.bias,
            "out_proj.weight": layer.proj.weight,
            "out_proj.bias": layer.proj.bias,
        }
    )
    x = torch.randn(2, 1, 1, 16, dtype=torch.float64).expand(2, 3, 5, 16) + 0.1 * torch.randn(2, 3, 5, 16)

    def still(layout):
        cos, sin = layout.rotary
        return replace(layout, rotary=(torch.ones_like(cos), torch.zeros_like(sin)))

    expected, _ = plain(*[x.flatten(1, 2)] * 3, need_weights=False)
    torch.testing.assert_close(attend(layer, x, (0,), change=still).flatten(1, 2), expected)


def test_joining_with_weights_is_a_product_and_has_its_gradients():
    parts = [torch.randn(2, 3, 4, width, dtype=torch.float64, requires_grad=True) for width in (2, 3)]
    weights = torch.randn(2, 1, 1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(concat_weighted(parts, weights), torch.cat(parts, dim=-1) * weights)
    assert torch.autograd.gradcheck(lambda w, *each: concat_weighted(each, w), (weights, *parts))


@pytest.mark.parametrize("masked", [False, True])
def test_unfused_attention_equals_fused(masked):
    q, k, v = torch.randn(3, 6, 2, 5, 8, dtype=torch.float64)
    bias = torch.zeros(6, 1, 1, 5, dtype=torch.float64)
    bias[::2, ..., 3:] = MASKED
    given = bias if masked else None
    plain, fused = (scaled_dot_product(q, k, v, given, fused=each) for each in (False, True))
    torch.testing.assert_close(plain, fused)
    k[::2, :, 3:] += 1
    changed = scaled_dot_product(q, k, v, given, fused=False)
    assert torch.equal(plain[::2], changed[::2]) == masked


def test_a_fresh_gate_weighs_all_windows_equally_and_a_trained_one_does_not():
    model = DyViT(
        DyViTConfig(patch=1, dim=16, depths=(1, 1, 1, 1), heads=(2, 2, 4, 4), windows=((4, 8),) * 4)
    )
    gate = model.get_submodule("stages.0.blocks.0.attn.gate")
    assert isinstance(gate, WindowGate)
    pooled = torch.randn(3, 16)
    assert torch.equal(gate(pooled), torch.ones(3, 16))
    torch.nn.init.normal_(gate.out.weight)
    weights = gate(pooled).view(3, 2, 8)
    assert weights.std() > 0.03
    torch.testing.assert_close(weights.mean(1), torch.ones(3, 8))


def test_rotary_scores_depend_on_offsets_only():
    places = torch.cartesian_prod(torch.arange(9), torch.arange(9)).view(9, 9, 2)
    table = rotary_table(places, 8, torch.float64)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    spots = [rotate(x.expand(9, 9, 8), table) for x in (q, k)]
    score = {(i, j): spots[0][i, j] @ spots[1][i + 2, j + 1] for i in (0, 3, 6) for j in (0, 4, 7)}
    torch.testing.assert_close(torch.stack(list(score.values())), score[0, 0].expand(9), rtol=1e-6, atol=1e-6)
    assert (spots[0][0, 0] @ spots[1][1, 2] - score[0, 0]).abs() > 1e-3  # rows and columns are told apart


def test_sincos_positions_are_distinct_and_bounded():
    table = sincos_positions(14, 9, 32, device=torch.device("cpu")).flatten(0, 1)
    assert table.abs().max() <= 1
    assert torch.cdist(table, table).add(torch.eye(len(table)) * 10).min() > 0.1
