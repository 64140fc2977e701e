"""Time and memory of adapted layers and models as ratios to the frozen floor, all contenders interleaved in one process.

    python -m benchmarks.layer [--rounds N] [--tokens 256,2048] [--methods lora,cla] [--out benchmarks/layer.json]
    python -m benchmarks.layer --model            # BERT 6x384, every linear map adapted, batch 8, length 64

The floor is the same network with everything frozen and gradients still flowing to the input. A ratio is the median over rounds of
time / floor of the same round. Saved bytes and FLOPs are exact; times are this machine's and mean nothing elsewhere but as ratios.
"""
import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch import nn  # noqa: E402

import lora_book as lb  # noqa: E402
from lora_book.core.products import count_flops, saved_bytes  # noqa: E402

GOALS = {"lora": 1.12, "rslora": 1.12, "lora_plus": 1.12, "asymmetric": 1.10, "rac": 1.10, "cola": 1.12, "cla": 1.05, "random_cla": 1.05, "c3la": 1.05,
         "random_c3la": 1.05, "paca": 1.05, "dora": 1.17, "loldu": 1.55}
SHAPES = ((768, 768), (768, 3072))


def frozen(m: int, n: int) -> nn.Module:
    "A frozen layer with m inputs and n outputs, the same numbers each time."
    layer = nn.Linear(m, n)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n, m, generator=torch.Generator().manual_seed(0)) / m**0.5)
    return layer.requires_grad_(False)


def adapted(method: str, m: int, n: int, r: int) -> nn.Module:
    "The layer adapted with one of our methods, its numbers moved from the start."
    model = nn.Sequential(frozen(m, n))
    rank = min(m, n) if method == "loldu" else r
    lb.adapt(model, method, ["0"], r=rank)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and method != "full":
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


def peft_layer(m: int, n: int, r: int, **options) -> nn.Module:
    "The layer adapted by HF PEFT."
    from peft import LoraConfig, get_peft_model
    model = nn.Sequential(frozen(m, n))
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=["0"], **options))


def contenders(methods: list, m: int, n: int, r: int) -> dict:
    "{name: model}: the floor, PEFT's and ours."
    made = {"floor": nn.Sequential(frozen(m, n)), "PEFT LoRA": peft_layer(m, n, r), "PEFT DoRA": peft_layer(m, n, r, use_dora=True)}
    return made | {method: adapted(method, m, n, r) for method in methods}


def step(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> None:
    "Forward and backward, the input's gradient included."
    model(x).backward(g)


def timed(models: dict, x: torch.Tensor, g: torch.Tensor, rounds: int) -> dict:
    "{name: median of time / floor}, every contender once a round, in an order that rotates."
    ratios = {name: [] for name in models}
    names = list(models)
    for i in range(rounds + 2):
        spent = {}
        for name in names[i % len(names):] + names[:i % len(names)]:
            x.grad = None
            start = time.perf_counter()
            step(models[name], x, g)
            spent[name] = time.perf_counter() - start
            models[name].zero_grad(set_to_none=True)
        if i >= 2:
            for name, t in spent.items():
                ratios[name].append(t / spent["floor"])
    return {name: statistics.median(values) for name, values in ratios.items()}


def one_layer(methods: list, tokens: int, m: int, n: int, r: int, rounds: int) -> list:
    "One row a contender: ratio, saved bytes beyond the floor, FLOPs beyond the floor."
    generator = torch.Generator().manual_seed(2)
    x, g = torch.randn(tokens, m, generator=generator).requires_grad_(), torch.randn(tokens, n, generator=generator)
    models = contenders(methods, m, n, r)
    ratios = timed(models, x, g, rounds)
    exact = {name: (saved_bytes(lambda: model(x), exclude=[*model.parameters(), *model.buffers()]), count_flops(lambda: step(model, x, g)))
             for name, model in models.items()}
    saved, flops = exact["floor"]
    return [{"name": name, "tokens": tokens, "m": m, "n": n, "r": r, "ratio": round(ratios[name], 3), "saved": exact[name][0] - saved,
             "flops": exact[name][1] - flops, "goal": GOALS.get(name)} for name in models]


def bert(seed: int = 0) -> nn.Module:
    "BERT with 6 layers of 384, random numbers."
    from transformers import BertConfig, BertModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=1000)).eval()


def whole_model(methods: list, rounds: int, r: int = 16) -> list:
    "One row a contender for BERT 6x384 with every linear map adapted."
    from peft import LoraConfig, get_peft_model
    floor = bert().requires_grad_(False)
    names = sorted({name.rpartition(".")[2] for name, module in floor.named_modules() if isinstance(module, nn.Linear)})
    models = {"floor": floor, "PEFT LoRA": get_peft_model(bert(), LoraConfig(r=r, lora_alpha=r, target_modules=names)),
              "PEFT DoRA": get_peft_model(bert(), LoraConfig(r=r, lora_alpha=r, target_modules=names, use_dora=True))}
    models |= {method: lb.adapt(bert(), method, "all-linear", r=r) for method in methods}
    x = torch.randn(8, 64, 384, generator=torch.Generator().manual_seed(0)).requires_grad_()
    runs = {name: (lambda x, model=model: model(inputs_embeds=x).last_hidden_state) for name, model in models.items()}
    ratios: dict = {name: [] for name in runs}
    for i in range(rounds + 2):
        spent = {}
        for name, run in runs.items():
            start = time.perf_counter()
            run(x).square().sum().backward()
            spent[name] = time.perf_counter() - start
            models[name].zero_grad(set_to_none=True)
        for name, t in spent.items():
            ratios[name] += [t / spent["floor"]] * (i >= 2)
    return [{"name": name, "model": "BERT 6x384", "tokens": 512, "r": r, "ratio": round(statistics.median(values), 3)} for name, values in ratios.items()]


def main() -> None:
    "Run what the command line asks for, print a table, and write it as JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", default="256,2048")
    parser.add_argument("--methods", default=",".join(m for m in lb.methods() if m in GOALS or m == "full"))
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods = args.methods.split(",")
    rows = whole_model([m for m in methods if m != "loldu"], args.rounds) if args.model else [
        row for tokens in map(int, args.tokens.split(",")) for m, n in SHAPES for row in one_layer(methods, tokens, m, n, 16, args.rounds)]
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items() if value is not None))
    if args.out:
        setting = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1, "rounds": args.rounds, "processor": platform.machine()}
        args.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
