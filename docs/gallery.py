"""Make docs/schedules.png: every schedule of the package, drawn by the package."""

from pathlib import Path

from matplotlib.figure import Figure

import lightning_tricks as lt

GALLERY = """
Constant(0.5)
Linear()
Cosine(end=0.1)
Polynomial(power=2)
Exponential(end=0.01)
Steps([0.3, 0.6, 0.9], gamma=0.3)
InverseSqrt(50)
InverseTime(50)
CosineRestarts(cycles=4, gamma=0.7)
CosineRestarts(length=100, multiplier=2)
OneCycle()
Triangular(cycles=3, low=0.1, gamma=0.7)
Warmup(0.1, Polynomial(0.5))
Warmup(0.2, Constant(), 0.01, 'exponential')
Cooldown(0.3, InverseSqrt(50), shape='1-sqrt')
Join([Linear(0.2, 1), Constant(), Cosine()], [0.2, 0.5])
WarmupCosine(0.05)
WarmupStableDecay(0.05, 0.2)
"""


def gallery(total_steps: int = 1000) -> Figure:
    """One small picture for each schedule."""
    figure = Figure(figsize=(12, 13), layout="constrained")
    for text, ax in zip(GALLERY.strip().splitlines(), figure.subplots(6, 3).flat, strict=True):
        lt.plot_schedule(lt.schedules.parse(text), total_steps, ax=ax)
        ax.set(xlabel="", ylabel="", ylim=(-0.05, 1.1))
        ax.set_title(text, fontsize=9, family="monospace")
    figure.supxlabel("optimizer step")
    figure.supylabel("factor of the base value")
    return figure


if __name__ == "__main__":
    gallery().savefig(Path(__file__).with_name("schedules.png"), dpi=70)
