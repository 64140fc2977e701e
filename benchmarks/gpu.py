"""Training steps of models of the papers' sizes on a CUDA device: time as a ratio to the frozen
floor, and peak memory.

    python -m benchmarks.gpu [--models roberta_base,tinyllama] [--methods lora,cla] [--builds N]
    [--rounds N] [--out FILE]

The weights are random, which changes neither time nor memory, and in bfloat16; products are in
bfloat16 (autocast), factors in float32. Every linear map is adapted with r = 16. A step is forward,
loss, backward down to the embeddings, and AdamW; the floor is the same without anything that
trains. Time is the device's, between two events, contenders interleaved (`benchmarks.timing`). Peak
memory is everything that a contender
holds in a step: weights, gradients, optimizer, activations.
"""

import gc
import random
import statistics
from collections.abc import Callable

import torch
from torch import nn

import lora_book as lb
from benchmarks.layer import PEERS, RANK, beside_peers, in_peft
from benchmarks.timing import command_line, one_build, setting, store, summary

METHODS = (
    "full",
    "lora",
    "asymmetric",
    "rac",
    "cla",
    "c3la",
    "paca",
    "dora",
    "vera",
    "adalora",
    "loldu",
    "mgpo",
    "sam",
)
IN_PEFT = ("PEFT LoRA", "PEFT LoRA-FA", "PEFT DoRA", "PEFT VeRA")


def roberta_base() -> tuple[nn.Module, tuple]:
    "RoBERTa-base's encoder, and a batch of 32 texts of 128 tokens."
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(
        RobertaConfig(vocab_size=100, num_attention_heads=12), add_pooling_layer=False
    ), (32, 128, 768)


def tinyllama() -> tuple[nn.Module, tuple]:
    "TinyLlama's decoder of 1.1 billion weights, and a batch of 8 texts of 1024 tokens."
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=100,
            hidden_size=2048,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            intermediate_size=5632,
            use_cache=False,
        )
    ), (8, 1024, 2048)


def small() -> tuple[nn.Module, tuple]:
    "A Llama that a processor takes steps of in no time: for trying this script out."
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            use_cache=False,
        )
    ), (2, 16, 64)


MODELS = {"roberta_base": roberta_base, "tinyllama": tinyllama, "small": small}
WITHOUT = {"tinyllama": ("loldu",)}  # the factors of 154 matrices of up to 2048 x 5632 take minutes


def made(name: str, model: nn.Module, device: str) -> nn.Module:
    "The model as a contender trains it, on the device."
    model = model.to(device, torch.bfloat16)
    if name == "floor":
        return model.requires_grad_(False)
    if name in PEERS:
        return in_peft(
            name,
            model,
            sorted(
                {
                    own.rpartition(".")[2]
                    for own, module in model.named_modules()
                    if isinstance(module, nn.Linear)
                }
            ),
            RANK,
        )
    return lb.adapt(model, name, None if name == "full" else "all-linear", r=RANK)


def contender(name: str, build: Callable, device: str) -> tuple[Callable, nn.Module]:
    "One training step as a function, and the model."
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model, shape = build()
    model = made(name, model, device).train()
    x = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1))
        .to(device, torch.bfloat16)
        .requires_grad_()
    )
    ours = hasattr(model, "_lora_book")
    groups = (
        lb.param_groups(model, 1e-4) if ours else [p for p in model.parameters() if p.requires_grad]
    )
    optimizer = torch.optim.AdamW(groups, lr=1e-4) if groups else None

    def loss() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model(inputs_embeds=x).last_hidden_state.float().square().mean()

    def step() -> None:
        x.grad = None
        if ours:
            lb.train_step(model, optimizer, loss)
        else:
            loss().backward()
            if optimizer:
                optimizer.step()
                optimizer.zero_grad()

    return step, model


def milliseconds(run: Callable) -> float:
    "The device's time for a run."
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def memory(name: str, build: Callable) -> tuple[Callable, dict]:
    """A contender's step, and the bytes that it holds between steps and at most within one, and the
    numbers that it trains.
    """
    before = torch.cuda.memory_allocated()
    step, model = contender(name, build, "cuda")
    step(), step()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    step()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return step, {
        "held": held,
        "peak": torch.cuda.max_memory_allocated() - before,
        "trained": trained,
    }


def one_model(
    model: str, names: list, rounds: int, order: random.Random, weigh: Callable, clock: Callable
) -> tuple[dict, dict]:
    """{contender: its ratios to the floor, one a round}, {contender: its figures}; two contenders
    at a time lie on the device.
    """
    floor, figures = weigh("floor", MODELS[model])
    times, ratios, figures = [clock(floor) for _ in range(rounds)], {}, {"floor": figures}
    figures["floor"]["milliseconds"] = round(statistics.median(times), 3)
    for name in names:
        step, figures[name] = weigh(name, MODELS[model])
        ratios |= one_build(
            {"floor": floor, name: step}, "floor", rounds, order, warm=2, clock=clock
        )
        del step
        gc.collect()
    return ratios, figures


def measured(
    model: str,
    methods: list,
    builds: int,
    rounds: int,
    weigh: Callable = memory,
    clock: Callable = milliseconds,
) -> list:
    """The rows of one model. weigh(contender, build): its step and figures; clock(step): the time
    that a step takes.
    """
    names, order, found = (
        [*IN_PEFT, *(m for m in methods if m not in WITHOUT.get(model, ()))],
        random.Random(0),
        {},
    )
    for _ in range(builds):
        ratios, figures = one_model(model, names, rounds, order, weigh, clock)
        for name, own in ratios.items():
            found.setdefault(name, []).append(own)
    rows = [{"name": "floor", "model": model, "r": RANK, "ratio": 1.0, **figures["floor"]}]
    return rows + [
        {
            "name": name,
            "model": model,
            "r": RANK,
            **summary(own),
            **figures[name],
            **beside_peers(name, found),
        }
        for name, own in found.items()
    ]


def main() -> None:
    "Run what the command line asks for, print a table, and write it as JSON."
    parser = command_line(__doc__, ",".join(METHODS))
    parser.add_argument("--models", default="roberta_base,tinyllama")
    args = parser.parse_args()
    rows = [
        row
        for model in args.models.split(",")
        for row in measured(model, args.methods.split(","), args.builds, args.rounds)
    ]
    store(
        rows,
        args.out,
        setting(
            builds=args.builds,
            rounds=args.rounds,
            device=torch.cuda.get_device_name(),
            dtype="bfloat16",
        ),
    )


if __name__ == "__main__":
    main()
