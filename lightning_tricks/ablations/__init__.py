"""Whether a trick helps: paired trainings with and without it, and what came of them."""

from lightning_tricks.ablations.effects import Ablation, Effect
from lightning_tricks.ablations.run import ablate

__all__ = ["Ablation", "Effect", "ablate"]
