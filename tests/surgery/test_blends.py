"""Shared parameters of several models as one: against closed forms in fp64, and mergekit's numbers.

Run: pytest tests/surgery/test_blends.py
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from moe_compose.checkpoint.source import TensorInfo
from moe_compose.errors import OptionError, PlanError
from moe_compose.surgery import differences, evaluate
from moe_compose.surgery.blends import KINDS, STRAIGHT, Slerp, blend
from moe_compose.surgery.draws import Draw
from moe_compose.surgery.transforms import Read, Transform

SHAPE = (4, 6)
DRAW = Draw(3, "model.norm.weight")


def sixteenths(seed: int) -> np.ndarray:
    """Values that fp32 holds exactly, in -4 to 4."""
    return np.random.Generator(np.random.PCG64(seed)).integers(-64, 65, SHAPE) / 16.0


BASE, *DIFFERENCES = (sixteenths(seed) for seed in range(4))
OTHERS = [BASE + d for d in DIFFERENCES]

#: mergekit 0.1.5 on the same tensors in fp64: slerp(t=0.3) of the first two; ties, density 0.55,
#: weights 1, 2, 1, lambda 0.75; task_arithmetic with weights 0.5, 0.25, 1, lambda 0.75.
MERGEKIT = {
    "slerp": [
        4.1434218781061265, 0.6868928058598454, 0.542993144699208, 0.08378409790922592,
        -5.038481118406416, -5.60925410544423, -2.059384607246916, -2.868516699866148,
        -5.121685755906966, 2.0219135473512346, 4.682708383670346, 4.030294348495138,
        0.052567395466168065, 2.164829079557393, 4.037842516280382, 0.26287687967844453,
        2.3604468967449854, 0.059131434296931684, -2.944752629990131, 1.517820162395596,
        -0.3641701419605252, 4.796550263205278, 3.054038630950863, -5.44838483797181,
    ],
    "ties": [
        4.8125, -0.671875, -2.140625, 0.84375, -3.9296875, -1.796875, -1.328125, -6.359375,
        -5.390625, 0.0625, 3.1875, 3.3125, 3.0, -1.0, 6.109375, -0.59375, 1.0625, 0.375,
        -1.73828125, 0.8984375, 0.390625, 4.109375, 3.578125, -6.109375,
    ],
    "task-arithmetic": [
        5.1328125, -1.67578125, -1.671875, -2.4140625, -5.01953125, -2.45703125, -0.2734375,
        -2.62109375, -6.38671875, -0.34765625, 1.75, 2.99609375, 0.8203125, 1.25, 2.25390625,
        -1.13671875, 2.7734375, 1.58203125, -4.01171875, -0.0390625, -1.28515625, 2.7734375,
        4.38671875, -4.31640625,
    ],
}  # fmt: skip


def leaf(name: str, shape: tuple[int, ...] = SHAPE, dtype: str = "F32") -> Read:
    return Read("s", TensorInfo.of(name, dtype, shape))


def run(kind: str, base: np.ndarray, others: list[np.ndarray], weights: list[float], **more):
    """What `blend` makes of arrays, in fp64."""
    tensors = [torch.from_numpy(x.copy()).float() for x in (base, *others)]
    leaves = [leaf(str(i), tuple(t.shape)) for i, t in enumerate(tensors)]
    node = blend(kind, leaves[0], leaves[1:], weights, **{"draw": DRAW, **more})
    evaluate.check_on_meta(node)
    assert str(node)
    given = tensors if len(node.inputs) == len(tensors) else tensors[1:]
    made = node.apply(*given)
    assert (made.dtype, tuple(made.shape)) == (torch.float32, node.spec.shape)
    return made.double().numpy()


def weighted(base, xs, ws, p, scale):
    return sum(w * x for w, x in zip(ws, xs, strict=True)) / sum(ws)


def slerp(base, xs, ws, p, scale):
    a, b = xs
    t = ws[1] / sum(ws)
    angle = np.arccos((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def task_arithmetic(base, xs, ws, p, scale):
    return base + scale * sum(w * (x - base) for w, x in zip(ws, xs, strict=True))


def dare(base, xs, ws, p, scale):
    total = np.zeros_like(base)
    for i, (w, x) in enumerate(zip(ws, xs, strict=True)):
        rng = Draw(DRAW.seed, f"{DRAW.name}, model {i}").generator()
        kept = rng.random(base.size, dtype=np.float32).reshape(base.shape) < p
        total += w * kept * (x - base) / p
    return base + scale * total


def ties(base, xs, ws, p, scale, *, elect=True, trim=True):
    """Entry by entry, as the paper's section 4 says it."""
    keep = max(1, int(p * base.size))
    kept = []
    for x in xs:
        d = (x - base).ravel()
        order = sorted(range(d.size), key=lambda i: (-abs(d[i]), i))
        kept.append([d[i] if i in order[:keep] or not trim else 0.0 for i in range(d.size)])
    moved = []
    for entries in zip(*kept, strict=True):
        mass = sum(w * d for w, d in zip(ws, entries, strict=True))
        chosen = [
            (w, d) for w, d in zip(ws, entries, strict=True) if (d * mass > 0 if elect else d)
        ]
        total = sum(w for w, _ in chosen)
        moved.append(sum(w * d for w, d in chosen) / total if total else 0.0)
    return base + scale * np.array(moved).reshape(base.shape)


FORMS: dict[str, Callable[..., np.ndarray]] = {
    "weighted": weighted,
    "slerp": slerp,
    "ties": ties,
    "dare": dare,
    "task-arithmetic": task_arithmetic,
}
WEIGHTS = [0.5, 2.0, 0.75]


def of(kind: str) -> tuple[list[np.ndarray], list[float]]:
    return (OTHERS[:2], WEIGHTS[:2]) if kind == "slerp" else (OTHERS, WEIGHTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [5, 1 << 20])
def test_closed_form(kind, piece, monkeypatch):
    """Also when pieces end in the middle of a row: streams of draws and ties go on."""
    monkeypatch.setattr(differences, "PIECE", piece)
    monkeypatch.setattr("moe_compose.surgery.blends.PIECE", piece)
    xs, ws = of(kind)
    want = FORMS[kind](BASE, xs, ws, 0.4, 0.75)
    assert run(kind, BASE, xs, ws, density=0.4, scale=0.75) == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("weighted", lambda *a: np.mean(a[1], axis=0)),
        ("slerp", weighted),
        ("ties", lambda *a: ties(*a, elect=False)),
        ("ties", lambda *a: ties(*a, trim=False)),
        ("dare", task_arithmetic),
        ("dare", lambda b, xs, ws, p, scale: b + p * (dare(b, xs, ws, p, scale) - b)),
        ("task-arithmetic", weighted),
    ],
)
def test_a_wrong_formula_is_noticed(kind, wrong):
    xs, ws = of(kind)
    found = run(kind, BASE, xs, ws, density=0.4, scale=0.75)
    assert abs(found - wrong(BASE, xs, ws, 0.4, 0.75)).max() > 0.01


@pytest.mark.parametrize(
    ("kind", "weights", "more"),
    [
        ("slerp", [0.7, 0.3], {}),
        ("ties", [1, 2, 1], {"density": 0.55, "scale": 0.75}),
        ("task-arithmetic", [0.5, 0.25, 1], {"scale": 0.75}),
    ],
)
def test_mergekit(kind, weights, more):
    found = run(kind, BASE, OTHERS[: len(weights)], weights, **more)
    assert found.ravel() == pytest.approx(MERGEKIT[kind], rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_are_that_model_bit_for_bit(kind):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 50)) * 10.0 ** rng.integers(-30, 30, (40, 50))).astype(np.float32)
    count = 2 if kind == "slerp" else 3
    found = run(kind, x, [x] * count, [0.3, 0.5, 0.7][:count], density=0.3, scale=1.7)
    assert np.array_equal(found.astype(np.float32).view(np.int32), x.view(np.int32))
    nudged = [*[x] * (count - 1), x * np.float32(1.01)]
    assert not np.array_equal(run(kind, x, nudged, [1.0] * count, density=1.0), x)


@pytest.mark.parametrize("kind", ["ties", "dare", "task-arithmetic"])
def test_one_model_whole_is_that_model(kind):
    assert run(kind, BASE, OTHERS[:1], [1.0]) == pytest.approx(OTHERS[0], abs=1e-6)


def test_nearly_parallel_tensors_are_blended_along_the_line():
    """The arc between them is no longer found, and at 0° or 180° there is none."""
    a = OTHERS[0]
    for b in (a * 3, -a, 0 * a, a + 1e-4 * OTHERS[1]):
        assert run("slerp", BASE, [a, b], [3, 1]) == pytest.approx(0.75 * a + 0.25 * b, abs=1e-6)
    cosines = [np.cos(angle) for angle in (0.030, 0.033)]
    assert cosines[0] > STRAIGHT > cosines[1]
    for cosine, arc in zip(cosines, (False, True), strict=True):
        b = np.array([cosine, np.sqrt(1 - cosine * cosine)])
        found = run("slerp", b, [np.array([1.0, 0.0]), b], [1, 1])
        assert (np.linalg.norm(found) > 1 - 1e-5) == arc, "an arc keeps the length"


def test_of_equal_magnitudes_the_first_is_kept_and_a_tie_of_signs_moves_nothing():
    zero, up = np.zeros(4), np.array([1.0, -1.0, 1.0, 1.0])
    assert run("ties", zero, [up], [1.0], density=0.5).tolist() == [1, -1, 0, 0]
    assert run("ties", zero, [up, -up], [1.0, 1.0]).tolist() == [0, 0, 0, 0]
    assert run("ties", zero, [up, -up], [2.0, 1.0]).tolist() == up.tolist()


def test_dropping_keeps_the_expectation():
    """Mean over 40 000 entries within 5 standard errors; without rescaling it is far off."""
    base, x = np.zeros((200, 200)), np.ones((200, 200))
    found = run("dare", base, [x], [1.0], density=0.25)
    assert set(np.unique(found)) == {0.0, 4.0}
    assert abs(found.mean() - 1) < 5 * np.sqrt(3 / found.size)


def test_masks_have_addresses():
    """Equal addresses give equal masks; another tensor's, or model's, is another."""
    ones, zeros = np.ones(SHAPE), np.zeros(SHAPE)

    def mask(draw: Draw, weights: list[float]) -> list[float]:
        return run("dare", zeros, [ones, ones], weights, density=0.5, draw=draw).ravel().tolist()

    first = mask(DRAW, [1.0, 0.0])
    assert first == mask(DRAW, [1.0, 0.0])
    assert first != mask(Draw(3, "another"), [1.0, 0.0])
    assert first != mask(Draw(4, DRAW.name), [1.0, 0.0])
    assert first != mask(DRAW, [0.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind):
    xs, ws = of(kind)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(run(kind, np.tile(BASE, (50, 40)), [np.tile(x, (50, 40)) for x in xs], ws))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_are_rounded_once_and_64_kept(kind):
    xs, ws = of(kind)
    leaves = [leaf(str(i), dtype="BF16") for i in range(1 + len(xs))]
    node = blend(kind, leaves[0], leaves[1:], ws, density=0.5, draw=DRAW)
    half = [torch.from_numpy(x).bfloat16() for x in (BASE, *xs)]
    want = FORMS[kind](
        *[half[0].double().numpy(), [h.double().numpy() for h in half[1:]]], ws, 0.5, 1
    )
    given = half[-len(node.inputs) :]
    assert node.spec.dtype == "F32"
    assert node.apply(*given).numpy() == pytest.approx(want.astype(np.float32), rel=1e-7)
    wide = node.apply(*[h.double() for h in given])
    assert wide.dtype == torch.float64
    assert wide.numpy() == pytest.approx(want, rel=1e-14, abs=1e-14)


def test_everything_wrong_is_named_at_once():
    xs: list[Transform] = [leaf("a"), leaf("b"), leaf("c")]
    with pytest.raises(OptionError) as caught:
        blend("slerp", leaf("b"), xs, [1, -1, 0], density=0, scale=float("nan"), draw=DRAW)
    assert [p.split(" (")[0] for p in caught.value.problems] == [
        "weights",
        "slerp takes exactly two models",
        "density",
        "scale",
    ]
    with pytest.raises(OptionError, match=r"one weight per model \(1 for 3\)"):
        blend("ties", leaf("b"), xs, [1], draw=DRAW)
    with pytest.raises(OptionError, match=r"kind \(median\)"):
        blend("median", leaf("b"), xs, [1, 1, 1], draw=DRAW)
    with pytest.raises(PlanError, match="different shapes"):
        _ = Slerp((leaf("a"), leaf("b", (2, 6))), 0.5).spec
    with pytest.raises(PlanError, match="no blend of dtype U8"):
        _ = blend("ties", leaf("b", dtype="U8"), xs, [1, 1, 1], draw=DRAW).spec
