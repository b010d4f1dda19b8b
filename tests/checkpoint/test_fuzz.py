"""The law of tests/fuzz_checkpoint.py on its first few hundred cases; `make fuzz` runs ten
thousand.
"""

from tests.fuzz_checkpoint import fuzz


def test_damage_is_refused_or_harmless() -> None:
    counts, violations = fuzz(range(200), seed=0)
    assert not violations, violations[0]
    assert sum(counts.values()) == 200 and len(counts) > 3
