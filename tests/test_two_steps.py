"""Every training of every committed config makes the two steps that it made when the values were written down."""

from __future__ import annotations

import json
import math

import pytest
from two_steps import EXPECTED, machine, names, trainings

WRITTEN = json.loads(EXPECTED.read_text("utf-8"))
OF_THIS_MACHINE = {"loss", "change", "checksum"}  # attacks use signs: last bits soon change results


@pytest.mark.parametrize("name", names())
def test_a_config_trains_as_before(name):
    made = {label: make() for label, make in trainings(name)}
    expected = WRITTEN["trainings"][name]
    assert made.keys() == expected.keys()
    for label, facts in made.items():
        assert 0 < facts["loss"] < math.inf
        compared = facts.keys() if machine() == WRITTEN["machine"] else facts.keys() - OF_THIS_MACHINE
        assert {key: facts[key] for key in compared} == {key: expected[label][key] for key in compared}, label
