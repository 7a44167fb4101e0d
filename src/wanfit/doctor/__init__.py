"""`wanfit doctor`: whether a machine can do the work, in seconds, and what to change if not.

    cards and driver (NVML) · torch's build (asked in a process of its own) · RAM of the control
    group · disk · models with the planner's verdict

Nothing is loaded and nothing is measured: what it says is what the machine and the files say of
themselves. Left out: whether a card computes rightly, which only a clip shows.
"""

from wanfit.doctor.checks import Check
from wanfit.doctor.examine import Diagnosis, ModelHere, examine

__all__ = ["Check", "Diagnosis", "ModelHere", "examine"]
