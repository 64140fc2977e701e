"""Landscapes: closed forms, invariances, promised norms, untouched models, resuming, marked points, bad input."""
import copy
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
    flip = [{k: -v if flipped else v for k, v in d.items()} for d, flipped in ((plane.first, first), (plane.second, second))]
    one = ll.loss_surface(model, loss, plane, GRID, GRID).losses
    other = ll.loss_surface(model, loss, ll.Directions(plane.centre, *flip), GRID, GRID).losses
    assert np.allclose(other, one[::-1 if first else 1, ::-1 if second else 1], rtol=1e-10)


@given(st.integers(0, 10**6), st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_directions_have_the_promised_norms(seed, scale):
    weights = {k: scale * w for k, w in ll.moved_weights(net(seed)).items()}
    rows, layers = ll.random_directions(weights, seed, "filter"), ll.random_directions(weights, seed, "layer")
    for side in ("first", "second"):
        for name, w in weights.items():
            d, e = getattr(rows, side)[name], getattr(layers, side)[name]
            if w.dim() < 2:
                assert not d.any() and not e.any()
            else:
                assert torch.allclose(d.norm(dim=1), w.norm(dim=1)) and torch.isclose(e.norm(), w.norm())
    raw = ll.random_directions(weights, seed, "none").first
    assert math.isclose(ll.inner(raw, raw) ** 0.5, sum(w.numel() for w in weights.values()) ** 0.5, rel_tol=0.5)


@given(st.integers(3, 7), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_pca_is_the_singular_value_decomposition_of_the_steps(steps, seed):
    points = [{"a": torch.randn(3, 4, generator=generator(seed, t, "a"), dtype=torch.float64),
               "b": torch.randn(5, generator=generator(seed, t, "b"), dtype=torch.float64)} for t in range(steps)]
    plane = ll.pca_directions(points)
    M = torch.stack([torch.cat([(p[k] - points[-1][k]).flatten() for k in "ab"]) for p in points[:-1]])
    _, S, Vh = torch.linalg.svd(M, full_matrices=False)
    for side, v in zip((plane.first, plane.second), Vh, strict=False):
        assert abs(float(torch.cat([side[k].flatten() for k in "ab"]) @ v)) > 1 - 1e-9
    assert np.allclose(plane.explained, (S[:2] ** 2 / (S ** 2).sum()).numpy()) and abs(ll.inner(plane.first, plane.second)) < 1e-9
    assert np.allclose(np.abs(plane.path[:-1]), np.abs((M @ Vh[:2].T).numpy()), atol=1e-9) and np.allclose(plane.path[-1], 0)
    assert (plane.path[0] >= -1e-12).all()


@pytest.mark.parametrize("method, options", [("lora", {}), ("full", {}), ("bitfit", {}), ("cola", {"chain_length": 2}), ("cla", {})])
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
        ll.loss_surface(model, partial(killed, after=7), plane, GRID, GRID, path=tmp_path / "s", save_every=2)
    assert ll.Surface.load(tmp_path / "s").done.sum() == 6
    told = []
    again = ll.loss_surface(model, loss, plane, GRID, GRID, path=tmp_path / "s", progress=lambda *at: told.append(at))
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
    assert np.array_equal(ll.joined(parts).losses, ll.loss_surface(model, loss, plane, GRID, GRID).losses)
    assert sum(int(p.done.sum()) for p in parts) == GRID.size ** 2
    other = ll.loss_surface(model, loss, ll.random_directions(ll.moved_weights(model), 9), GRID, GRID)
    for bad in ([], [parts[0], other]):
        with pytest.raises(lb.LoraBookError):
            ll.joined(bad)


def test_points_that_arent_finite_are_marked_and_counted_not_drawn_as_numbers():
    model = net()
    plane = ll.random_directions(ll.moved_weights(model))
    fine = np.linspace(-0.6, 0.6, 7)
    first = model[0].weight[0, 0].item()
    surface = ll.loss_surface(model, lambda m: loss(m) if m[0].weight[0, 0].item() <= first + 1e-12 else math.nan, plane, fine, fine)
    assert 0 < surface.bad.sum() < surface.bad.size and surface.done.all()
    assert ll.surface_sharpness(surface, 0.7)["bad_points"] > 0
    assert "null" in ll.interactive({"one": surface}) and "NaN" not in ll.interactive({"one": surface})
    with pytest.raises(lb.LoraBookError, match="finite"):
        ll.random_sharpness(model, lambda m: math.nan, 0.1)


@given(st.floats(0.1, 10), st.floats(0.1, 10))
@settings(max_examples=15, deadline=None)
def test_sharpness_of_a_bowl_is_its_curvature(p, q):
    a = np.linspace(-1, 1, 9)
    bowl = ll.Surface(a, a, p * a[:, None] ** 2 + q * a ** 2 + 3, np.ones((9, 9), bool))
    found = ll.surface_sharpness(bowl, 1.0)
    assert math.isclose(found["curvature"], 2 * (p + q), rel_tol=1e-6) and math.isclose(found["largest_rise"], max(p, q), rel_tol=1e-6)
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
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.seen | self.given:
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


@pytest.mark.parametrize("use, copies", [
    (lambda model: ll.loss_surface(model, small_loss, ll.random_directions(ll.moved_weights(model, copy=False)), GRID, GRID), 1.5),
    (lambda model: ll.random_sharpness(model, small_loss, 0.1, 3), 1.5),
    (lambda model: ll.loss_surface(model, small_loss, ll.random_directions(ll.moved_weights(model), hold=True), GRID, GRID), None)])
def test_a_random_plane_needs_less_than_two_copies_of_the_model(use, copies):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)]).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = peak_of(lambda: use(model), *model.parameters())
    assert size <= peak < copies * size if copies else peak > 3 * size


def small_loss(model):
    return model(torch.ones(1, 64)).square().mean()


def test_a_direction_that_is_not_kept_has_the_bits_of_one_that_is():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weights = ll.moved_weights(net(dtype=dtype))
        kept, drawn = (ll.random_directions(weights, 4, hold=hold) for hold in (True, False))
        assert all(torch.equal(kept.first[k], drawn.first[k]) and torch.equal(kept.second[k], drawn.second[k]) for k in weights)
        assert not torch.equal(kept.first["0.weight"], kept.second["0.weight"]) and kept.first["0.weight"].dtype is dtype


def test_a_path_of_files_is_the_path_of_their_tensors(tmp_path):
    points = [{k: w.contiguous() for k, w in ll.moved_weights(net(t)).items()} for t in range(4)]
    before = [{k: w.clone() for k, w in point.items()} for point in points]
    for t, point in enumerate(points):
        save_file(point, tmp_path / f"{t}.safetensors")
    one, other = ll.pca_directions(points), ll.pca_directions([tmp_path / f"{t}.safetensors" for t in range(4)])
    assert all(torch.allclose(one.first[k], other.first[k]) for k in points[0]) and np.allclose(one.path, other.path)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(points, before, strict=True) for k in a)
    with pytest.raises(FileNotFoundError, match="9.safetensors"):
        ll.pca_directions([tmp_path / f"{t}.safetensors" for t in (0, 1, 9)])


def test_a_model_of_peft_is_drawn_when_it_is_merged_and_refused_before():
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    for call in (ll.moved_weights, lambda m: ll.random_sharpness(m, loss, 0.1)):
        with pytest.raises(lb.LoraBookError, match="merge_and_unload"):
            call(model)
    outputs, merged = model(X).detach(), copy.deepcopy(model).merge_and_unload()
    surface = ll.loss_surface(merged, loss, ll.random_directions(ll.moved_weights(merged)), [-0.5, 0.0, 0.5], [0.0])
    assert math.isclose(surface.losses[1, 0], (outputs - Y).square().mean(), rel_tol=1e-6)


@given(st.lists(st.tuples(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_path_on_the_view_lies_on_a_surface_that_is_bilinear(points):
    a, b = np.linspace(-1, 1, 5), np.linspace(-1, 1, 3)
    surface = ll.Surface(a, b, 2 + a[:, None] + 0.5 * b + 0.25 * a[:, None] * b, np.ones((5, 3), bool), np.array(points))
    found, inside = ll.on_surface(surface, 0.0, 4.0), [(x, y) for x, y in points if max(abs(x), abs(y)) <= 1]
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
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path / str(i)), str(i)]) for i in range(2)]
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
    along = ll.plot_contours({"path": ll.Surface(GRID, GRID, surface.losses, surface.done, np.array([[0.5, 0.1], [0.0, 0.0]]), {"explained": [0.9, 0.05]})})
    assert "90%" in along.axes[0].get_xlabel() and "5%" in along.axes[0].get_ylabel()
    ll.plt.close(along)
    page = ll.interactive({"a<b": surface})
    assert "a&lt;b" in page and "a<b" not in page and "http" not in page and "<canvas" in page and "aria-label" in page


@pytest.mark.parametrize("call, words", [
    (lambda m, p: ll.loss_surface(m.train(), loss, p, GRID, GRID), "training mode"),
    (lambda m, p: ll.loss_surface(m, loss, p, GRID[::-1], GRID), "increasing"), (lambda m, p: ll.loss_surface(m, loss, p, [math.nan], GRID), "finite"),
    (lambda m, p: ll.loss_surface(m, loss, p, GRID, GRID, part=(2, 2)), "part"), (lambda m, p: ll.loss_surface(m, loss, p, GRID, GRID, save_every=0), "save"),
    (lambda m, p: ll.loss_surface(nn.Linear(4, 3).double().eval(), loss, p, GRID, GRID), "0.bias"), (lambda m, p: ll.loss_surface("m", loss, p, GRID, GRID), "str"),
    (lambda m, p: ll.random_directions(p.centre, 0, "row"), "row"), (lambda m, p: ll.pca_directions([p.centre] * 2), "3 snapshots"),
    (lambda m, p: ll.pca_directions([p.centre] * 4), "one line"), (lambda m, p: ll.pca_directions([p.centre, p.first, {}]), "missing"),
    (lambda m, p: ll.random_sharpness(m, loss, 0), "radius"), (lambda m, p: ll.random_sharpness(m, loss, 1, 0), "draws"),
    (lambda m, p: ll.surface_sharpness(ll.loss_surface(m, loss, p, [0.0], [0.0]), 1), "6 finite"),
    (lambda m, p: ll.surface_sharpness(ll.loss_surface(m, loss, p, GRID, GRID), 1), "one of them at"),
    (lambda m, p: ll.normalised(p.first, {"w": X}), "agree"), (lambda m, p: ll.Surface.load("nowhere"), "nowhere")])
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
