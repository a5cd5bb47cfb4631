"""Does another machine compute the same? One machine writes a record, the other is held to it.

prompts.py      what is asked                            fingerprint.py  which model was asked
trial.py        one prompt under one way to draw: its tokens, and the likeliest tokens at every step
record.py       the file: origin, fingerprint, trials    measure.py      trials from a loaded model, free or forced
compare.py      two sets of steps: errors, differences   bounds.py       how much they may differ, and why
"""

from __future__ import annotations

from cortexstream.parity.bounds import BOUNDS, QUANTIZED, Bound, bound_of
from cortexstream.parity.compare import Comparison, Difference, TrialComparison, compare
from cortexstream.parity.fingerprint import Fingerprint
from cortexstream.parity.measure import follow, measure
from cortexstream.parity.prompts import STEPS, NamedPrompt, choose_prompts
from cortexstream.parity.record import Origin, Record, load, save
from cortexstream.parity.trial import Step, Trial

__all__ = [
    "BOUNDS",
    "QUANTIZED",
    "STEPS",
    "Bound",
    "Comparison",
    "Difference",
    "Fingerprint",
    "NamedPrompt",
    "Origin",
    "Record",
    "Step",
    "Trial",
    "TrialComparison",
    "bound_of",
    "choose_prompts",
    "compare",
    "follow",
    "load",
    "measure",
    "save",
]
