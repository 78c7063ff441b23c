"""`make ablation`: DAPO without each of its parts, GRPO, other token weights, at equal generation."""
