"""What `make mutants` edits is there: it takes hours, and a text that has moved on ends it."""

from __future__ import annotations

import mutants
import pytest
import python_mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.what)
def test_kernels_hold_what_a_mutant_edits(mutant: mutants.Mutant) -> None:
    """Every edit changes its file."""
    path = mutants.path_of(mutant, mutants.ROOT, mutants.ROOT / "triton_kernels")
    assert mutant.old in path.read_text()
    assert mutant.old != mutant.new


def test_mutants_known_to_be_equivalent_exist() -> None:
    """Each key of the list names a mutant of today's source."""
    keys = {mutant.key for mutant in python_mutants.every_mutant()}
    assert python_mutants.EQUIVALENT.keys() <= keys
