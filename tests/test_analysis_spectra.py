"""Spectra: definitions against brute force, invariances, what pairs of weights are, files, bad
input.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_book as lb
from lora_book.analysis import spectra as sp
from lora_book.core.adapter import generator

MATRICES = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))


def drawn(n, m, seed, *batch):
    return torch.randn(*batch, n, m, generator=generator(seed, "spectra"), dtype=torch.float64)


@given(MATRICES)
@settings(max_examples=40, deadline=None)
def test_ranks_are_their_definitions_and_lie_between_one_and_the_rank(case):
    n, m, seed = case
    D = drawn(n, m, seed)
    values = [
        math.sqrt(max(v, 0)) for v in torch.linalg.eigvalsh(D @ D.T if n <= m else D.T @ D).tolist()
    ]
    shares = [v / sum(values) for v in values]
    assert math.isclose(
        sp.effective_rank(D), math.exp(-sum(p * math.log(p) for p in shares if p > 0)), rel_tol=1e-6
    )
    assert math.isclose(
        sp.stable_rank(D), sum(v * v for v in values) / max(values) ** 2, rel_tol=1e-6
    )
    assert (
        1 - 1e-9
        <= sp.stable_rank(D)
        <= sum(values) / max(values) + 1e-9
        <= sp.effective_rank(D) + 2e-9
        <= min(n, m) + 1e-6
    )


@given(MATRICES, st.floats(1e-6, 1e6))
@settings(max_examples=25, deadline=None)
def test_ranks_ignore_scale_transposition_and_rotation(case, scale):
    n, m, seed = case
    D, Q = drawn(n, m, seed), torch.linalg.qr(drawn(n, n, seed + 1)).Q
    for f in (sp.effective_rank, sp.stable_rank):
        for other in (scale * D, D.T, Q @ D):
            assert torch.isclose(f(D), f(other), rtol=1e-8)


def test_ranks_of_a_stack_are_the_ranks_of_its_matrices_and_zero_has_rank_zero():
    stack = torch.cat([drawn(5, 3, 0, 4), torch.zeros(1, 5, 3, dtype=torch.float64)])
    for f in (sp.effective_rank, sp.stable_rank):
        assert torch.allclose(f(stack), torch.stack([f(D) for D in stack])) and f(stack)[-1] == 0


@given(MATRICES, st.data())
@settings(max_examples=30, deadline=None)
def test_overlap_is_the_sum_of_squared_cosines(case, data):
    n, m, seed = case
    i, j = (data.draw(st.integers(1, min(n, m))) for _ in "ij")
    side = data.draw(st.sampled_from(["left", "right"]))
    D, E = drawn(n, m, seed), drawn(n, m, seed + 1)
    U, V = sp.leading(D, i, side), sp.leading(E, j, side)
    brute = sum(float(U[:, a] @ V[:, b]) ** 2 for a in range(i) for b in range(j)) / min(i, j)
    got = sp.overlap(D, E, i, j, side)
    assert math.isclose(got, brute, abs_tol=1e-10) and -1e-12 <= got <= 1 + 1e-9
    assert math.isclose(got, sp.overlap(E, D, j, i, side), abs_tol=1e-10)
    assert math.isclose(
        got, sp.principal_angles(U, V).cos().square().sum() / min(i, j), abs_tol=1e-10
    )
    assert torch.isclose(sp.overlap(D, -3 * D, i, j, side), torch.tensor(1.0, dtype=torch.float64))


@given(MATRICES)
@settings(max_examples=20, deadline=None)
def test_alignment_is_a_cosine_with_the_sign_of_descent(case):
    D, G = drawn(*case), drawn(case[0], case[1], case[2] + 1)
    assert math.isclose(
        sp.alignment(D, G),
        -torch.nn.functional.cosine_similarity(D.flatten(), G.flatten(), 0),
        abs_tol=1e-12,
    )
    assert math.isclose(sp.alignment(-2 * G, G), 1) and math.isclose(sp.alignment(G, G), -1)
    assert sp.alignment(0 * D, G).isnan()


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()


def test_pairs_of_an_adapted_model_a_merged_one_and_two_state_dicts_agree(tmp_path):
    base, model = small(), small()
    lb.adapt(model, "lora", ["0"], r=2, seed=1)
    with torch.no_grad():
        next(iter(lb.adapters(model).values())).B.normal_(generator=generator(3))
    W0, W1 = sp.weight_pairs(model)["0"]
    assert torch.allclose(W1 - W0, lb.delta(model)["0"]) and torch.equal(W0, base[0].weight)
    effective = sp.weights_of(model)["0.weight"]
    lb.merge(model)
    assert torch.equal(sp.weight_pairs(model)["0"][1], W1) and torch.equal(
        sp.weights_of(model)["0.weight"], effective
    )
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    lb.unmerge(model)
    lb.merge(model, unload=True)
    found = sp.weight_pairs(str(tmp_path / "base.safetensors"), model.state_dict())
    assert (
        set(found) == {"0.weight", "2.weight"}
        and torch.equal(found["0.weight"][1], W1)
        and torch.equal(*found["2.weight"])
    )


def test_pairs_of_a_model_merged_by_peft():
    from peft import LoraConfig, get_peft_model

    base, tuned = (
        small(),
        get_peft_model(small(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)),
    )
    D = tuned.base_model.model[0].get_delta_weight("default").detach()
    found = sp.weight_pairs(base, tuned.merge_and_unload())
    assert (
        torch.allclose(found["0.weight"][1] - found["0.weight"][0], D.double())
        and sp.stable_rank(D) > 1
    )


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 5}])
def test_a_model_of_peft_gives_what_it_computes_under_plain_names(options):
    from peft import LoraConfig, get_peft_model

    base = small()
    tuned = get_peft_model(
        small(),
        LoraConfig(
            r=2, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False, **options
        ),
    ).eval()
    with torch.no_grad():
        tuned.base_model.model[2].modules_to_save["default"].weight.add_(1)
    found, bits = sp.weights_of(tuned), {k: v.clone() for k, v in tuned.state_dict().items()}
    x = torch.randn(4, 5, generator=generator(0), dtype=torch.float64)
    hidden = torch.tanh(x @ found["0.weight"].T + base[0].bias)
    assert set(found) == {"0.weight", "2.weight"} and torch.allclose(
        tuned(x), hidden @ found["2.weight"].T + base[2].bias, atol=1e-6
    )
    assert all(torch.equal(bits[k], v) for k, v in tuned.state_dict().items())
    ((W0, W1),) = sp.weight_pairs(tuned).values()
    assert (
        torch.equal(W0, base[0].weight)
        and torch.equal(W1, found["0.weight"])
        and not torch.equal(W0, W1)
    )
    assert torch.equal(sp.weight_pairs(base, tuned)["2.weight"][1], base[2].weight + 1)
    with tuned.disable_adapter():
        assert torch.equal(sp.weights_of(tuned)["0.weight"], base[0].weight)
    tuned.merge_adapter()
    assert torch.allclose(sp.weight_pairs(tuned)["0"][0], W0) and torch.equal(
        sp.weights_of(tuned)["0.weight"], W1
    )


def test_a_gradient_in_training_mode_is_refused():
    with pytest.raises(lb.LoraBookError, match="training mode"):
        sp.weight_gradients(
            small().train(), lambda m: m(torch.ones(1, 5, dtype=torch.float64)).sum()
        )


def test_a_file_is_read_tensor_by_tensor_and_refused_when_damaged(tmp_path):
    save_file({"a": torch.eye(2), "b": torch.ones(3)}, tmp_path / "x.safetensors")
    stored = sp.Stored(tmp_path / "x.safetensors")
    assert (
        set(stored) == {"a", "b"}
        and len(stored) == 2
        and torch.equal(stored["a"], torch.eye(2))
        and "c" not in stored
    )
    (tmp_path / "y.safetensors").write_bytes(b"nothing")
    with pytest.raises(lb.LoraBookError, match="y.safetensors"):
        sp.weights_of(tmp_path / "y.safetensors")


def test_a_transposed_module_gives_out_by_in():
    model = nn.Sequential(Conv1D(6, 4)).eval()
    assert sp.weights_of(model)["0.weight"].shape == (6, 4) and sp.weights_of(model.state_dict())[
        "0.weight"
    ].shape == (4, 6)
    x = torch.randn(3, 4, generator=generator(0))
    G = sp.weight_gradients(model, lambda m: m(x).square().sum())["0.weight"]
    assert torch.allclose(G, 2 * model(x).detach().T @ x, atol=1e-5)


def test_weight_gradients_leave_flags_and_gradients_alone_also_when_the_loss_raises():
    model = small().requires_grad_(False)
    x = torch.randn(4, 5, generator=generator(0), dtype=torch.float64)
    W = model[0].weight.clone().requires_grad_()
    (want,) = torch.autograd.grad(model[2](torch.tanh(x @ W.T + model[0].bias)).square().sum(), W)
    assert torch.allclose(
        sp.weight_gradients(model, lambda m: m(x).square().sum(), ["0.weight"])["0.weight"], want
    )
    with pytest.raises(ZeroDivisionError):
        sp.weight_gradients(model, lambda m: 1 / 0)
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "base, tuned, words",
    [
        ({"a": torch.eye(2)}, {"b": torch.eye(2)}, "'a', 'b'"),
        ({"a": torch.eye(2)}, {"a": torch.eye(3)}, r"\(3, 3\)"),
        ({"a": torch.eye(2)}, {"a": torch.full((2, 2), math.nan)}, "NaN"),
        ({}, {}, "both have none"),
        ({"a": torch.eye(2)}, 3, "int"),
        (small(), None, "isn't adapted"),
        ("nowhere.safetensors", {}, "nowhere"),
    ],
)
def test_bad_pairs_are_refused_with_the_offending_value(base, tuned, words):
    with pytest.raises(lb.LoraBookError, match=words):
        sp.weight_pairs(base, tuned)


@pytest.mark.parametrize(
    "D",
    [
        torch.eye(3, dtype=torch.int64),
        torch.ones(3),
        torch.empty(0, 3),
        torch.full((2, 2), math.inf),
        "W",
    ],
)
def test_bad_matrices_are_refused(D):
    for f in (sp.singular_values, sp.effective_rank, sp.stable_rank):
        with pytest.raises(lb.LoraBookError):
            f(D)


def test_bad_ranks_sides_and_shapes_are_refused():
    for call in (
        lambda: sp.leading(torch.eye(3), 4),
        lambda: sp.leading(torch.eye(3), 1, "middle"),
        lambda: sp.overlap(torch.ones(3, 2), torch.ones(4, 2), 1),
        lambda: sp.alignment(torch.eye(2), torch.eye(3)),
    ):
        with pytest.raises(lb.LoraBookError):
            call()


def test_results_come_back_and_altered_ones_are_refused(tmp_path):
    pairs = {"w": (torch.eye(3), torch.eye(3) + torch.ones(3, 3))}
    facts = sp.spectra_of(pairs)
    assert math.isclose(facts["w"]["norm"], 3, rel_tol=1e-6) and math.isclose(
        facts["w"]["stable_rank"], 1, rel_tol=1e-5
    )
    sp.store(tmp_path / "deep" / "one", {"sigma": sp.singular_values(pairs["w"][1])}, facts)
    arrays, again = sp.restored(tmp_path / "deep" / "one")
    assert again == facts and arrays["sigma"].shape == (3,)
    sp.store(tmp_path / "two", {"sigma": torch.ones(2)}, {})
    (tmp_path / "two.npz").replace(tmp_path / "deep" / "one.npz")
    with pytest.raises(lb.LoraBookError, match="one.npz"):
        sp.restored(tmp_path / "deep" / "one")
    with pytest.raises(FileNotFoundError):
        sp.restored(tmp_path / "three")


def test_a_rank_that_forgets_to_normalise_fails_the_scale_law():
    def mutant(D):
        return torch.special.entr(sp.singular_values(D)).sum(-1).exp()

    D = drawn(4, 4, 0)
    assert not torch.isclose(mutant(D), mutant(2 * D), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_changes_of_two_types_are_compared_in_the_wider(dtype):
    D, E = drawn(5, 4, 0).to(dtype), drawn(5, 4, 1)
    for f in (
        lambda a, b: sp.overlap(a, b, 2),
        sp.alignment,
        lambda a, b: sp.principal_angles(sp.leading(a, 2), sp.leading(b, 3)),
    ):
        assert (
            torch.allclose(f(D, E), f(D.double(), E), atol=1e-5) and f(D, E).dtype is torch.float64
        )
    assert sp.principal_angles(torch.eye(4, 2).to(dtype), torch.eye(4, 3).to(dtype)).tolist() == [
        0,
        0,
    ]


def test_a_weight_that_the_loss_does_not_reach_has_gradient_zero():
    model, x = small(), drawn(4, 5, 0)
    got = sp.weight_gradients(model, lambda m: m[0](x).sum())
    assert got["0.weight"].any() and not got["2.weight"].any() and got["2.weight"].shape == (3, 6)


def adapted_by_peft():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(small(), LoraConfig(r=2, target_modules=["0"])).eval()


@pytest.mark.parametrize(
    "model, loss, words",
    [
        (small(), lambda m: 1.0, "1.0"),
        (small(), lambda m: m(drawn(4, 5, 0)), r"\(4, 3\)"),
        (small(), lambda m: m(drawn(4, 5, 0)).sum().detach(), "no gradient"),
        (nn.Tanh().eval(), lambda m: 1.0, "no linear map"),
        ("m", lambda m: 1.0, "str"),
        (lb.adapt(small(), "lora", ["0"], r=2).eval(), lambda m: 1.0, "before it is adapted"),
        (adapted_by_peft(), lambda m: 1.0, "before it is adapted"),
    ],
)
def test_gradients_that_do_not_exist_are_refused_and_flags_stay(model, loss, words):
    flags = [p.requires_grad for p in model.parameters()] if isinstance(model, nn.Module) else []
    with pytest.raises(lb.LoraBookError, match=words):
        sp.weight_gradients(model, loss)
    assert flags == ([p.requires_grad for p in model.parameters()] if flags else [])


def test_tied_weights_have_one_gradient_under_both_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].weight = model[0].weight
    got = sp.weight_gradients(model, lambda m: m(torch.ones(2, 4)).square().sum())
    assert torch.equal(got["0.weight"], got["1.weight"]) and model[0].weight.grad is None


@pytest.mark.parametrize(
    "arrays, facts, words",
    [
        ({"a": [None, 1]}, {}, "object"),
        ({"a": ["x"]}, {}, "numbers"),
        ({"file": [1.0]}, {}, "file"),
        ({}, {"a": torch.ones(1)}, "JSON"),
    ],
)
def test_what_the_files_cannot_hold_is_refused(tmp_path, arrays, facts, words):
    with pytest.raises(lb.LoraBookError, match=words):
        sp.store(tmp_path / "x", arrays, facts)
    assert not list(tmp_path.iterdir())


def test_tensors_of_any_type_are_stored_as_numbers(tmp_path):
    kept = {
        "half": torch.ones(2, dtype=torch.bfloat16),
        "trained": torch.ones(2, requires_grad=True),
        "one": 3.0,
    }
    arrays, _ = sp.restored(sp.store(tmp_path / "x", kept, {}))
    assert (
        arrays["half"].tolist() == arrays["trained"].tolist() == [1, 1]
        and float(arrays["one"]) == 3
    )


def test_rows_of_a_file_are_read_alone(tmp_path):
    tensors = {"a": drawn(5, 3, 0), "b": torch.tensor(2.0), "c": drawn(4, 2, 1, 1)}
    save_file(tensors, tmp_path / "x.safetensors")
    stored = sp.Stored(tmp_path / "x.safetensors")
    assert torch.equal(stored.piece("a", (slice(1, 3),)), tensors["a"][1:3]) and torch.equal(
        stored.piece("b", ...), tensors["b"]
    )
    assert torch.equal(stored.piece("c", (slice(None), slice(2, 9))), tensors["c"][:, 2:])
    with pytest.raises(lb.LoraBookError, match="list"):
        sp.spectra_of([1])
    for U, V in (
        (torch.eye(3, 2), torch.eye(4, 2)),
        (torch.eye(3), 1),
        (torch.full((2, 2), math.nan), torch.eye(2)),
    ):
        with pytest.raises(lb.LoraBookError):
            sp.principal_angles(U, V)
