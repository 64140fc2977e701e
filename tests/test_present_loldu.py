"""LoLDU: the definition, all starts, the constraints, gradients and saved memory of the fast
product, export, and what is refused.
"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_book as lb
from lora_book.core.adapter import Nudge, generator
from lora_book.core.laws import BrokenLaw, Case, check
from lora_book.core.ldu import leading, unpermute
from lora_book.core.products import saved_bytes
from lora_book.present import loldu as chapter
from lora_book.present.loldu import INITS, SIGMA_MIN, LoLDU, column_strips, loldu, row_strips, times

some = settings(max_examples=25, deadline=None)
inits = st.sampled_from(sorted(INITS))
KINDS = ("gaussian", "low rank", "zero", "hole", "integer")


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def weight(kind, n, m, seed):
    """A float64 weight of some kind: of full rank, of rank 1, zero, with a dead first column, or
    with repeated values.
    """
    W = draw(seed, n, m)
    if kind == "low rank":
        return draw(seed, n, 1) @ draw(seed + 1, 1, m)
    if kind == "hole":
        W[:, 0] = 0
    return torch.zeros(n, m).double() if kind == "zero" else W.round() if kind == "integer" else W


@st.composite
def weights(draw_from):
    n, m = draw_from(st.integers(1, 9)), draw_from(st.integers(1, 9))
    return weight(
        draw_from(st.sampled_from(KINDS)), n, m, draw_from(st.integers(0, 10**6))
    ), draw_from(st.integers(1, min(n, m)))


def model(W, dtype=torch.float64, bias=True):
    layer = nn.Linear(W.shape[1], W.shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(W)
        if bias:
            layer.bias.copy_(draw(5, W.shape[0]))
    return nn.Sequential(layer)


def adapted(W, **options):
    net = lb.adapt(model(W), "loldu", ["0"], **options)
    return net, lb.adapters(net)["0"]


def move(adapter, seed=3, size=0.5):
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * draw(seed, *p.shape).to(p))


def algorithm1(W, r, alpha, z):
    "P4's Algorithm 1 with a given start z: the effective weight, and z_r of the factorisation."
    PL, pivots, U = leading(W, r)
    sigma = alpha / r
    residual = W - sigma * PL @ torch.diag(pivots) @ U
    return residual + sigma * PL @ torch.diag(pivots if z is None else z) @ U


# The start


@some
@given(weights(), inits, st.integers(0, 5), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_start_is_algorithm_1s(drawn, init, seed, scale):
    W, r = drawn
    adapter = LoLDU(W, r=r, alpha=scale * r, init=init, seed=seed)
    want = algorithm1(W, r, scale * r, adapter.z.detach())
    assert torch.allclose(W + adapter.delta(W), want, atol=1e-9 * float(1 + want.abs().max()))
    assert torch.isfinite(adapter.delta(W)).all()


@some
@given(weights(), inits, st.integers(0, 5))
def test_every_start_is_w0_when_the_residual_is_taken_after_it(drawn, init, seed):
    W, r = drawn
    adapter = LoLDU(W, r=r, alpha=2.0 * r, init=init, seed=seed, keep_start=True)
    assert torch.equal(adapter.delta(W), torch.zeros_like(W))
    move(adapter)
    assert adapter.sigma == adapter.sigma0 or adapter.change().any()


@some
@given(weights())
def test_regular_starts_at_w0_bit_for_bit(drawn):
    W, r = drawn
    net, adapter = adapted(W, r=r)
    assert torch.equal(adapter.delta(W), torch.zeros_like(W)) and torch.equal(
        adapter.z, leading(W, r)[1]
    )
    if adapter.whole is None:
        x = draw(1, 4, W.shape[1])
        assert torch.equal(net(x), model(W)(x))


def test_what_each_start_is():
    W, r, n = draw(0, 50, 40), 30, 4000
    z = leading(W, r)[1]
    start = {init: LoLDU(W, r=r, init=init).z.detach() for init in INITS}
    assert (
        torch.equal(start["regular"], z)
        and not start["zeros"].any()
        and torch.equal(start["ones"], torch.ones(r).double())
    )
    assert torch.allclose(start["constant"], z.mean().expand(r))
    wide = {init: make(draw(1, n).abs(), generator(0)) for init, make in INITS.items()}
    mean, std = draw(1, n).abs().mean(), draw(1, n).abs().std()
    for init, half in (("uniform", 1), ("uniform_mean", mean / 2)):
        assert (
            wide[init].abs().max() <= half
            and abs(wide[init].std() / half - 1 / math.sqrt(3)) < 0.03
            and abs(wide[init].mean() / half) < 0.05
        )
    for init, centre, spread in (("normal", 0, 1), ("normal_mean", mean, std)):
        assert abs(wide[init].mean() - centre) < 0.06 and abs(wide[init].std() / spread - 1) < 0.05


@pytest.mark.parametrize("init", INITS)
def test_a_seed_fixes_the_start_and_the_global_state_is_left_alone(init):
    before = torch.get_rng_state()
    one, same, other = (LoLDU(draw(0, 8, 6), r=5, init=init, seed=s).z.detach() for s in (1, 1, 2))
    assert torch.equal(one, same) and torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, other) == (init in ("regular", "constant", "ones", "zeros"))


@pytest.mark.parametrize("init", INITS)
def test_rank_one_and_one_by_one_have_finite_starts(init):
    for W in (draw(0, 5, 3), draw(1, 1, 1), torch.zeros(1, 1).double()):
        assert torch.isfinite(LoLDU(W, r=1, init=init).z).all()


# The laws, for every start that keeps W0, and for the others all but the first


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "init, keep_start", [(init, keep) for init in INITS for keep in (False, True)]
)
def test_the_laws_hold_for_every_start(init, keep_start, dtype):
    @settings(max_examples=2, deadline=None)
    @given(
        st.sampled_from(["linear", "fused", "conv1d", "fused_conv1d"]),
        st.integers(1, 8),
        st.integers(1, 8),
        st.booleans(),
        st.integers(0, 10**5),
    )
    def run(host, n, m, full, seed):
        r = min(n, m) if full else max(1, min(n, m) // 2)
        case = Case(
            loldu, host, n, m, r, dtype, seed, options={"init": init, "keep_start": keep_start}
        )
        check(case, lambda n, m, r: r + 1, starts_at_zero=keep_start or init == "regular")

    run()


def test_a_start_that_forgets_the_order_of_phases_breaks_the_first_law():
    with pytest.raises(BrokenLaw, match="law 1"):
        check(Case(loldu, options={"init": "ones"}))


# Numbers trained


@some
@given(weights(), st.booleans())
def test_r_plus_one_numbers_with_r_degrees_of_freedom(drawn, train_scale):
    W, r = drawn
    net, adapter = adapted(W, r=r, train_scale=train_scale)
    assert lb.n_trainable(net) == r + train_scale
    move(adapter)
    if train_scale:
        z, sigma = adapter.z.detach().clone(), adapter.sigma.detach().clone()
        before = adapter.delta(W).detach()
        with torch.no_grad():
            adapter.z.copy_(z * 4)
            adapter.sigma.copy_(sigma / 4)
        assert torch.equal(adapter.delta(W), before)


def test_the_scale_has_its_own_learning_rate_or_none():
    net, adapter = adapted(draw(0, 5, 4), r=3, scale_lr_ratio=0.1)
    groups = {id(p): group["lr"] for group in lb.param_groups(net, 0.5) for p in group["params"]}
    assert groups == {id(adapter.z): 0.5, id(adapter.sigma): 0.05}
    net, adapter = adapted(draw(0, 5, 4), r=3, train_scale=False)
    assert [p for group in lb.param_groups(net, 0.5) for p in group["params"]] == [
        adapter.z
    ] and adapter.sigma == 1


# Gradients


def by_definition(W0, residual, bias, PL, U, z, sigma, x):
    return x @ (residual + sigma * PL @ torch.diag(z) @ U).T + bias


@some
@given(weights(), inits, st.booleans())
def test_gradients_equal_autograds_through_the_definition(drawn, init, keep_start):
    W, r = drawn
    net, adapter = adapted(W, r=r, alpha=1.5 * r, init=init, keep_start=keep_start)
    move(adapter)
    x, target = draw(7, 2, 3, W.shape[1]).requires_grad_(), draw(8, 2, 3, W.shape[0])
    PL, _, U = leading(W, r)
    want = by_definition(
        W, adapter.residual(W), net[0].bias.detach(), PL, U, adapter.z, adapter.sigma, x
    )
    size = max(1.0, want.abs().max().item())
    assert ((net(x) - want).abs() <= 1e-11 * size).all()
    wrt = (x, adapter.z, adapter.sigma)
    for ours, theirs in zip(
        *(torch.autograd.grad((y / size * target).sin().sum(), wrt) for y in (net(x), want)),
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= 1e-10 * max(1, theirs.abs().max())


@pytest.mark.parametrize("n, m", [(300, 300), (300, 410), (410, 300)])
def test_the_triangular_blocks_agree_with_the_definition(n, m):
    W, r = draw(0, n, m), min(n, m)
    net, adapter = adapted(W, r=r)
    assert adapter.whole == torch.float64 and r > 2 * chapter.BLOCK
    move(adapter, size=0.1)
    x, target = draw(7, 2 * chapter.ROWS + 3, m).requires_grad_(), draw(8, 2 * chapter.ROWS + 3, n)
    want = x @ (W + adapter.delta(W)).T + net[0].bias.detach()
    wrt = (x, adapter.z, adapter.sigma)
    assert (net(x) - want).abs().max() <= 1e-10 * want.abs().max()
    ours, theirs = (torch.autograd.grad((y * target).sum(), wrt) for y in (net(x), want))
    alone = torch.autograd.grad((net(x.detach()) * target).sum(), wrt[1:])
    for a, b in zip([*ours, *alone], [*theirs, *theirs[1:]], strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def test_the_factors_strips_are_cut_once_and_follow_the_factors():
    W, x = draw(0, 12, 12), draw(1, 5, 12)
    net, adapter = adapted(W, r=12)
    start, first = net(x), adapter.made
    assert torch.equal(net(x), start) and adapter.made is first
    adapter._apply(torch.clone)
    assert torch.equal(net(x), start) and adapter.made is not first, "the buffers were moved"
    twin = copy.deepcopy(net)
    lb.adapters(twin)["0"].right.zero_()
    assert torch.equal(twin(x), net[0].bias.expand(5, 12)) and torch.equal(net(x), start), (
        "a copy's strips are the copy's"
    )
    other = draw(2, 12, 12)
    adapter.rebase(other)
    with torch.no_grad():
        adapter.z.copy_(adapter.pivots)
    assert torch.allclose(net(x), x @ other.T + net[0].bias, atol=1e-12)


@pytest.mark.parametrize("rows, r", [("", 4), ("", 2), ("[q,v]", 4), ("[k]", 3)])
def test_second_derivatives(rows, r):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12).double()

        def forward(self, x):
            return self.qkv(x)

    net = Fused()
    with torch.no_grad():
        net.qkv.weight.copy_(draw(0, 12, 4))
        net.qkv.bias.copy_(draw(1, 12))
    lb.adapt(net, "loldu", [f"qkv{rows}"], r=r)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    x = draw(2, 3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x, *p: torch.func.functional_call(net, dict(zip(named, p, strict=True)), (x,)),
        (x, *named.values()),
    )


@some
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 100))
def test_products_with_triangles_are_products(r, more, block, seed):
    m, T = r + more - 1, 5
    U = draw(seed, r, m).triu()
    before, chapter.BLOCK = chapter.BLOCK, block
    try:
        assert torch.allclose(
            times(draw(1, T, r), column_strips(U), torch.empty(T, m).double()), draw(1, T, r) @ U
        )
        assert torch.allclose(
            times(draw(2, T, m), row_strips(U), torch.empty(T, r).double()), draw(2, T, m) @ U.T
        )
        if r > block:
            full = torch.ones(r, m).double()
            assert not torch.allclose(
                times(draw(1, T, r), column_strips(full), torch.empty(T, m).double()),
                draw(1, T, r) @ full,
            ), "nothing was skipped"
    finally:
        chapter.BLOCK = before


@pytest.mark.parametrize("r", [4, 96])
def test_the_backward_pass_keeps_t_times_r_numbers(r):
    net, T = lb.adapt(model(draw(0, 96, 96), torch.float32), "loldu", ["0"], r=r), 50
    x = draw(1, T, 96, dtype=torch.float32).requires_grad_()
    assert saved_bytes(lambda: net(x), [*net.parameters(), *net.buffers()]) <= 4 * (T * r + 2 * r)


# Whole blocks: when the factors may stand for the weight


def test_a_full_rank_block_takes_the_place_of_the_base_product_only_where_that_is_exact():
    square = draw(0, 12, 12)
    assert LoLDU(square, r=12).whole == torch.float64 and LoLDU(square, r=11).whole is None
    assert LoLDU(square.bfloat16(), r=12).whole is None, (
        "half precision would multiply the rounding errors"
    )
    dead = square.clone()
    dead[:, 3] = 0
    assert LoLDU(dead, r=12).whole is None, "a row was given up, the factors aren't the weight"
    shrinking = torch.eye(60).double() - torch.ones(60, 60).double().tril(-1)
    shrinking[:, -1] = 1
    assert LoLDU(shrinking.float(), r=60).whole is None, (
        "the pivots grow like 2^60: large numbers would cancel"
    )


def test_widening_the_model_computes_in_float64_even_for_a_whole_block():
    net = lb.adapt(model(draw(0, 12, 12), torch.float32), "loldu", ["0"], r=12)
    assert lb.adapters(net)["0"].whole == torch.float32
    move(lb.adapters(net)["0"])
    net.double()
    x = draw(1, 5, 12)
    want = x @ (net[0].weight + lb.delta(net)["0"]).T + net[0].bias
    assert (net(x) - want).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_singular_weights_train_without_nan(kind):
    net, adapter = adapted(weight(kind, 6, 5, 0), r=5, init="normal", keep_start=True)
    optimizer = torch.optim.AdamW(lb.param_groups(net, 0.01))
    x, y = draw(1, 20, 5), draw(2, 20, 6)
    for _ in range(5):
        lb.train_step(net, optimizer, lambda: (net(x) - y).square().mean())
    assert all(torch.isfinite(p).all() for p in net.parameters())


# Projection


@some
@given(weights(), st.floats(0.1, 3), st.floats(0.01, 1), inits)
def test_projected_steps_stay_in_the_set(drawn, eps, share, init):
    W, r = drawn
    net, adapter = adapted(W, r=r, alpha=share * r, project=True, eps=eps, init=init)
    optimizer = torch.optim.SGD(lb.param_groups(net, 10.0))
    x, y = draw(1, 9, W.shape[1]), draw(2, 9, W.shape[0])
    for _ in range(3):
        lb.train_step(net, optimizer, lambda: (net(x) - y).abs().sum())
        assert adapter.z.norm() <= eps * (1 + 1e-12) and SIGMA_MIN <= adapter.sigma <= 1


def test_the_projection_is_the_nearest_point_and_leaves_feasible_points_alone():
    adapter = LoLDU(draw(0, 6, 6), r=4, project=True, eps=2.0)
    for scale, sigma, nearest in ((0.1, 0.5, 0.5), (50, 1.7, 1.0), (50, -0.3, SIGMA_MIN)):
        with torch.no_grad():
            adapter.z.copy_(scale * draw(1, 4))
            adapter.sigma.fill_(sigma)
        z = adapter.z.detach().clone()
        adapter.constrain()
        assert (
            torch.allclose(adapter.z, z * min(1, 2 / float(z.norm()))) and adapter.sigma == nearest
        )


@pytest.mark.parametrize("init", INITS)
def test_the_default_bound_admits_the_start(init):
    adapter = LoLDU(draw(0, 9, 9), r=9, project=True, init=init)
    z = adapter.z.detach().clone()
    adapter.constrain()
    assert torch.allclose(adapter.z, z, rtol=1e-12) and adapter.eps >= leading(draw(0, 9, 9), 9)[
        1
    ].norm() * (1 - 1e-12)


def test_without_project_nothing_is_projected():
    net, adapter = adapted(draw(0, 5, 5), r=5, alpha=20)
    assert adapter.sigma == 4
    adapter.constrain()
    assert adapter.sigma == 4 and torch.equal(adapter.z, adapter.pivots)


# Around the adapter


@pytest.mark.parametrize(
    "init, keep_start, r", [("regular", False, 6), ("uniform", True, 6), ("normal_mean", False, 2)]
)
def test_z_sigma_and_the_pivots_are_stored_and_reload_with_the_same_bits(
    tmp_path, init, keep_start, r
):
    net, adapter = adapted(draw(0, 6, 8), r=r, init=init, keep_start=keep_start, seed=3)
    move(adapter)
    lb.save(net, tmp_path)
    from safetensors.torch import load_file

    (path,) = tmp_path.glob("*.safetensors")
    assert sum(t.numel() for t in load_file(path).values()) == 2 * r + 1
    again, x = lb.load(model(draw(0, 6, 8)), tmp_path), draw(1, 4, 8)
    assert torch.equal(again(x), net(x)) and torch.equal(copy.deepcopy(net)(x), net(x))
    with pytest.raises(lb.LoraBookError, match="base"):
        lb.load(model(draw(9, 6, 8)), tmp_path)


@pytest.mark.parametrize(
    "init, keep_start, r", [("regular", False, 6), ("uniform", True, 6), ("normal_mean", True, 2)]
)
def test_a_state_dict_carries_over_to_a_model_that_was_adapted_on_another_base(init, keep_start, r):
    one, other = (
        adapted(draw(seed, 6, 8), r=r, init=init, keep_start=keep_start, seed=3)[0]
        for seed in (0, 9)
    )
    move(lb.adapters(one)["0"])
    x = draw(1, 4, 8)
    assert not torch.allclose(other(x), one(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x)) and torch.equal(lb.delta(other)["0"], lb.delta(one)["0"])


def halves(dtype, seed=0, r=6, trained=True, **options):
    """Three models on one weight: adapted in float32 and then rounded, adapted after rounding, and
    adapted in float32.
    """
    W = draw(seed, 6, 8).float()
    made = [lb.adapt(model(W, torch.float32), "loldu", ["0"], r=r, **options) for _ in range(2)]
    made.insert(1, lb.adapt(model(W, torch.float32).to(dtype), "loldu", ["0"], r=r, **options))
    if trained:
        for one in made:
            move(lb.adapters(one)["0"])
    made[0].to(dtype)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [1, 3, 6])
@pytest.mark.parametrize("options", [{}, {"init": "uniform", "keep_start": True}], ids=str)
def test_a_rounded_model_keeps_its_triangles(dtype, r, options, tmp_path):
    rounded, inside, plain = halves(dtype, r=r, **options)
    want, x = lb.delta(plain)["0"], draw(1, 4, 8).to(dtype)
    assert torch.equal(lb.delta(rounded)["0"], want)
    lb.save(rounded, tmp_path)
    W = draw(0, 6, 8).float()
    for base in (model(W, torch.float32).to(dtype), model(W, torch.float32)):
        again = lb.load(base, tmp_path)
        assert torch.equal(lb.delta(again)["0"], want)
        assert torch.equal(again.to(dtype)(x), rounded(x))
        lb.save(again, tmp_path)
    inside.load_state_dict(rounded.state_dict())
    assert torch.equal(lb.delta(inside)["0"], want) and torch.equal(inside(x), rounded(x))
    copied = copy.deepcopy(rounded).float()
    change = nn.functional.linear(x.float(), copied[0].weight + want, copied[0].bias)
    assert torch.allclose(copied(x.float()), change, atol=1e-4)
    rounded.load_state_dict(plain.state_dict())
    assert torch.equal(lb.delta(rounded)["0"], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_between_the_triangles_of_the_unrounded_weight_are_refused(dtype, tmp_path):
    _, inside, plain = halves(dtype)
    before = {name: t.clone() for name, t in inside.state_dict().items()}
    change = lb.delta(inside)["0"]
    with pytest.raises(RuntimeError, match="triangles"):
        inside.load_state_dict(plain.state_dict())
    assert torch.equal(lb.delta(inside)["0"], change)
    assert torch.equal(inside.state_dict()["0.adapters.all.z"], before["0.adapters.all.z"])
    lb.save(plain, tmp_path)
    base = model(draw(0, 6, 8).float(), torch.float32).to(dtype)
    kept = copy.deepcopy(base.state_dict())
    with pytest.raises(lb.LoraBookError, match="triangles"):
        lb.load(base, tmp_path)
    assert all(torch.equal(t, kept[name]) for name, t in base.state_dict().items())
    lb.load(model(draw(0, 6, 8).float(), torch.float32), tmp_path)


def test_a_weight_that_is_loaded_later_gives_new_triangles_that_need_no_place():
    rounded, inside, _ = halves(torch.bfloat16)
    assert "0.adapters.all.left" in rounded.state_dict()
    other = halves(torch.bfloat16, seed=5)[1]
    rounded.load_state_dict(other.state_dict())
    assert torch.equal(lb.delta(rounded)["0"], lb.delta(other)["0"])
    assert "0.adapters.all.left" not in rounded.state_dict()
    wide = copy.deepcopy(inside).float().bfloat16()
    assert "0.adapters.all.left" not in wide.state_dict()


def test_the_factors_are_the_change():
    W = draw(0, 7, 5)
    adapter = LoLDU(W, r=3, init="normal", alpha=2.0)
    move(adapter)
    ((A, B, s),) = adapter.factors(W)
    assert A.shape == (3, 5) and B.shape == (7, 3) and torch.allclose(s * B @ A, adapter.delta(W))
    on_residual = (
        adapter.residual(W)
        + adapter.ordered(adapter.left) @ torch.diag(adapter.sigma * adapter.z) @ adapter.right
    )
    assert torch.allclose(on_residual, W + adapter.delta(W), atol=1e-12)


@pytest.mark.parametrize("r", [3, 8])
def test_exported_to_peft_the_outputs_are_the_same(tmp_path, r):
    peft = pytest.importorskip("peft")
    net, x = lb.adapt(model(draw(0, 8, 8)), "loldu", ["0"], r=r, init="uniform"), draw(1, 5, 8)
    move(lb.adapters(net)["0"], size=0.1)
    want = net(x).detach()
    lb.to_peft(net, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(draw(0, 8, 8)), tmp_path)
    assert (theirs(x) - want).abs().max() < 1e-5
    assert theirs.peft_config["default"].r == r


@some
@given(weights(), st.integers(0, 100))
def test_the_tangent_is_the_derivative_along_it(drawn, seed):
    W, r = drawn
    adapter = LoLDU(W, r=r, init="normal")
    M = {"z": draw(seed, r), "sigma": draw(seed + 1)}
    _, want = torch.func.jvp(
        lambda z, sigma: torch.func.functional_call(
            Delta(adapter), {"a.z": z, "a.sigma": sigma}, (W,)
        ),
        (adapter.z.detach(), adapter.sigma.detach()),
        (M["z"], M["sigma"]),
    )
    assert torch.allclose(adapter.tangent(M, W), want, atol=1e-10 * float(1 + want.abs().max()))
    ((A, B, s),) = adapter.direction(M, W)
    assert torch.allclose(
        s * B @ A, adapter.tangent(M, W), atol=1e-10 * float(1 + want.abs().max())
    )
    assert torch.allclose(
        adapter.tangent({"z": M["z"]}, W) + adapter.tangent({"sigma": M["sigma"]}, W),
        adapter.tangent(M, W),
        atol=1e-10 * float(1 + want.abs().max()),
    )


@pytest.mark.parametrize("r", [3, 6])
def test_a_moved_weight_moves_a_whole_block_too(r):
    W, x = draw(0, 6, 6), draw(1, 4, 6)
    net, adapter = adapted(W, r=r)
    plain, M = net(x).detach(), {"z": draw(2, r), "sigma": draw(3)}
    adapter.nudge = Nudge(M, 0.25)
    assert torch.allclose(net(x) - plain, 0.25 * x @ adapter.tangent(M, W).T, atol=1e-12)


class Delta(nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.a = adapter

    def forward(self, W0):
        return self.a.delta(W0)


# What is refused

BAD = [
    ({"r": 0}, "r must be"),
    ({"r": 5}, "min"),
    ({"r": 2.5}, "r must be"),
    ({"init": "unifrom"}, "uniform"),
    ({"init": None}, "init"),
    ({"project": True, "alpha": 9}, "alpha/r = 3"),
    ({"project": True, "eps": 0}, "eps"),
    ({"project": True, "eps": -1.0}, "eps"),
    ({"eps": 1.0}, "project=True"),
    ({"project": True, "eps": float("nan")}, "eps"),
    ({"project": 1}, "project"),
    ({"keep_start": "yes"}, "keep_start"),
    ({"train_scale": None}, "train_scale"),
    ({"scale_lr_ratio": 0}, "scale_lr_ratio"),
    ({"alpha": 0}, "alpha"),
    ({"inti": "ones"}, "init"),
    ({"project": True, "alpha": 9, "train_scale": False}, "alpha/r"),
]


@pytest.mark.parametrize("options, message", BAD, ids=lambda o: str(o)[:40])
def test_bad_options_are_refused_and_the_model_is_untouched(options, message):
    net = model(draw(0, 5, 4))
    state, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    with pytest.raises(lb.LoraBookError, match=message) as caught:
        lb.adapt(net, "loldu", ["0"], **({"r": 3} | options))
    assert isinstance(caught.value, (ValueError, TypeError, KeyError))
    assert type(net[0]) is nn.Linear and flags == [p.requires_grad for p in net.parameters()]
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    W = draw(0, 5, 4)
    W[2, 1] = value
    net = model(W)
    with pytest.raises(lb.LoraBookError, match="NaN or infinite"):
        lb.adapt(net, "loldu", ["0"], r=2)
    assert type(net[0]) is nn.Linear and list(net.state_dict()) == ["0.weight", "0.bias"]


# Mutants: each would be a plausible way to write the method


def dense_transposed(adapter, W):
    "The permutation applied in the wrong direction."
    return ((adapter.left * adapter.change()) @ adapter.right)[adapter.order]


def residual_after(adapter, W):
    "The start of `keep_start` taken for the paper's order."
    return unpermute(
        adapter.order,
        (adapter.left * (adapter.sigma * adapter.z - adapter.sigma0 * adapter.z.detach()))
        @ adapter.right,
    )


def dsm_as_change(adapter, W):
    "P4's equation (8) read as the change of the weight."
    return unpermute(adapter.order, (adapter.left * (adapter.sigma * adapter.z)) @ adapter.right)


@pytest.mark.parametrize("mutant", [dense_transposed, residual_after, dsm_as_change])
def test_mutants_of_the_definition_are_caught(mutant):
    W = draw(4, 6, 6)
    adapter = LoLDU(W, r=6, init="ones")
    want = algorithm1(W, 6, 6.0, adapter.z.detach())
    assert torch.allclose(W + adapter.delta(W), want, atol=1e-10) and not torch.equal(
        adapter.order, adapter.inverse
    )
    assert not torch.allclose(W + mutant(adapter, W), want, atol=1e-3)
