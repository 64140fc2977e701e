"""Time and memory of adapted layers and models as ratios to the frozen floor, all contenders
interleaved in one process.

    python -m benchmarks.layer [--tokens 2048] [--shape 768x768] [--methods lora,cla] [--builds N]
    [--rounds N] [--out FILE] python -m benchmarks.layer --model            # BERT 6x384, every
    linear map adapted, batch 8, length 64 python -m benchmarks.layer --methods full,lora,products
    --peers "PEFT LoRA" --builds 60 --rounds 3 --out FILE --append     # one more run into FILE

The floor is the same network with everything frozen and gradients still flowing to the input.
`benchmarks.timing` says what a ratio and its interval are. Saved bytes, peak bytes and FLOPs are
exact; times are this machine's and mean nothing elsewhere but as ratios.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import lora_book as lb
from benchmarks.timing import command_line, quotients, setting, store, summary, timed
from lora_book.core.hosts import sites
from lora_book.core.products import count_flops, peak_bytes, saved_bytes

GOALS = {
    "lora": 1.12,
    "rslora": 1.12,
    "lora_plus": 1.12,
    "cola": 1.12,
    "asymmetric": 1.10,
    "rac": 1.10,
    "cla": 1.05,
    "random_cla": 1.05,
    "c3la": 1.05,
    "random_c3la": 1.05,
    "paca": 1.05,
    "dora": 1.17,
    "loldu": 1.55,
}
AT = {(2048, 768, 768): GOALS, (256, 768, 768): {"loldu": 1.5}}
METHODS = ("full", *GOALS, "vera", "adalora", "pissa")
PEERS = {
    "PEFT LoRA": {},
    "PEFT DoRA": {"use_dora": True},
    "PEFT PiSSA": {"init_lora_weights": "pissa"},
    "PEFT LoRA-FA": {},
    "PEFT VeRA": {},
    "PEFT AdaLoRA": {},
}
RIVAL = {"dora": "PEFT DoRA", "vera": "PEFT VeRA", "adalora": "PEFT AdaLoRA", "pissa": "PEFT PiSSA"}
RANK = 16


def frozen(m: int, n: int) -> nn.Module:
    "A frozen layer with m inputs and n outputs, the same numbers each time."
    layer = nn.Linear(m, n)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n, m, generator=torch.Generator().manual_seed(0)) / m**0.5)
    return layer.requires_grad_(False)


def shaken(model: nn.Module) -> nn.Module:
    "The model with what trains moved from its start."
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(
                (0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))).to(
                    p.device
                )
            )
    return model


def adapted(method: str, m: int, n: int, r: int) -> nn.Module:
    "The layer adapted with one of our methods; LoLDU at full rank."
    return shaken(
        lb.adapt(
            nn.Sequential(frozen(m, n)), method, ["0"], r=min(m, n) if method == "loldu" else r
        )
    )


def in_peft(name: str, model: nn.Module, targets: list, r: int) -> nn.Module:
    "The model adapted by HF PEFT."
    from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model

    if name == "PEFT VeRA":
        config = VeraConfig(r=r, target_modules=targets)
    elif name == "PEFT AdaLoRA":
        config = AdaLoraConfig(
            init_r=r,
            target_r=r,
            lora_alpha=r,
            target_modules=targets,
            total_step=100,
            tinit=10,
            tfinal=10,
        )
    else:
        config = LoraConfig(r=r, lora_alpha=r, target_modules=targets, **PEERS[name])
    with torch.random.fork_rng():
        made = get_peft_model(model, config)
    for key, p in made.named_parameters():
        p.requires_grad_(p.requires_grad and not (name == "PEFT LoRA-FA" and "lora_A" in key))
    return shaken(made)


def contenders(methods: list, peers: list, m: int, n: int, r: int = RANK) -> dict:
    "{name: model}: the floor, PEFT's and ours."
    theirs = {name: in_peft(name, nn.Sequential(frozen(m, n)), ["0"], r) for name in peers}
    return (
        {"floor": nn.Sequential(frozen(m, n))}
        | theirs
        | {method: adapted(method, m, n, r) for method in methods}
    )


def step(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> None:
    "Forward and backward, the input's gradient included; gradients are dropped."
    model(x).backward(g)
    x.grad = None
    model.zero_grad(set_to_none=True)


def numbers(seed: int, *shapes: tuple) -> list:
    "Random tensors of these shapes."
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


@torch.no_grad()
def products(
    layer: nn.Linear, A: torch.Tensor, B: torch.Tensor, x: torch.Tensor, g: torch.Tensor
) -> tuple:
    """The products of a step of LoRA by themselves, without autograd or a module around them: the
    output, the gradients of x, A and B.
    """
    U, Y = x @ A.t(), layer(x)
    torch.addmm(Y, U, B.t(), out=Y)
    V = g @ B
    of_B, of_A, of_x = g.t() @ U, V.t() @ x, V @ A
    return Y, torch.addmm(of_x, g, layer.weight, out=of_x), of_A, of_B


def layer_runs(methods: list, peers: list, tokens: int, m: int, n: int, seed: int) -> dict:
    'One step of each contender as a function, on fresh inputs; "products" among the methods are the products of LoRA\'s step alone.'
    x, g = numbers(seed, (tokens, m), (tokens, n))
    x.requires_grad_()
    bare = (
        {"products": partial(products, frozen(m, n), *numbers(1, (RANK, m), (n, RANK)), x, g)}
        if "products" in methods
        else {}
    )
    return {
        name: partial(step, model, x, g)
        for name, model in contenders(learning(methods), peers, m, n).items()
    } | bare


def learning(methods: list) -> list:
    "The methods that adapt a model."
    return [method for method in methods if method != "products"]


def exact(run: Callable, forward: Callable, known: list) -> dict:
    "Bytes kept for the backward pass, most bytes alive in a step, operations of a step."
    run()
    return {
        "saved": saved_bytes(forward, exclude=known),
        "peak": peak_bytes(run),
        "flops": count_flops(run),
    }


def tensors(model: nn.Module) -> list:
    "What exists between steps anyway: parameters, buffers, resting weights."
    return [
        *model.parameters(),
        *model.buffers(),
        *(site.resting_weight() for _, site in sites(model)),
    ]


def layer_exact(methods: list, peers: list, tokens: int, m: int, n: int) -> dict:
    "{name: exact figures}; saved bytes and operations beyond the floor's."
    x, g = numbers(0, (tokens, m), (tokens, n))
    x.requires_grad_()
    found = {
        name: exact(partial(step, model, x, g), partial(model, x), tensors(model))
        for name, model in contenders(methods, peers, m, n).items()
    }
    floor = found["floor"]
    return {
        name: own | {key: own[key] - floor[key] for key in ("saved", "flops")}
        for name, own in found.items()
    }


def beside_peers(name: str, found: dict) -> dict:
    """One of our contenders over PEFT's LoRA and over PEFT's own version of it, where they were
    measured; nothing for PEFT's.
    """
    peers = {} if name in PEERS else {"to_lora": "PEFT LoRA", "to_peer": RIVAL.get(name)}
    return {
        key: summary(quotients(found[name], found[peer]))
        for key, peer in peers.items()
        if peer in found
    }


def rows(found: dict, figures: dict, **same: object) -> list:
    "One row a contender: its ratio to the floor, to PEFT's LoRA and to PEFT's own version of it."
    made, goals = [], AT.get((same["tokens"], same.get("m"), same.get("n")), {})
    for name, own in found.items():
        made.append(
            {
                "name": name,
                **same,
                **summary(own),
                **figures.get(name, {}),
                "goal": goals.get(name),
                **beside_peers(name, found),
            }
        )
    return made


def one_layer(
    methods: list, peers: list, tokens: int, m: int, n: int, builds: int, rounds: int
) -> list:
    "The rows of one shape."
    found = timed(partial(layer_runs, methods, peers, tokens, m, n), "floor", builds, rounds)
    return rows(
        found, layer_exact(learning(methods), peers, tokens, m, n), tokens=tokens, m=m, n=n, r=RANK
    )


def bert(seed: int = 0) -> nn.Module:
    "BERT with 6 layers of 384, random numbers."
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(
            BertConfig(
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
                vocab_size=1000,
            )
        ).eval()


def model_step(model: nn.Module, x: torch.Tensor) -> None:
    "Forward and backward of BERT on embeddings."
    model(inputs_embeds=x).last_hidden_state.square().sum().backward()
    x.grad = None
    model.zero_grad(set_to_none=True)


def model_runs(methods: list, seed: int) -> dict:
    "One step of each contender for BERT 6x384 with every linear map adapted."
    floor = bert().requires_grad_(False)
    names = sorted(
        {
            name.rpartition(".")[2]
            for name, module in floor.named_modules()
            if isinstance(module, nn.Linear)
        }
    )
    models = {"floor": floor} | {
        name: in_peft(name, bert(), names, RANK) for name in ("PEFT LoRA", "PEFT DoRA", "PEFT VeRA")
    }
    models |= {method: shaken(lb.adapt(bert(), method, "all-linear", r=RANK)) for method in methods}
    x = numbers(seed, (8, 64, 384))[0].requires_grad_()
    return {name: partial(model_step, model, x) for name, model in models.items()}


def whole_model(methods: list, builds: int, rounds: int) -> list:
    "The rows of BERT."
    return rows(
        timed(partial(model_runs, methods), "floor", builds, rounds),
        {},
        model="BERT 6x384",
        tokens=512,
        r=RANK,
    )


def stored_runs(path: Path, how: dict) -> list:
    """The rows of the runs that the file holds; a ValueError if they were measured in another
    setting.
    """
    if not path.is_file():
        return []
    stored = json.loads(path.read_text())
    apart = sorted(
        key
        for key in stored["setting"].keys() | how.keys()
        if stored["setting"].get(key) != how.get(key)
    )
    if apart:
        raise ValueError(f"{path} was measured in another setting: {', '.join(apart)}")
    return stored["rows"]


def another_run(before: list, found: list) -> list:
    "The rows of the runs before and, as the next run, those found now."
    number = 1 + max((row["run"] for row in before), default=0)
    return before + [{"run": number} | row for row in found]


def main() -> None:
    "Run what the command line asks for, print a table, and write it as JSON."
    parser = command_line(__doc__, ",".join(METHODS))
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--peers", default=",".join(PEERS), help="PEFT's methods beside one layer")
    parser.add_argument(
        "--append", action="store_true", help="add the rows to those in FILE, as one more run"
    )
    args = parser.parse_args()
    if args.append and not args.out:
        parser.error("--append needs the file to append to: --out FILE")
    torch.set_num_threads(1)
    how = setting(builds=args.builds, rounds=args.rounds)
    try:
        before = stored_runs(args.out, how) if args.append else []
    except ValueError as error:
        parser.error(str(error))
    methods, (m, n) = args.methods.split(","), map(int, args.shape.split("x"))
    found = (
        whole_model(
            [method for method in methods if method not in ("loldu", "full")],
            args.builds,
            args.rounds,
        )
        if args.model
        else one_layer(methods, args.peers.split(","), args.tokens, m, n, args.builds, args.rounds)
    )
    store(another_run(before, found) if args.append else found, args.out, how)


if __name__ == "__main__":
    main()
