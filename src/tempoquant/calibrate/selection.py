"""The selection of transformer calls that a recording keeps, decided from the schedule before
anything runs.
"""

from typing import NamedTuple


class Call(NamedTuple):
    """A transformer call.

    Attributes:
        step: position among the denoiser's steps.
        prompt: index.
        branch: 0 conditional, 1 unconditional.
    """

    step: int
    prompt: int
    branch: int


def select_calls(num_steps: int, num_prompts: int, num_branches: int, num_wanted: int) -> list[Call]:
    """Choose `num_wanted` calls of one denoiser, or all there are.

    They are spread evenly over its steps first (counts of two steps differ by at most 1), then over
    prompts and branches: neighbouring calls take the next prompt and the other branch, and continue
    where the previous step stopped.

    Args:
        num_steps: of the denoiser in the sampling loop.
        num_prompts: sampled.
        num_branches: 2 with classifier-free guidance, else 1.
        num_wanted: calls to keep.

    Returns:
        The calls by step, prompt, branch; no two are equal.
    """
    per_step = num_prompts * num_branches
    num_wanted = min(num_wanted, num_steps * per_step)
    chosen = []
    taken = 0
    for step in range(num_steps):
        # The number of wanted calls before the middle of the interval of this step and the next.
        up_to = (num_wanted * (step + 1) + num_steps // 2) // num_steps
        for position in range(taken, min(up_to, num_wanted)):
            prompt, round_of_prompts = position % num_prompts, position % per_step // num_prompts
            chosen.append(Call(step, prompt, (prompt + round_of_prompts) % num_branches))
        taken = min(up_to, num_wanted)
    return sorted(chosen)
