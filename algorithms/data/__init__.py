"""The data of a run: reading rows, turning them into token sequences or prompts, and scoring sampled completions."""
