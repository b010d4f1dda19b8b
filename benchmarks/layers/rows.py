"""The recipes to compare, by their name in the table."""

from tempoquant.recipe import Recipe

RANK = 16
PAPER = f"paper, mxfp4, rank {RANK}"
"""The row that others are compared with."""


def steps() -> dict[str, Recipe]:
    """Return the published recipe, our additions one at a time, ours, and ours without its most
    expensive part.
    """
    paper, ours = Recipe.load("paper").replace(rank=RANK), Recipe.load("default")
    least_error = {"weight_scale_rule": "least_error", "activation_scale_rule": "least_error"}
    rows = {PAPER: paper.replace(format="mxfp4")}
    for format in ("nvfp4_m1", "nvfp4", "int4"):
        rows[f"paper, {format}, rank {RANK}"] = paper.replace(format=format)
    rows[f"paper + deflation, mxfp4, rank {RANK}"] = paper.replace(deflation=True)
    rows[f"paper + centring, mxfp4, rank {RANK}"] = paper.replace(centring=True)
    rows[f"paper + smoothing by rms, mxfp4, rank {RANK}"] = paper.replace(smoothing_statistic="rms")
    rows[f"paper + least-error scales, mxfp4, rank {RANK}"] = paper.replace(**least_error)
    for format in ("mxfp4", "nvfp4_m1", "nvfp4", "int4"):
        rows[f"ours, {format}, rank {RANK}"] = ours.replace(format=format, rank=RANK)
    for format in ("mxfp4", "nvfp4_m1", "nvfp4"):  # at the bits of the rows above: a branch has two factors, not three
        plain = ours.replace(format=format, rank=RANK * 3 // 2, deflation=False)
        rows[f"ours without deflation, {format}, rank {plain.rank}"] = plain
    rows[f"default: ours, {ours.format}, rank {ours.rank}"] = ours
    return rows


def unseen() -> dict[str, Recipe]:
    """Return recipes that tokens unseen in calibration can distinguish: with little, much, and
    prior-based calibration.
    """
    rows: dict[str, Recipe] = {}
    for format in ("mxfp4", "nvfp4_m1", "int4"):
        paper, ours = (Recipe.load(name).replace(format=format, rank=RANK) for name in ("paper", "default"))
        rows[f"rtn, {format}"] = Recipe.load("rtn").replace(format=format)
        rows[f"paper, {format}, rank {RANK}"] = paper
        rows[f"ours, {format}, rank {RANK}"] = ours
        rows[f"ours without the prior, {format}, rank {RANK}"] = ours.replace(prior_fraction=0.0)
    return rows
