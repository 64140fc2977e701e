"""The two pictures of the home page, drawn from the package: `python -m tools.site.home` writes
docs/cover.svg and docs/results.svg and prints the sentence below the second.
"""

import json
import re
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from lora_book.core.method import Part
from lora_book.lab.figures import INK, PALETTE, use_style
from lora_book.lab.protocol import effects
from lora_book.lab.schematic import schematic
from lora_book.registry import METHODS

ROOT = Path(__file__).resolve().parents[2]
NAMED = {  # colour, and where the name stands, of the methods that the figure names
    "full": ("grey", (8, 6), "right"),
    "lora": ("blue", (0, -15), "center"),
    "dora": ("purple", (8, 6), "left"),
    "cla": ("vermillion", (-9, -14), "right"),
    "vera": ("green", (0, -15), "center"),
    "loldu": ("purple", (0, -15), "center"),
}


def runs(root: Path = ROOT) -> dict:
    "{method: (trained parameters, {seed: test accuracy})} of the stored runs on the digits."
    found: dict = {}
    for path in sorted((root / "lora_book/data/analysis").glob("*-[0-9].json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        _, own = found.setdefault(run["method"], (run["numbers"], {}))
        own[run["seed"]] = run["quarters"][-1]["accuracy"]
    return found


def short(name: str) -> str:
    "A method's title, or what stands in brackets at its end."
    return re.sub(r"^.*\((.*)\)$", r"\1", METHODS[name].title)


def sentence(found: dict) -> str:
    "What the runs say: how far the parameters differ, and how few accuracies can be told apart."
    trained = [number for number, _ in found.values() if number]
    asked = {name: (own, found["lora"][1]) for name, (_, own) in found.items() if name != "lora"}
    told = [short(name) for name, effect in effects(asked).items() if effect.told]
    names = f" ({', '.join(told)})" if told else ""
    apart = f"only {len(told)} of the {len(asked)} others" if told else f"none of the {len(asked)}"
    apart = apart if told else apart + " others"
    return (
        f"On one small task the methods train between {min(trained):,} and {max(trained):,}"
        f" parameters of the adapted weights, and {apart}{names} can be told apart from LoRA by its"
        f" accuracy over {len(found['lora'][1])} seeds."
    )


def cover():
    "W = W0 + BA, without words."
    W0, B, A = Part("W_0", "n×m"), Part("B", "n×r", trains=True), Part("A", "r×m", trains=True)
    figure = schematic([W0], [r"\frac{\alpha}{r}", B, A])
    return figure


def results(found: dict):
    "Test accuracy against trained parameters, one point a method, some of them named."
    figure, ax = plt.subplots(figsize=(6.4, 3.4))
    shown = {name: (count, own.values()) for name, (count, own) in found.items() if count}
    low, high = min(found["lora"][1].values()), max(found["lora"][1].values())
    ax.axhspan(low, high, color=PALETTE["blue"], alpha=0.15, lw=0)
    for name, (count, own) in shown.items():
        hue, offset, side = NAMED.get(name, ("grey", None, ""))
        mean, known = statistics.mean(own), name in NAMED
        ax.plot([count] * 2, [min(own), max(own)], color=PALETTE[hue], lw=1.5, alpha=0.6)
        ax.plot(count, mean, "o", color=PALETTE[hue], ms=7 if known else 4, mew=0)
        if known:
            at = (count, max(own) if offset[1] > 0 else min(own))
            words = short(name)
            style = {"textcoords": "offset points", "ha": side, "color": PALETTE[hue]}
            ax.annotate(words, at, offset, weight="bold", **style)
    middle, across = (low + high) / 2, ax.get_yaxis_transform()
    ax.text(0.99, middle, "LoRA's range", transform=across, color=INK, va="center", ha="right")
    every = [value for _, own in shown.values() for value in own]
    ax.set_ylim(min(every) - 0.004, max(every) + 0.004)
    counts = [count for count, _ in shown.values()]
    factor = max(counts) / min(counts)
    ax.set_title(f"Trained parameters differ by a factor of {factor:.0f}", loc="left")
    ax.set(xscale="log", xlabel="trained parameters of the adapted weights", ylabel="test accuracy")
    return figure


def main() -> None:
    use_style()
    found = runs()
    for name, figure in (("cover", cover()), ("results", results(found))):
        place = ROOT / "docs" / f"{name}.svg"
        figure.savefig(place, metadata={"Date": None, "Creator": None})
        text = place.read_text(encoding="utf-8")
        lines = (line.rstrip() for line in text.splitlines())
        place.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(sentence(found))


if __name__ == "__main__":
    main()
