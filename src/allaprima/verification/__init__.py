"""The same picture, proven: eager and optimized from one seed, with a float32 run as the judge of both.

Two questions, asked in this order:

  Is it the same picture?       PSNR and SSIM of ours against eager, and the latents after every step.
  Which is nearer the truth?    The error of eager and of ours against the same weights in float32.

One picture suffices for a verdict (`verify`), because it is also judged step by step; free runs are judged over many
(`verify_many`, `summarize`).

  drawing.py     what is drawn            metrics.py   how far two results are apart     sheet.py      pictures of it
  recording.py   one run, recorded        judging.py   the conditions of a verdict       command.py    many drawings
  truth.py       the run that judges      report.py, summary.py   what was found         captures.py   optimized once?
  verifier.py    runs all of them
"""

from .drawing import TASKS, Drawing, Task, test_card, test_mask
from .judging import MAX_RATIO, MIN_PSNR
from .report import Report
from .summary import Summary, summarize
from .truth import exact_float32, precise_copy
from .verifier import Verifier, verify, verify_many

__all__ = [
    "MAX_RATIO",
    "MIN_PSNR",
    "TASKS",
    "Drawing",
    "Report",
    "Summary",
    "Task",
    "Verifier",
    "exact_float32",
    "precise_copy",
    "summarize",
    "test_card",
    "test_mask",
    "verify",
    "verify_many",
]
