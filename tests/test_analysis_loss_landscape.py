"""Landscapes: closed forms, invariances, promised norms, untouched models, resuming, marked points,
bad input.
"""

import copy
import itertools
import math
import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_book as lb
from lora_book.analysis import loss_landscape as ll
from lora_book.core.adapter import generator

X = torch.randn(16, 4, generator=generator(0, "x"), dtype=torch.float64)
Y = torch.randn(16, 3, generator=generator(0, "y"), dtype=torch.float64)
GRID = np.linspace(-0.6, 0.6, 4)


def loss(model):
    return (model(X) - Y).square().mean()


def net(seed=0, dtype=torch.float64):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator(seed, name)))
    return model


def adapted(method="lora", **options):
    model = lb.adapt(net(), method, ["0"], r=2, head="2", seed=1, **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator(3), dtype=torch.float64))
    return model.eval()


def inner(d, e):
    return sum(float((d[name].double() * e[name].double()).sum()) for name in d)


def bits(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


@given(st.integers(0, 10**6), st.sampled_from(["filter", "layer", "none"]))
@settings(max_examples=15, deadline=None)
def test_each_point_is_the_loss_of_the_moved_model(seed, norm):
    model, plane = net(seed), ll.random_directions(ll.moved_weights(net(seed)), seed, norm)
    surface = ll.loss_surface(model, loss, plane, GRID, GRID[:2])
    for i, a in enumerate(GRID):
        moved = net(seed)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.add_(a * plane.first[name] + GRID[1] * plane.second[name])
            assert math.isclose(surface.losses[i, 1], loss(moved), rel_tol=1e-12)
    assert surface.done.all() and not surface.bad.any()


@given(st.integers(0, 10**6), st.booleans(), st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_flipped_direction_mirrors_the_surface_and_nothing_else(seed, first, second):
    model, plane = net(seed), ll.random_directions(ll.moved_weights(net(seed)), seed)
    flip = [
        {k: -v if flipped else v for k, v in d.items()}
        for d, flipped in ((plane.first, first), (plane.second, second))
    ]
    one = ll.loss_surface(model, loss, plane, GRID, GRID).losses
    other = ll.loss_surface(model, loss, ll.Directions(plane.centre, *flip), GRID, GRID).losses
    assert np.allclose(other, one[:: -1 if first else 1, :: -1 if second else 1], rtol=1e-10)


@given(st.integers(0, 10**6), st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_directions_have_the_promised_norms(seed, scale):
    weights = {k: scale * w for k, w in ll.moved_weights(net(seed)).items()}
    rows, layers = (
        ll.random_directions(weights, seed, "filter"),
        ll.random_directions(weights, seed, "layer"),
    )
    for side in ("first", "second"):
        for name, w in weights.items():
            d, e = getattr(rows, side)[name], getattr(layers, side)[name]
            if w.dim() < 2:
                assert not d.any() and not e.any()
            else:
                assert torch.allclose(d.norm(dim=1), w.norm(dim=1)) and torch.isclose(
                    e.norm(), w.norm()
                )
    raw = ll.random_directions(weights, seed, "none").first
    assert math.isclose(
        inner(raw, raw) ** 0.5, sum(w.numel() for w in weights.values()) ** 0.5, rel_tol=0.5
    )


@given(st.integers(3, 7), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_pca_is_the_singular_value_decomposition_of_the_steps(steps, seed):
    points = [
        {
            "a": torch.randn(3, 4, generator=generator(seed, t, "a"), dtype=torch.float64),
            "b": torch.randn(5, generator=generator(seed, t, "b"), dtype=torch.float64),
        }
        for t in range(steps)
    ]
    plane = ll.pca_directions(points)
    M = torch.stack(
        [torch.cat([(p[k] - points[-1][k]).flatten() for k in "ab"]) for p in points[:-1]]
    )
    _, S, Vh = torch.linalg.svd(M, full_matrices=False)
    for side, v in zip((plane.first, plane.second), Vh, strict=False):
        assert abs(float(torch.cat([side[k].flatten() for k in "ab"]) @ v)) > 1 - 1e-9
    assert (
        np.allclose(plane.explained, (S[:2] ** 2 / (S**2).sum()).numpy())
        and abs(inner(plane.first, plane.second)) < 1e-9
    )
    assert np.allclose(
        np.abs(plane.path[:-1]), np.abs((M @ Vh[:2].T).numpy()), atol=1e-9
    ) and np.allclose(plane.path[-1], 0)
    assert (plane.path[0] >= -1e-12).all()


@pytest.mark.parametrize(
    "method, options",
    [("lora", {}), ("full", {}), ("bitfit", {}), ("cola", {"chain_length": 2}), ("cla", {})],
)
@pytest.mark.parametrize("merged", [False, True])
def test_an_adapted_model_is_drawn_as_merged_and_left_as_it_was(method, options, merged):
    model = adapted(method, **options)
    if method == "cola":
        lb.advance(model)
    outputs = model(X).detach()
    if merged:
        lb.merge(model)
    before, plane = bits(model), ll.random_directions(ll.moved_weights(model), 0)
    surface = ll.loss_surface(model, loss, plane, [-0.5, 0, 0.5], [0.0])
    assert math.isclose(surface.losses[1, 0], float((outputs - Y).square().mean()), rel_tol=1e-9)
    assert surface.losses[0, 0] != surface.losses[1, 0]
    ll.random_sharpness(model, loss, 0.1, 2)
    after = bits(model)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.allclose(model(X), outputs) and (lb.n_trainable(model, heads=True) > 0)


def test_a_loss_that_raises_leaves_the_model_as_it_was():
    model = adapted()
    before = bits(model)
    plane = ll.random_directions(ll.moved_weights(model))
    calls = []

    def breaks(m):
        calls.append(1)
        return loss(m) if len(calls) < 3 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        ll.loss_surface(model, breaks, plane, GRID, GRID)
    assert all(torch.equal(before[k], v) for k, v in bits(model).items()) and model(X).requires_grad
    lb.merge(model)


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path):
    model, seen = net(), []
    plane = ll.random_directions(ll.moved_weights(model))

    def killed(m, after):
        seen.append(1)
        if len(seen) > after:
            raise KeyboardInterrupt
        return loss(m)

    with pytest.raises(KeyboardInterrupt):
        ll.loss_surface(
            model, partial(killed, after=7), plane, GRID, GRID, path=tmp_path / "s", save_every=2
        )
    assert ll.Surface.load(tmp_path / "s").done.sum() == 6
    told = []
    again = ll.loss_surface(
        model, loss, plane, GRID, GRID, path=tmp_path / "s", progress=lambda *at: told.append(at)
    )
    whole = ll.loss_surface(model, loss, plane, GRID, GRID)
    assert np.array_equal(again.losses, whole.losses) and told[-1] == (10, 10) and len(told) == 10
    loaded = ll.Surface.load(tmp_path / "s")
    assert np.array_equal(loaded.losses, whole.losses) and loaded.facts["key"] == whole.facts["key"]
    with pytest.raises(lb.LoraBookError, match="other weights"):
        ll.loss_surface(model, loss, plane, GRID * 2, GRID, path=tmp_path / "s")


@pytest.mark.parametrize("of", [2, 3])
def test_parts_of_several_processes_make_the_whole(of):
    model = net()
    plane = ll.random_directions(ll.moved_weights(model))
    parts = [ll.loss_surface(model, loss, plane, GRID, GRID, part=(i, of)) for i in range(of)]
    assert np.array_equal(
        ll.joined(parts).losses, ll.loss_surface(model, loss, plane, GRID, GRID).losses
    )
    assert sum(int(p.done.sum()) for p in parts) == GRID.size**2
    other = ll.loss_surface(
        model, loss, ll.random_directions(ll.moved_weights(model), 9), GRID, GRID
    )
    for bad in ([], [parts[0], other]):
        with pytest.raises(lb.LoraBookError):
            ll.joined(bad)


def test_points_that_arent_finite_are_marked_and_counted_not_drawn_as_numbers():
    model = net()
    plane = ll.random_directions(ll.moved_weights(model))
    fine = np.linspace(-0.6, 0.6, 7)
    first = model[0].weight[0, 0].item()
    surface = ll.loss_surface(
        model,
        lambda m: loss(m) if m[0].weight[0, 0].item() <= first + 1e-12 else math.nan,
        plane,
        fine,
        fine,
    )
    assert 0 < surface.bad.sum() < surface.bad.size and surface.done.all()
    assert ll.surface_sharpness(surface, 0.7)["bad_points"] > 0
    assert "null" in ll.interactive({"one": surface}) and "NaN" not in ll.interactive(
        {"one": surface}
    )
    with pytest.raises(lb.LoraBookError, match="finite"):
        ll.random_sharpness(model, lambda m: math.nan, 0.1)


@given(st.floats(0.1, 10), st.floats(0.1, 10))
@settings(max_examples=15, deadline=None)
def test_sharpness_of_a_bowl_is_its_curvature(p, q):
    a = np.linspace(-1, 1, 9)
    bowl = ll.Surface(a, a, p * a[:, None] ** 2 + q * a**2 + 3, np.ones((9, 9), bool))
    found = ll.surface_sharpness(bowl, 1.0)
    assert math.isclose(found["curvature"], 2 * (p + q), rel_tol=1e-6) and math.isclose(
        found["largest_rise"], max(p, q), rel_tol=1e-6
    )
    flipped = ll.surface_sharpness(ll.Surface(a, a, bowl.losses[::-1], bowl.done), 1.0)
    assert all(math.isclose(found[k], flipped[k], rel_tol=1e-9) for k in found)
    assert found["bad_points"] == 0 and 0 < found["mean_rise"] < found["largest_rise"]


class Alive(TorchDispatchMode):
    "Counts the bytes of the tensors that operators made and that are alive."

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, (tuple, list)) else [made]:
            if (
                isinstance(t, torch.Tensor)
                and t.untyped_storage().data_ptr() not in self.seen | self.given
            ):
                at, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
                self.seen[at] = weakref.finalize(t.untyped_storage(), self.died, at, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return made

    def died(self, at, size):
        self.now -= size
        self.seen.pop(at, None)


def peak_of(run, *held):
    "The largest sum of bytes alive during run(), tensors in `held` left out."
    mode = Alive()
    mode.given = {t.untyped_storage().data_ptr(): None for t in held}
    with mode:
        run()
    return mode.peak


def small_loss(model):
    return model(torch.ones(1, 256)).square().mean()


def path(points=4):
    "Snapshots of a model of 8 layers; the last has its numbers."
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]).eval()
    return model, [
        {
            name: (
                p.detach()
                + 0.01 * (points - 1 - t) * torch.randn(p.shape, generator=generator(t, name))
            )
            for name, p in model.named_parameters()
        }
        for t in range(points)
    ]


def on_plane(make):
    return lambda model, points: ll.loss_surface(
        model, small_loss, make(model, points), [0.5], [0.5]
    )


@pytest.mark.parametrize(
    "use, most",
    [
        (on_plane(lambda model, _: ll.random_directions(ll.moved_weights(model, copy=False))), 1.5),
        (
            on_plane(
                lambda model, _: ll.random_directions(ll.moved_weights(model, copy=False), hold=0.3)
            ),
            2,
        ),
        (on_plane(lambda _, points: ll.pca_directions(points)), 1.5),
        (on_plane(lambda _, points: ll.pca_directions(points, "filter")), 1.5),
        (on_plane(lambda _, points: ll.pca_directions(points, "layer", hold=0.3)), 2),
        (lambda model, _: ll.random_sharpness(model, small_loss, 0.1, 1), 1.5),
    ],
)
def test_a_plane_needs_less_than_two_copies_of_the_model(use, most):
    model, points = path()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = peak_of(
        lambda: use(model, points),
        *model.parameters(),
        *[w for point in points for w in point.values()],
    )
    assert size <= peak < most * size


@pytest.mark.parametrize(
    "make",
    [
        lambda model, _: ll.random_directions(ll.moved_weights(model, copy=False), hold=True),
        lambda _, points: ll.pca_directions(points, hold=True),
    ],
)
def test_directions_that_are_held_are_counted(make):
    model, points = path()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    held = [*model.parameters(), *[w for point in points for w in point.values()]]
    assert peak_of(lambda: on_plane(make)(model, points), *held) > 2.9 * size


def test_a_path_in_files_needs_less_than_two_copies_of_the_model(tmp_path, monkeypatch):
    model, points = path()
    for t, point in enumerate(points):
        save_file(point, tmp_path / f"{t}.safetensors")
    whole, piece = ll.Stored.__getitem__, ll.Stored.piece
    monkeypatch.setattr(ll.Stored, "__getitem__", lambda *at: whole(*at).clone())
    monkeypatch.setattr(ll.Stored, "piece", lambda *at: piece(*at).clone())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    files = [tmp_path / f"{t}.safetensors" for t in range(len(points))]
    assert (
        size
        <= peak_of(
            lambda: ll.loss_surface(model, small_loss, ll.pca_directions(files), [0.5], [0.5]),
            *model.parameters(),
        )
        < 2 * size
    )


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(1, 40), st.sampled_from([1, 9, 2**14]))
@settings(max_examples=60, deadline=None)
def test_portions_reach_each_number_once_and_are_small(shape, points, scratch):
    seen, before = torch.zeros(shape), ll.SCRATCH
    first = sum(1 for _ in itertools.takewhile(lambda n: n == 1, shape))
    ll.SCRATCH = scratch
    try:
        for rows in ll.portions(seen.shape, points):
            seen[rows] += 1
            assert seen[rows].numel() <= max(
                max(scratch, seen.numel() // 8) / points, math.prod(shape[first + 1 :])
            )
    finally:
        ll.SCRATCH = before
    assert (seen == 1).all()


@given(
    st.integers(0, 10**6),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([1, 7, 2**14]),
)
@settings(max_examples=20, deadline=None)
def test_a_combination_is_the_sum_of_its_steps(seed, dtype, scratch):
    shapes = {
        "matrix": (4, 6),
        "vector": (3,),
        "scalar": (),
        "position": (1, 5, 2),
        "empty": (0, 2),
    }
    points = [
        {
            name: torch.randn(shape, generator=generator(seed, t, name)).to(dtype)
            for name, shape in shapes.items()
        }
        for t in range(4)
    ]
    for point in points:
        point["matrix"] = point["matrix"].T
    shares, before = torch.randn(3, generator=generator(seed), dtype=torch.float64), ll.SCRATCH
    ll.SCRATCH = scratch
    try:
        made = dict(ll.Combined(points, shares))
    finally:
        ll.SCRATCH = before
    for name, d in made.items():
        want = sum(
            share * (point[name].double() - points[-1][name].double())
            for share, point in zip(shares, points, strict=False)
        )
        assert (
            d.dtype is torch.promote_types(dtype, torch.float32)
            and d.shape == points[0][name].shape
        )
        assert torch.allclose(
            d.double(), want, rtol=4 * torch.finfo(d.dtype).eps, atol=16 * torch.finfo(d.dtype).eps
        )


@pytest.mark.parametrize("norm", ll.NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_path_plane_gives_the_same_surface_however_much_is_held(norm, dtype):
    points = [ll.moved_weights(net(t, dtype)) for t in range(5)]
    model, X0, Y0 = net(4, dtype), X.to(dtype), Y.to(dtype)
    planes = [ll.pca_directions(points, norm, hold) for hold in (0, 0.5, True)]
    surfaces = [
        ll.loss_surface(model, lambda m: (m(X0) - Y0).square().mean(), plane, GRID, GRID)
        for plane in planes
    ]
    assert all(
        torch.equal(planes[0].first[k], plane.first[k]) for plane in planes for k in points[0]
    )
    assert all(
        np.allclose(s.losses, surfaces[-1].losses, rtol=64 * torch.finfo(dtype).eps)
        for s in surfaces
    )
    assert (
        not isinstance(planes[0].first, dict)
        and isinstance(planes[2].first, dict)
        and 0 < len(planes[1].first.maps[0]) < len(points[0])
    )


@pytest.mark.parametrize("hold", [0, True])
def test_a_path_plane_leaves_model_and_snapshots_as_they_were_also_if_the_loss_raises(hold):
    points, model = [ll.moved_weights(net(t)) for t in range(4)], net(3)
    kept, before = [{k: w.clone() for k, w in point.items()} for point in points], bits(model)
    plane = ll.pca_directions(points, hold=hold)
    ll.loss_surface(model, loss, plane, GRID, GRID)
    with pytest.raises(ZeroDivisionError):
        ll.loss_surface(model, lambda m: 1 / 0, plane, GRID, GRID)
    assert all(torch.equal(before[k], v) for k, v in bits(model).items())
    assert all(torch.equal(a[k], b[k]) for a, b in zip(points, kept, strict=True) for k in a)


def test_a_direction_that_is_not_kept_has_the_bits_of_one_that_is():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weights = ll.moved_weights(net(dtype=dtype))
        kept, drawn = (ll.random_directions(weights, 4, hold=hold) for hold in (True, False))
        assert all(
            torch.equal(kept.first[k], drawn.first[k])
            and torch.equal(kept.second[k], drawn.second[k])
            for k in weights
        )
        assert (
            not torch.equal(kept.first["0.weight"], kept.second["0.weight"])
            and kept.first["0.weight"].dtype is dtype
        )


def test_a_path_of_files_is_the_path_of_their_tensors(tmp_path):
    points = [{k: w.contiguous() for k, w in ll.moved_weights(net(t)).items()} for t in range(4)]
    before = [{k: w.clone() for k, w in point.items()} for point in points]
    for t, point in enumerate(points):
        save_file(point, tmp_path / f"{t}.safetensors")
    one, other = (
        ll.pca_directions(points),
        ll.pca_directions([tmp_path / f"{t}.safetensors" for t in range(4)]),
    )
    assert all(torch.allclose(one.first[k], other.first[k]) for k in points[0]) and np.allclose(
        one.path, other.path
    )
    assert all(torch.equal(a[k], b[k]) for a, b in zip(points, before, strict=True) for k in a)
    with pytest.raises(FileNotFoundError, match="9.safetensors"):
        ll.pca_directions([tmp_path / f"{t}.safetensors" for t in (0, 1, 9)])


def test_a_model_of_peft_is_drawn_when_it_is_merged_and_refused_before():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        net(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    ).eval()
    for call in (ll.moved_weights, lambda m: ll.random_sharpness(m, loss, 0.1)):
        with pytest.raises(lb.LoraBookError, match="merge_and_unload"):
            call(model)
    outputs, merged = model(X).detach(), copy.deepcopy(model).merge_and_unload()
    surface = ll.loss_surface(
        merged, loss, ll.random_directions(ll.moved_weights(merged)), [-0.5, 0.0, 0.5], [0.0]
    )
    assert math.isclose(surface.losses[1, 0], (outputs - Y).square().mean(), rel_tol=1e-6)


@given(st.lists(st.tuples(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_path_on_the_view_lies_on_a_surface_that_is_bilinear(points):
    a, b = np.linspace(-1, 1, 5), np.linspace(-1, 1, 3)
    surface = ll.Surface(
        a,
        b,
        2 + a[:, None] + 0.5 * b + 0.25 * a[:, None] * b,
        np.ones((5, 3), bool),
        np.array(points),
    )
    found, inside = (
        ll.on_surface(surface, 0.0, 4.0),
        [(x, y) for x, y in points if max(abs(x), abs(y)) <= 1],
    )
    assert len(found) == len(inside)
    for (i, j, share), (x, y) in zip(found, inside, strict=True):
        assert math.isclose(i, 2 * (x + 1), abs_tol=1e-3) and math.isclose(j, y + 1, abs_tol=1e-3)
        assert math.isclose(4 * share, 2 + x + 0.5 * y + 0.25 * x * y, abs_tol=5e-3)
    surface.losses[:] = math.nan
    assert ll.on_surface(surface, 0.0, 4.0) == []
    assert ll.on_surface(ll.Surface(a, b, surface.losses, surface.done), 0.0, 4.0) == []


WORKER = """
import numpy as np, torch, sys
from torch import nn
from lora_book.analysis.loss_landscape import loss_surface, moved_weights, random_directions
torch.manual_seed(0)
model = nn.Linear(4, 3).eval()
x = torch.ones(2, 4)
loss_surface(model, lambda m: m(x).square().mean(), random_directions(moved_weights(model)), np.linspace(-1, 1, 5), np.linspace(-1, 1, 5),
             path=sys.argv[1], part=(int(sys.argv[2]), 2))
"""


def test_two_processes_make_one_surface(tmp_path):
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path / str(i)), str(i)])
        for i in range(2)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    whole = ll.joined([ll.Surface.load(tmp_path / str(i)) for i in range(2)])
    assert whole.done.all() and np.isfinite(whole.losses).all()


def test_random_sharpness_grows_with_the_radius_and_is_reproducible():
    model = net()
    small, large = (ll.random_sharpness(model, loss, rho, 20)["mean_rise"] for rho in (0.01, 0.5))
    assert abs(small) < large and ll.random_sharpness(model, loss, 0.5, 20)["mean_rise"] == large


def test_the_global_random_state_is_left_alone():
    model, state = net(), torch.get_rng_state()
    ll.random_sharpness(model, loss, 0.1, 2)
    ll.random_directions(ll.moved_weights(model))
    assert torch.equal(state, torch.get_rng_state())


def test_pictures_share_levels_and_show_what_they_are_given():
    model = net()
    plane = ll.random_directions(ll.moved_weights(model))
    surface = ll.loss_surface(model, loss, plane, GRID, GRID)
    for draw in (ll.plot_contours, ll.plot_surface):
        figure = draw({"one": surface, "two": surface})
        assert [ax.get_title() for ax in figure.axes[:2]] == ["one", "two"]
        ll.plt.close(figure)
    blank = ll.Surface(GRID, GRID, np.full((4, 4), np.nan), np.ones((4, 4), bool))
    for draw in (ll.plot_contours, ll.plot_surface, ll.interactive):
        with pytest.raises(lb.LoraBookError, match="finite"):
            draw({"one": blank})
    along = ll.plot_contours(
        {
            "path": ll.Surface(
                GRID,
                GRID,
                surface.losses,
                surface.done,
                np.array([[0.5, 0.1], [0.0, 0.0]]),
                {"explained": [0.9, 0.05]},
            )
        }
    )
    assert "90%" in along.axes[0].get_xlabel() and "5%" in along.axes[0].get_ylabel()
    ll.plt.close(along)
    page = ll.interactive({"a<b": surface})
    assert (
        "a&lt;b" in page
        and "a<b" not in page
        and "http" not in page
        and "<canvas" in page
        and "aria-label" in page
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m, p: ll.loss_surface(m.train(), loss, p, GRID, GRID), "training mode"),
        (lambda m, p: ll.loss_surface(m, loss, p, GRID[::-1], GRID), "increasing"),
        (lambda m, p: ll.loss_surface(m, loss, p, [math.nan], GRID), "finite"),
        (lambda m, p: ll.loss_surface(m, loss, p, GRID, GRID, part=(2, 2)), "part"),
        (lambda m, p: ll.loss_surface(m, loss, p, GRID, GRID, save_every=0), "save"),
        (
            lambda m, p: ll.loss_surface(nn.Linear(4, 3).double().eval(), loss, p, GRID, GRID),
            "0.bias",
        ),
        (lambda m, p: ll.loss_surface("m", loss, p, GRID, GRID), "str"),
        (lambda m, p: ll.random_directions(p.centre, 0, "row"), "row"),
        (lambda m, p: ll.pca_directions([p.centre] * 2), "3 snapshots"),
        (lambda m, p: ll.pca_directions([p.centre] * 4), "one line"),
        (lambda m, p: ll.pca_directions([p.centre, p.first, {}]), "missing"),
        (lambda m, p: ll.random_sharpness(m, loss, 0), "radius"),
        (lambda m, p: ll.random_sharpness(m, loss, 1, 0), "draws"),
        (
            lambda m, p: ll.surface_sharpness(ll.loss_surface(m, loss, p, [0.0], [0.0]), 1),
            "6 finite",
        ),
        (
            lambda m, p: ll.surface_sharpness(ll.loss_surface(m, loss, p, GRID, GRID), 1),
            "one of them at",
        ),
        (lambda m, p: ll.normalised(p.first, {"w": X}), "agree"),
        (lambda m, p: ll.random_directions(m), "Sequential"),
        (lambda m, p: ll.random_directions({}), "at least one"),
        (lambda m, p: ll.random_directions({"n": torch.arange(3)}), "int64"),
        (lambda m, p: ll.random_directions(p.centre, hold="a"), "'a'"),
        (lambda m, p: ll.random_directions(p.centre, hold=1.5), "hold"),
        (lambda m, p: ll.pca_directions([m] * 3), "moved_weights"),
        (lambda m, p: ll.pca_directions(3), "list"),
        (
            lambda m, p: ll.pca_directions(
                [p.centre, {k: math.nan * w for k, w in p.centre.items()}, p.centre]
            ),
            "snapshot 1",
        ),
        (
            lambda m, p: ll.pca_directions(
                [p.centre, p.centre, {k: math.nan * w for k, w in p.centre.items()}]
            ),
            "the last snapshot",
        ),
        (lambda m, p: ll.loss_surface(m, loss, p.centre, GRID, GRID), "dict"),
        (lambda m, p: ll.loss_surface(m, loss, p, "ab", GRID), "'ab'"),
        (
            lambda m, p: ll.loss_surface(m, loss, ll.Directions(p.centre, {}, {}), GRID, GRID),
            "missing",
        ),
        (
            lambda m, p: ll.loss_surface(
                m,
                loss,
                ll.Directions(p.centre, {k: w.new_ones(1) for k, w in p.centre.items()}, p.second),
                GRID,
                GRID,
            ),
            "agree",
        ),
        (lambda m, p: p.coordinates({}), "missing"),
        (lambda m, p: ll.random_sharpness(m, loss, 0.1, weights={"w": X}), "missing"),
        (lambda m, p: ll.loss_surface(m, lambda m: m(X), p, GRID, GRID), r"\(16, 3\)"),
        (lambda m, p: ll.random_sharpness(m, lambda m: None, 0.1), "None"),
        (lambda m, p: ll.shared_levels([]), "finite"),
        (lambda m, p: ll.plot_contours({}), "finite"),
        (lambda m, p: ll.interactive({}), "finite"),
        (
            lambda m, p: ll.plot_contours({"line": ll.loss_surface(m, loss, p, GRID, [0.0])}),
            "2 points",
        ),
        (
            lambda m, p: ll.plot_surface({"line": ll.loss_surface(m, loss, p, GRID, [0.0])}),
            "2 points",
        ),
        (
            lambda m, p: ll.interactive({"line": ll.loss_surface(m, loss, p, GRID, [0.0])}),
            "2 points",
        ),
        (lambda m, p: ll.Surface.load("nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_refused_and_named(call, words):
    model = net()
    with pytest.raises(lb.LoraBookError, match=words):
        call(model, ll.random_directions(ll.moved_weights(model)))


def test_a_surface_written_into_the_model_would_be_noticed():
    def mutant(model, plane):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(plane.first[name]).sub_(plane.first[name])

    model = net(dtype=torch.float32)
    before = bits(model)
    mutant(model, ll.random_directions(ll.moved_weights(model)))
    assert any(not torch.equal(before[k], v) for k, v in bits(model).items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(torch.tanh(self.words(x)))


def test_tied_weights_move_together_under_one_name_or_two():
    model, ids = Tied().eval(), torch.arange(5)
    own_loss = lambda m: m(ids).square().mean()  # noqa: E731
    one = ll.random_directions(ll.moved_weights(model), 3)
    two = ll.random_directions(model.state_dict(), 3)
    assert set(one.centre) == {"words.weight"} and set(two.centre) == {"words.weight", "out.weight"}
    surfaces = [
        ll.loss_surface(model, own_loss, plane, [-0.5, 0.0, 0.5], [0.0, 0.3])
        for plane in (one, two)
    ]
    moved = Tied().eval()
    with torch.no_grad():
        moved.words.weight.copy_(
            model.words.weight + 0.5 * one.first["words.weight"] + 0.3 * one.second["words.weight"]
        )
    assert np.array_equal(surfaces[0].losses, surfaces[1].losses) and math.isclose(
        surfaces[0].losses[2, 1], own_loss(moved).item(), rel_tol=1e-6
    )
    assert model.out.weight is model.words.weight


def test_statistics_of_a_normalisation_move_when_a_state_dict_names_them():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    centre = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    shift = {
        name: torch.ones_like(t) if name == "1.running_mean" else torch.zeros_like(t)
        for name, t in centre.items()
    }
    surface = ll.loss_surface(
        model, lambda m: m(X).mean(), ll.Directions(centre, shift, shift), [0.0, 1.0], [0.0]
    )
    assert (
        math.isclose(
            surface.losses[0, 0] - surface.losses[1, 0], 1 / (1 + 1e-5) ** 0.5, rel_tol=1e-6
        )
        and not model[1].running_mean.any()
    )
    with pytest.raises(lb.LoraBookError, match="num_batches_tracked"):
        ll.random_directions(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_models_of_every_type_also_with_a_plane_of_another(dtype):
    model, wide = net(dtype=dtype), net()
    own_loss = lambda m: m(X.to(m[0].weight.dtype)).double().square().mean()  # noqa: E731
    for weights in (ll.moved_weights(model), model.state_dict(), ll.moved_weights(wide)):
        surface = ll.loss_surface(model, own_loss, ll.random_directions(weights, 1), GRID, GRID)
        exact = ll.loss_surface(
            wide,
            own_loss,
            ll.random_directions({k: w.double() for k, w in weights.items()}, 1),
            GRID,
            GRID,
        )
        assert (
            np.allclose(surface.losses, exact.losses, rtol=0.05)
            or weights["0.weight"].dtype is not torch.float64
        )
        assert np.isfinite(surface.losses).all() and model[0].weight.dtype is dtype
    rows = ll.random_directions(ll.moved_weights(model)).first["0.weight"]
    assert torch.allclose(
        rows.double().norm(dim=1), model[0].weight.double().norm(dim=1), rtol=torch.finfo(dtype).eps
    )


def test_weights_in_any_layout_give_the_same_plane():
    model, other = net(), net()
    other[0].weight = nn.Parameter(other[0].weight.detach().T.contiguous().T)
    assert not other[0].weight.is_contiguous()
    surfaces = [
        ll.loss_surface(m, loss, ll.random_directions(ll.moved_weights(m)), GRID, GRID).losses
        for m in (model, other)
    ]
    assert np.allclose(*surfaces, rtol=1e-12)
    points = [
        {
            k: w + 0.1 * t * t * torch.ones_like(w) + t * torch.eye(*w.shape) if w.dim() == 2 else w
            for k, w in ll.moved_weights(m).items()
        }
        for m in (model, other)
        for t in (2, 1, 0)
    ]
    planes = [ll.pca_directions(points[:3]), ll.pca_directions(points[3:])]
    assert all(torch.allclose(planes[0].first[k], planes[1].first[k]) for k in points[0])


def test_snapshots_that_carry_gradients_are_numbers_like_others():
    points = [dict(net(t).named_parameters()) for t in range(4)]
    plane, plain = (
        ll.pca_directions(points),
        ll.pca_directions([{k: p.detach() for k, p in point.items()} for point in points]),
    )
    assert all(
        torch.equal(plane.first[k], plain.first[k]) and not plane.first[k].requires_grad
        for k in points[0]
    )
    assert np.array_equal(plane.path, plain.path)
